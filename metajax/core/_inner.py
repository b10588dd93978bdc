"""The inner loop: one engine that adaptation and every explicit estimator share.

What differs between estimators is the gradient of the inner loss (a `Gradient`) and what the backward pass
keeps of a step (a `wrap` of the step function, such as `jax.checkpoint`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metajax.core import _rng, _tree, _validate
from metajax.core._types import Examples, InnerProblem, Params


class InnerState(NamedTuple):
    """What an inner step carries.

    Attributes:
      params: fast weights.
      opt_state: state of the inner optimizer.
      step: int32 scalar, inner steps taken.

    >>> InnerState._fields
    ('params', 'opt_state', 'step')
    """

    params: Params
    opt_state: Any
    step: jax.Array


class InnerResult(NamedTuple):
    """What an inner loop gives: first and last fast weights, what predict needs, losses `[num_steps]`."""

    initial: Params
    params: Params
    adapted: Any
    losses: jax.Array


# (loss) -> (params, meta_params, frozen, support, step, key) -> (loss, gradient with respect to params)
Gradient = Callable[[Callable[..., jax.Array]], Callable[..., tuple[jax.Array, Params]]]


def plain_gradient(loss: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, Params]]:
    """The gradient as JAX takes it, differentiable any number of times."""
    return jax.value_and_grad(loss)


def _split_loss(problem: InnerProblem) -> Callable[..., jax.Array]:
    def loss(params: Params, meta_params: Params, frozen: Params, support: Examples, step: Any, key: Any) -> jax.Array:
        return problem.loss(params, _tree.merge(meta_params, frozen), support, step, key)

    return loss


def _step(
    problem: InnerProblem,
    gradient: Callable[..., Any],
    state: InnerState,
    meta_params: Params,
    frozen: Params,
    support: Examples,
    key: Any,
) -> tuple[InnerState, jax.Array]:
    loss, grads = gradient(state.params, meta_params, frozen, support, state.step, _rng.fold(key, state.step))
    optimizer = optax.with_extra_args_support(problem.optimizer(_tree.merge(meta_params, frozen)))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=loss)
    params = optax.apply_updates(state.params, updates)
    return InnerState(params, opt_state, state.step + 1), loss


def inner_init(problem: InnerProblem) -> Callable[..., InnerState]:
    """The start of an inner loop: `(meta_params, support, *, key=None) -> InnerState`.

    >>> import jax.numpy as jnp, optax, metajax
    >>> model = metajax.Model(lambda key, x: jnp.zeros([3, 2]), lambda w, x: x @ w)
    >>> learner = metajax.learners.maml(model, inner=optax.sgd(0.1))
    >>> examples = metajax.Examples(jnp.ones([2, 3]), jnp.array([0, 1]), jnp.ones(2, bool))
    >>> int(metajax.inner_init(learner.problem)(jnp.zeros([3, 2]), examples).step)
    0
    """

    def init(meta_params: Params, support: Examples, *, key: Any = None) -> InnerState:
        params = problem.init(meta_params, support, key)
        return InnerState(params, problem.optimizer(meta_params).init(params), jnp.zeros([], jnp.int32))

    return init


def inner_update(problem: InnerProblem) -> Callable[..., InnerState]:
    """One inner step: `(state, meta_params, support, key=None) -> state`, with `state` from `inner_init`.

    The key is folded with the step, so that the same key serves the whole loop.

    >>> import jax.numpy as jnp, optax, metajax
    >>> model = metajax.Model(lambda key, x: jnp.zeros([3, 2]), lambda w, x: x @ w)
    >>> learner = metajax.learners.maml(model, inner=optax.sgd(0.1))
    >>> examples = metajax.Examples(jnp.ones([2, 3]), jnp.array([0, 1]), jnp.ones(2, bool))
    >>> state = metajax.inner_init(learner.problem)(jnp.zeros([3, 2]), examples)
    >>> int(metajax.inner_update(learner.problem)(state, jnp.zeros([3, 2]), examples).step)
    1
    """
    gradient = plain_gradient(_split_loss(problem))

    def update(state: InnerState, meta_params: Params, support: Examples, key: Any = None) -> InnerState:
        return _step(problem, gradient, state, meta_params, None, support, key)[0]

    return update


def unroll(
    problem: InnerProblem,
    meta_params: Params,
    support: Examples,
    *,
    key: Any = None,
    num_steps: int | None = None,
    frozen: Params = None,
    gradient: Gradient = plain_gradient,
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda step: step,
) -> InnerResult:
    """Runs the whole inner loop of one task as one scan.

    Args:
      problem: what is optimised.
      meta_params: the meta-parameters, or the part of them that is differentiated.
      support: the support set.
      key: PRNG key; None is deterministic.
      num_steps: instead of `problem.num_steps`; 0 returns the initial fast weights, finished.
      frozen: the rest of the meta-parameters where they are split.
      gradient: how the gradient of the inner loss is taken.
      wrap: applied to the step function `(state, arguments) -> (state, loss)`.

    Raises:
      ValueError: `num_steps` is negative or no integer.
    """
    num_steps = _validate.int_at_least("num_steps", problem.num_steps if num_steps is None else num_steps, 0)
    full = _tree.merge(meta_params, frozen)
    init_key, loop_key, finish_key = _rng.split(key, 3)
    start = inner_init(problem)(full, support, key=init_key)
    # a start that devices share (zeros, frozen parameters) adapts to the task of each
    start = _tree.vary(start, _tree.varying_axes((full, support)))
    inner_gradient = gradient(_split_loss(problem))

    @wrap
    def step(state: InnerState, arguments: tuple[Any, ...]) -> tuple[InnerState, jax.Array]:
        return _step(problem, inner_gradient, state, *arguments)

    arguments = (meta_params, frozen, support, loop_key)
    state, losses = jax.lax.scan(lambda state, _: step(state, arguments), start, length=num_steps)
    adapted = problem.finish(state.params, full, support, finish_key)
    return InnerResult(start.params, state.params, adapted, losses)
