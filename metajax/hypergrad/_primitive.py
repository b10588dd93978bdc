"""The primitive for one task that `outer_update` and other programs use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from metajax.core import _keys, _validate
from metajax.core._types import Aux, Episode, Hypergrad, Learner, Params


def value_and_grad(learner: Learner, estimator: Hypergrad) -> Callable[..., tuple[Any, Params]]:
    """Returns a function that computes the value and the hypergradient of the outer loss of one task.

    Args:
      learner: any learner.
      estimator: any estimator that keeps no state.

    Returns:
      `(meta_params, episode, *, key=None, frozen=None) -> ((loss, aux), grads)`. `aux` is a `metajax.Aux`: `outputs`
      are the predictions for the query set, and, with an inner loop, `metrics` contain `inner_loss` `[num_steps]`.

    Raises:
      ValueError: an argument has the wrong type, or a part of the learner is missing; or (when called) the estimator
        keeps a state between outer steps, such as `persistent_truncation`. Use `init` and `value_and_grad` of such an
        estimator, which take and return the state.

    >>> import jax, jax.numpy as jnp, optax, metajax
    >>> model = metajax.Model(lambda key, x: jnp.zeros([3, 2]), lambda w, x: x @ w)
    >>> learner = metajax.learners.maml(model, inner=optax.sgd(0.1), num_steps=2)
    >>> examples = metajax.Examples(jnp.eye(3)[:2], jnp.array([0, 1]), jnp.ones(2, bool))
    >>> fn = jax.jit(metajax.hypergrad.value_and_grad(learner, metajax.hypergrad.unrolled()))
    >>> (loss, aux), grads = fn(jnp.zeros([3, 2]), metajax.Episode(examples, examples))
    >>> aux.metrics["inner_loss"].shape, grads.shape
    ((2,), (3, 2))
    """

    _validate.learner(learner, ("outer_loss",))
    _validate.instance("estimator", estimator, Hypergrad)

    def fn(
        meta_params: Params, episode: Episode, *, key: Any = None, frozen: Params = None
    ) -> tuple[tuple[jax.Array, Aux], Params]:
        init_key, key = _keys.split(key, 2)
        state = estimator.init(learner, meta_params, episode, init_key, frozen=frozen)
        if jax.tree.leaves(state):
            raise ValueError(
                "estimator must keep no state, which each call would lose, got one that does: use its init and its "
                "value_and_grad(learner, meta_params, state, episode, key=key) -> ((loss, aux), grads, state)"
            )
        value, grads, _ = estimator.value_and_grad(learner, meta_params, state, episode, key=key, frozen=frozen)
        return value, grads

    return fn
