"""Reptile: the way the fast weights went is the direction in which their start should go."""

from __future__ import annotations

from typing import Any

import jax

from metajax.core import _inner, _rng, _tree
from metajax.core._types import Episode, Hypergrad, Learner, Params
from metajax.hypergrad._parts import inner_problem, stateless


def displacement() -> Hypergrad:
    """The displacement `params_0 - params_T`, pulled back through the start of the inner loop (Reptile).

    With an outer `optax.sgd(rate)` this is the published rule `meta += rate * (params_T - params_0)`. Any inner
    optimizer and number of steps will do. The query set is used for metrics only, so give the support set all
    examples that the task may learn from.

    Raises (when called):
      ValueError: the learner has no inner problem.

    Source: Nichol, Achiam and Schulman 2018, On First-Order Meta-Learning Algorithms, arXiv:1803.02999.

    >>> import metajax
    >>> metajax.hypergrad.displacement().init(None, None, None, None)
    ()
    """

    def value_and_grad(
        learner: Learner, meta_params: Params, state: Any, episode: Episode, *, key: Any = None, frozen: Params = None
    ) -> tuple[Any, Params, Any]:
        problem = inner_problem("displacement()", learner)
        adapt_key, loss_key = _rng.split(key, 2)
        result = _inner.unroll(problem, meta_params, episode.support, key=adapt_key, frozen=frozen)
        full = _tree.merge(meta_params, frozen)
        loss, aux = learner.outer_loss(result.adapted, full, episode.query, key=loss_key)
        moved = jax.tree.map(lambda start, end: start - end, result.initial, result.params)
        init_key = _rng.split(adapt_key, 3)[0]  # the key that unroll gave to init
        _, pull_back = jax.vjp(
            lambda meta_params: problem.init(_tree.merge(meta_params, frozen), episode.support, init_key), meta_params
        )
        (grads,) = pull_back(moved)
        return (loss, {**aux, "inner_loss": result.losses}), grads, state

    return stateless(value_and_grad)
