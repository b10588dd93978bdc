"""The inner loop: one engine that adaptation and every explicit estimator share.

What differs between estimators is how the loop is run and differentiated (a `Loop`).
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
    """What an inner loop gives.

    Attributes:
      initial: first fast weights.
      params: last fast weights.
      adapted: what predict needs.
      losses: `[num_steps]`, before each step.
      visits: `[num_steps]`, what `visit` said after each step; `()` without one.
    """

    initial: Params
    params: Params
    adapted: Any
    losses: jax.Array
    visits: Any = ()


class Arguments(NamedTuple):
    """What stays the same over an inner loop.

    Attributes:
      meta_params: the meta-parameters, or the part of them that is differentiated.
      frozen: the rest of them, where they are split.
      support: the support set.
      key: PRNG key of the loop or None.
      data: what `visit` reads besides.
    """

    meta_params: Params
    frozen: Params
    support: Examples
    key: Any
    data: Any = None

    @property
    def full(self) -> Params:
        """All meta-parameters."""
        return _tree.merge(self.meta_params, self.frozen)


Visit = Callable[[Params, Arguments, jax.Array], jax.Array]  # (params, arguments, steps taken) -> scalar
# (problem, start, arguments, num_steps, visit) -> (end, (losses [num_steps], visits [num_steps]))
Loop = Callable[..., tuple[InnerState, tuple[jax.Array, Any]]]
# (loss) -> (params, meta_params, frozen, support, step, key) -> (loss, gradient with respect to params)
Gradient = Callable[[Callable[..., jax.Array]], Callable[..., tuple[jax.Array, Params]]]


def split_loss(problem: InnerProblem) -> Callable[..., jax.Array]:
    """The inner loss with the meta-parameters in two parts: `(params, meta_params, frozen, support, step, key)`."""

    def loss(params: Params, meta_params: Params, frozen: Params, support: Examples, step: Any, key: Any) -> jax.Array:
        return problem.loss(params, _tree.merge(meta_params, frozen), support, step, key)

    return loss


def loss_arguments(state: InnerState, arguments: Arguments) -> tuple[Any, ...]:
    """What `split_loss` takes at a state."""
    key = _rng.fold(arguments.key, state.step)
    return state.params, arguments.meta_params, arguments.frozen, arguments.support, state.step, key


def apply_gradient(
    problem: InnerProblem, state: InnerState, grads: Params, loss: jax.Array, arguments: Arguments
) -> InnerState:
    """The update rule: the state after a step whose inner gradient is known."""
    optimizer = optax.with_extra_args_support(problem.optimizer(arguments.full))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=loss)
    return InnerState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)


def scan_loop(
    gradient: Gradient = jax.value_and_grad,
    wrap: Callable[..., Any] = lambda step: step,
    block: int = 1,
    unroll: int = 1,
) -> Loop:
    """A loop that JAX differentiates by itself.

    Args:
      gradient: how the gradient of the inner loss is taken.
      wrap: applied to functions `(state, arguments) -> (state, outputs)`, to a step and to a block of steps, such as
        `jax.checkpoint`.
      block: how many steps are wrapped together.
      unroll: how many steps are written out one after the other in the program.
    """

    def loop(
        problem: InnerProblem, start: InnerState, arguments: Arguments, num_steps: int, visit: Visit | None = None
    ) -> tuple[InnerState, tuple[jax.Array, Any]]:
        inner_gradient = gradient(split_loss(problem))

        @wrap
        def step(state: InnerState, arguments: Arguments) -> tuple[InnerState, tuple[jax.Array, Any]]:
            loss, grads = inner_gradient(*loss_arguments(state, arguments))
            state = apply_gradient(problem, state, grads, loss, arguments)
            return state, (loss, visit(state.params, arguments, state.step) if visit else ())

        def several(state: InnerState, arguments: Arguments, length: int) -> tuple[InnerState, Any]:
            return jax.lax.scan(lambda state, _: step(state, arguments), state, length=length, unroll=unroll)

        if block == 1:
            return several(start, arguments, num_steps)
        whole = wrap(lambda state, arguments: several(state, arguments, block))
        state, outputs = jax.lax.scan(lambda state, _: whole(state, arguments), start, length=num_steps // block)
        outputs = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)
        if num_steps % block:
            state, last = wrap(lambda state, arguments: several(state, arguments, num_steps % block))(state, arguments)
            outputs = jax.tree.map(lambda *parts: jnp.concatenate(parts), outputs, last)
        return state, outputs

    return loop


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
    loop = scan_loop()

    def update(state: InnerState, meta_params: Params, support: Examples, key: Any = None) -> InnerState:
        return loop(problem, state, Arguments(meta_params, None, support, key), 1)[0]

    return update


def unroll(
    problem: InnerProblem,
    meta_params: Params,
    support: Examples,
    *,
    key: Any = None,
    num_steps: int | None = None,
    frozen: Params = None,
    loop: Loop | None = None,
    visit: Visit | None = None,
    data: Any = None,
) -> InnerResult:
    """Runs the whole inner loop of one task.

    Args:
      problem: what is optimised.
      meta_params: the meta-parameters, or the part of them that is differentiated.
      support: the support set.
      key: PRNG key; None is deterministic.
      num_steps: instead of `problem.num_steps`; 0 returns the initial fast weights, finished.
      frozen: the rest of the meta-parameters where they are split.
      loop: how it is run and differentiated; `scan_loop()` by default.
      visit: a scalar of the fast weights after each step, `(params, arguments, steps taken)`.
      data: what `visit` finds in `arguments.data`.

    Raises:
      ValueError: `num_steps` is negative or no integer.
    """
    num_steps = _validate.int_at_least("num_steps", problem.num_steps if num_steps is None else num_steps, 0)
    full = _tree.merge(meta_params, frozen)
    init_key, loop_key, finish_key = _rng.split(key, 3)
    start = inner_init(problem)(full, support, key=init_key)
    # a start that devices share (zeros, frozen parameters) adapts to the task of each
    start = _tree.vary(start, _tree.varying_axes((full, support)))
    arguments = Arguments(meta_params, frozen, support, loop_key, data)
    state, (losses, visits) = (loop or scan_loop())(problem, start, arguments, num_steps, visit)
    adapted = problem.finish(state.params, full, support, finish_key)
    return InnerResult(start.params, state.params, adapted, losses, visits)


def adaptation(problem: InnerProblem) -> Callable[..., Any]:
    """The `adapt` of a learner that adapts by its inner loop alone."""

    def adapt(
        meta_params: Params, support: Examples, *, unlabelled: Any = None, num_steps: int | None = None, key: Any = None
    ) -> Any:
        del unlabelled
        return unroll(problem, meta_params, support, key=key, num_steps=num_steps).adapted

    return adapt
