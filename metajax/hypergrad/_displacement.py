"""Reptile: the displacement of the fast weights is the update direction of their start."""

from __future__ import annotations

from typing import Any

import jax

from metajax.core import _inner, _keys, _tree
from metajax.core._objective import judge
from metajax.core._types import Episode, Hypergrad, Learner, Params
from metajax.hypergrad._parts import inner_problem, query_only, stateless, with_inner_loss


def displacement() -> Hypergrad:
    """The displacement `params_0 - params_T`, pulled back through the start of the inner loop (Reptile).

    With an outer `optax.sgd(rate)` this is the published rule `meta += rate * (params_T - params_0)`. It supports any
    inner optimizer and any number of steps. The query set is used only for metrics, so put all examples that the task
    may learn from into the support set.

    Raises (when called):
      ValueError: the learner has no inner problem, or an objective of inner losses.

    Source: Nichol, Achiam and Schulman 2018, On First-Order Meta-Learning Algorithms, arXiv:1803.02999.

    >>> import metajax
    >>> metajax.hypergrad.displacement().init(None, None, None, None)
    ()
    """

    def value_and_grad(
        learner: Learner, meta_params: Params, state: Any, episode: Episode, *, key: Any = None, frozen: Params = None
    ) -> tuple[Any, Params, Any]:
        problem = inner_problem("displacement()", learner)
        query_only("displacement()", learner)
        keys, full = _keys.of_task(key), _tree.fill(meta_params, frozen)
        result = _inner.unroll(problem, meta_params, episode.support, key=keys.adapt, frozen=frozen)
        loss, aux = judge(
            learner, result.adapted, full, episode, _keys.fold(keys.outer, problem.num_steps), result.losses
        )
        moved = jax.tree.map(lambda start, end: start - end, result.initial, result.params)
        adapt_keys = _keys.of_adaptation(keys.adapt)

        def start(meta_params: Params) -> Params:
            full, support = _tree.fill(meta_params, frozen), _inner.without_padding(episode.support)
            context = _inner.context_of(problem, full, support, adapt_keys)
            return _inner.params_of(problem, full, support, adapt_keys, context)

        _, pull_back = jax.vjp(start, meta_params)
        (grads,) = pull_back(moved)
        return (loss, with_inner_loss(aux)), grads, state

    return stateless(value_and_grad)
