"""Exact hypergradients with forward-over-reverse products in the backward pass."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from metajax.core import _inner, _tree
from metajax.core._inner import Arguments, InnerState
from metajax.core._types import InnerProblem, Params

EVERY = 8  # steps between kept states


def mixed_loop(every: int = EVERY, unroll: int = 1) -> _inner.Loop:
    """An inner loop with its own backward pass.

    The forward pass keeps the inner gradient of each step. The backward pass goes through the steps in reverse, and
    replays fast weights and optimizer state from the kept gradients, which takes no model. A Hessian-vector and a
    mixed product of each step come from one Jacobian-vector product of the inner gradient.
    """

    def loop(
        problem: InnerProblem, start: InnerState, arguments: Arguments, num_steps: int,
        visit: _inner.Visit | None = None,
    ) -> tuple[InnerState, tuple[jax.Array, Any]]:  # fmt: skip
        loss = _inner.split_loss(problem)

        def forward(start: InnerState, arguments: Arguments) -> tuple[Any, Any]:
            def step(state: InnerState, _: Any) -> tuple[InnerState, Any]:
                value, grads = jax.value_and_grad(loss)(*_inner.loss_arguments(state, arguments))
                state = _inner.apply_gradient(problem, state, grads, value, arguments)
                return state, (value, visit(state.params, arguments, state.step) if visit else (), grads)

            end, (values, visits, grads) = jax.lax.scan(step, start, length=num_steps, unroll=unroll)
            return (end, (values, visits)), (start, arguments, values, grads)

        def backward(kept: Any, cotangents: Any) -> tuple[Any, Any]:
            start, arguments, values, grads = kept
            of_end, (_, of_visits) = cotangents  # the losses are metrics: nothing differentiates them
            meta_params = arguments.meta_params

            def replay(state: InnerState, first: Any, count: Any) -> InnerState:
                def step(index: Any, state: InnerState) -> InnerState:
                    kept_grads = jax.tree.map(lambda leaf: leaf[first + index], grads)
                    return _inner.apply_gradient(problem, state, kept_grads, values[first + index], arguments)

                return jax.lax.fori_loop(0, count, step, state)

            def segment(state: InnerState, number: Any) -> tuple[InnerState, InnerState]:
                count = jnp.minimum(every, num_steps - number * every)
                return replay(state, number * every, count), state

            _, starts = jax.lax.scan(segment, start, jnp.arange(-(-num_steps // every)))

            def step_back(carry: Any, inputs: Any) -> tuple[Any, None]:
                of_state, of_meta = carry
                index, of_visit = inputs
                state = jax.tree.map(lambda leaf: leaf[index // every], starts)
                state = replay(state, index - index % every, index % every)
                floats, rest = split_floats(state)

                def update(floats: InnerState, grads: Params, meta_params: Params) -> Any:
                    here = arguments._replace(meta_params=meta_params)
                    after = _inner.apply_gradient(problem, _tree.merge(floats, rest), grads, values[index], here)
                    return split_floats(after)[0], visit(after.params, here, after.step) if visit else ()

                def gradients(params: Params) -> tuple[Params, Params]:
                    here = _inner.loss_arguments(state._replace(params=_tree.merge(params, rest.params)), arguments)
                    return jax.grad(loss, argnums=(0, 1))(*here)

                own = jax.tree.map(lambda leaf: leaf[index], grads)
                _, pull_back = jax.vjp(update, floats, own, meta_params)
                of_state, of_grads, of_rule = pull_back((of_state, of_visit))
                _, (hessian_product, mixed_product) = jax.jvp(gradients, (floats.params,), (of_grads,))
                of_params = jax.tree.map(jnp.add, of_state.params, hessian_product)
                of_meta = jax.tree.map(lambda *parts: sum(parts), of_meta, of_rule, mixed_product)
                return (of_state._replace(params=of_params), of_meta), None

            zeros = jax.tree.map(lambda leaf: _tree.vary(jnp.zeros_like(leaf), _tree.varying_axes(leaf)), meta_params)
            keep = lambda leaf, cotangent: None if leaf is None else cotangent  # noqa: E731
            of_end = jax.tree.map(keep, split_floats(start)[0], of_end, is_leaf=lambda leaf: leaf is None)
            (of_start, of_meta), _ = jax.lax.scan(
                step_back, (of_end, zeros), (jnp.arange(num_steps), of_visits), reverse=True, unroll=unroll
            )
            return of_start, Arguments(of_meta, None, None, None)  # type: ignore[arg-type]

        run = jax.custom_vjp(lambda start, arguments: forward(start, arguments)[0])
        run.defvjp(forward, backward)
        if num_steps == 0:
            return _inner.scan_loop()(problem, start, arguments, 0, visit)
        return run(start, arguments)

    return loop


def split_floats(tree: Any) -> tuple[Any, Any]:
    """Splits a tree into what can be differentiated and the rest, with None where the other has a leaf."""
    is_float = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)  # noqa: E731
    floats = jax.tree.map(lambda leaf: leaf if is_float(leaf) else None, tree)
    return floats, jax.tree.map(lambda leaf: None if is_float(leaf) else leaf, tree)
