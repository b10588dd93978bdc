"""Exact hypergradients with forward-over-reverse products in the backward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from metajax.core import _inner, _tree
from metajax.core._inner import Arguments, InnerState, Steps
from metajax.core._types import InnerProblem

EVERY = 8  # steps between kept states


class _Shared(NamedTuple):
    """Differentiated inputs that all steps share: their float leaves, or the cotangents of these."""

    meta_params: Any
    context: Any


class _Residuals(NamedTuple):
    """Residuals of the backward pass. `context` and `data` hold only the leaves that are differentiated."""

    start: InnerState
    arguments: Arguments
    steps: Steps
    values: jax.Array
    grads: Any
    carries: Any
    context: Any
    data: Any


class _Cotangents(NamedTuple):
    """Cotangents that the backward pass carries from step to step."""

    state: Any  # cotangents of fast weights and optimizer state
    carry: Any
    shared: _Shared
    data: Any  # leaves [num_steps, ...]


def mixed_loop(every: int = EVERY, unroll: int = 1) -> _inner.Loop:
    """Returns an inner loop with a custom backward pass.

    The forward pass keeps the inner gradient of each step, and the carry at intervals of at most `every` steps. The
    backward pass runs through the steps in reverse and replays fast weights and optimizer state from the kept
    gradients, without running the model. It recomputes carries, which takes one inner loss per step. All products of a
    step come from one Jacobian-vector product of the pullback of its inner loss.
    """

    def loop(
        problem: InnerProblem, start: InnerState, arguments: Arguments, steps: Steps, num_steps: int,
        visit: _inner.Visit | None = None,
    ) -> tuple[InnerState, tuple[jax.Array, Any]]:  # fmt: skip
        if num_steps == 0:
            return _inner.scan_loop()(problem, start, arguments, steps, 0, visit)
        segments = -(-num_steps // every)  # of equal length, except the last one
        size = -(-num_steps // segments)
        run = jax.custom_vjp(
            lambda start, arguments, steps: _forward(
                problem, start, arguments, steps, num_steps, visit, size, unroll
            )[0]
        )  # fmt: skip

        def forward(*inputs: Any) -> tuple[Any, _Residuals]:
            is_primal = lambda leaf: hasattr(leaf, "perturbed")  # noqa: E731
            start, arguments, steps = jax.tree.map(lambda leaf: leaf.value, inputs, is_leaf=is_primal)
            moving = lambda tree: jax.tree.map(  # noqa: E731
                lambda leaf: leaf.value if leaf.perturbed and _tree.is_float(leaf.value) else None,
                tree,
                is_leaf=is_primal,
            )
            outputs, kept = _forward(problem, start, arguments, steps, num_steps, visit, size, unroll)
            differentiated = moving(inputs[1].context), moving(inputs[2].data)
            return outputs, _Residuals(start, arguments, steps, *kept, *differentiated)

        def backward(kept: _Residuals, cotangents: Any) -> tuple[Any, Any, Any]:
            return _backward(problem, kept, cotangents, num_steps, visit, size, unroll)

        run.defvjp(forward, backward, symbolic_zeros=True)
        return run(start, arguments, steps)

    return loop


def _forward(
    problem: InnerProblem, start: InnerState, arguments: Arguments, steps: Steps, num_steps: int,
    visit: _inner.Visit | None, size: int, unroll: int,
) -> tuple[Any, tuple[jax.Array, Any, Any]]:  # fmt: skip
    """Runs the loop; keeps the losses and inner gradients of all steps, and the carry of every `size`th step."""
    gradient = _inner.plain_gradient(_inner.step_loss(problem))

    def step(carried: tuple[InnerState, Any], inputs: tuple[jax.Array, Steps]) -> tuple[Any, Any]:
        (state, carries), (index, inputs_now) = carried, inputs
        place = index // size
        carries = jax.tree.map(
            lambda kept, now: kept.at[place].set(jnp.where(index % size == 0, now, kept[place])), carries, state.carry
        )
        (value, carry), (grads, _) = gradient(*_inner.loss_inputs(state, arguments, inputs_now))
        state = _inner.apply_gradient(problem, state, grads, value, carry, arguments, inputs_now.valid)
        seen = visit(state.params, carry, arguments, state.step) if visit else ()
        return (state, carries), (value, seen, grads)

    carries = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (-(-num_steps // size), *leaf.shape)), start.carry)
    (end, carries), (values, visits, grads) = jax.lax.scan(
        step, (start, carries), (jnp.arange(num_steps), steps), length=num_steps, unroll=unroll
    )
    return (end, (values, visits)), (values, grads, carries)


def _backward(
    problem: InnerProblem, kept: _Residuals, cotangents: Any, num_steps: int, visit: _inner.Visit | None, size: int,
    unroll: int,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Computes the cotangents of start, arguments and steps."""
    start, arguments, steps, values, grads, carries, context, data = kept
    loss, segments = _inner.step_loss(problem), -(-num_steps // size)
    bare = start._replace(carry=())

    def at(tree: Any, index: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[index], tree)

    def apply(state: InnerState, grads: Any, value: Any, here: Arguments, index: Any) -> InnerState:
        return _inner.apply_gradient(problem, state, grads, value, (), here, at(steps.valid, index))

    def replay(state: InnerState, first: Any, count: Any) -> InnerState:
        """Returns the state, without its carry, after `count` more steps."""
        return jax.lax.fori_loop(
            0, count, lambda j, now: apply(now, at(grads, first + j), values[first + j], arguments, first + j), state
        )

    def replay_carries(state: InnerState, carry: Any, first: Any, count: Any) -> Any:
        """Recomputes the carries of a segment, leaves `[size, ...]`."""

        def step(j: Any, carried: Any) -> Any:
            state, carry, seen = carried
            seen = jax.tree.map(lambda leaf, now: leaf.at[j].set(now), seen, carry)
            inputs = _inner.loss_inputs(state._replace(carry=carry), arguments, at(steps, first + j))
            return apply(state, at(grads, first + j), values[first + j], arguments, first + j), loss(*inputs)[1], seen

        seen = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (size, *leaf.shape)), carry)
        return jax.lax.fori_loop(0, count, step, (state, carry, seen))[2]

    def step_back(now: InnerState, carry: Any, index: Any, later: _Cotangents) -> _Cotangents:
        """Computes the cotangents before a step from those after it."""
        inputs = at(steps, index)
        floats, rest = _tree.split_floats(now)
        carry_floats, carry_rest = _tree.split_floats(carry)
        own, value = at(grads, index), values[index]

        def lossy(params: Any, carry_floats: Any, shared: _Shared, moving: Any) -> tuple[jax.Array, Any]:
            here = arguments._replace(
                meta_params=shared.meta_params, context=_tree.fill(shared.context, arguments.context)
            )
            state = now._replace(params=params, carry=_tree.fill(carry_floats, carry_rest))
            found, after = loss(*_inner.loss_inputs(state, here, inputs._replace(data=_tree.fill(moving, inputs.data))))
            return found, _tree.split_floats(after)[0]

        def update(floats: Any, grads: Any, value: Any, shared: _Shared, next_floats: Any) -> Any:
            here = arguments._replace(
                meta_params=shared.meta_params, context=_tree.fill(shared.context, arguments.context)
            )
            after = apply(_tree.fill(floats, rest), grads, value, here, index)
            seen = visit(after.params, _tree.fill(next_floats, next_rest), here, after.step) if visit else ()
            return _tree.split_floats(after)[0], seen

        shared, moving = _Shared(arguments.meta_params, context), at(data, index)
        next_floats, next_rest = carry_floats, carry_rest  # not read if there is no visit
        if visit is not None and jax.tree.leaves(carry):
            after = loss(*_inner.loss_inputs(now._replace(carry=carry), arguments, inputs))[1]
            next_floats, next_rest = _tree.split_floats(after)
        _, pull_back = jax.vjp(update, floats, own, value, shared, next_floats)
        of_state, of_grads, of_value, of_shared, of_next = pull_back((later.state, at(of_visits, index)))
        of_value, of_next = of_value + at(of_values, index), jax.tree.map(jnp.add, later.carry, of_next)

        def pulled(params: Any, of_loss: Any, of_carry: Any) -> Any:
            return jax.vjp(lossy, params, carry_floats, shared, moving)[1]((of_loss, of_carry))

        # the derivative of `pulled` along the cotangents: second derivatives of the loss for the inner gradient, and
        # first derivatives for loss and carry
        _, (of_params, of_carry, more, of_data) = jax.jvp(
            pulled,
            (floats.params, jnp.ones_like(value), jax.tree.map(jnp.zeros_like, carry_floats)),
            (of_grads, of_value, of_next),
        )
        return _Cotangents(
            of_state._replace(params=jax.tree.map(jnp.add, of_state.params, of_params)),
            of_carry,
            jax.tree.map(lambda *parts: sum(parts), later.shared, of_shared, more),
            jax.tree.map(lambda leaf, part: leaf.at[index].set(part), later.data, of_data),
        )

    def back_through(begin: Any, count: Any, later: _Cotangents, carry_at: Any, unroll: int | None) -> _Cotangents:
        """Computes the cotangents before `count` steps from those after them."""

        def back(j: Any, later: _Cotangents) -> _Cotangents:
            index = begin + count - 1 - j
            first = bare if segments == 1 else at(starts, index // size)
            now = replay(first, index - index % size, index % size)
            return step_back(now, carry_at(index), index, later)

        return jax.lax.fori_loop(0, count, back, later, unroll=unroll)

    def segment_back(later: _Cotangents, number: Any) -> tuple[_Cotangents, None]:
        begin = number * size
        whole = num_steps % size == 0
        count = size if whole else jnp.minimum(size, num_steps - begin)
        seen = replay_carries(bare if segments == 1 else at(starts, number), at(carries, number), begin, count)
        # if the last segment has a different number of steps, the length is only known at run time
        return back_through(begin, count, later, lambda index: at(seen, index - begin), unroll if whole else None), None

    of_end, (of_values, of_visits) = jax.tree.map(
        _instantiated, cotangents, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero)
    )
    keep = lambda leaf, cotangent: None if leaf is None else cotangent  # noqa: E731
    floats = jax.tree.map(keep, _tree.split_floats(start)[0], of_end, is_leaf=lambda leaf: leaf is None)
    varying = _tree.varying_axes((start, arguments.meta_params))
    zeros = lambda tree: jax.tree.map(  # noqa: E731
        lambda leaf: _tree.vary(jnp.zeros_like(leaf), _tree.varying_axes(leaf)), tree
    )
    later = _Cotangents(
        _tree.vary(floats._replace(carry=()), varying), _tree.vary(floats.carry, varying),
        zeros(_Shared(arguments.meta_params, context)), zeros(data),
    )  # fmt: skip
    if segments > 1:

        def ahead(state: InnerState, number: Any) -> tuple[InnerState, InnerState]:
            return replay(state, number * size, jnp.minimum(size, num_steps - number * size)), state

        _, starts = jax.lax.scan(ahead, bare, jnp.arange(segments))
    if size == 1 or not jax.tree.leaves(carries):  # no carry to recompute: one loop over all steps
        later = back_through(0, num_steps, later, lambda index: at(carries, index // size), unroll)
    elif segments == 1:
        later, _ = segment_back(later, 0)
    else:
        later, _ = jax.lax.scan(segment_back, later, jnp.arange(segments), reverse=True)
    of_arguments = Arguments(later.shared.meta_params, None, None, None, later.shared.context)  # type: ignore[arg-type]
    return later.state._replace(carry=later.carry), of_arguments, Steps(later.data)


def _instantiated(cotangent: Any) -> Any:
    """Replaces a cotangent that is known to be zero by an array of zeros."""
    return jnp.zeros(cotangent.shape, cotangent.dtype) if isinstance(cotangent, SymbolicZero) else cotangent
