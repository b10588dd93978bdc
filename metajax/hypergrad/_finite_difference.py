"""Estimators that compute second-order products by a central difference of gradients: DARTS and SAMA.

They need only first-order gradients, and so support networks whose operations have a backward pass that cannot be
differentiated, such as many kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metajax.core import _inner, _tree, _validate
from metajax.core._inner import Arguments, InnerState, Steps
from metajax.core._types import Hypergrad, InnerProblem, Learner, Params
from metajax.hypergrad._explicit import explicit, stopped_gradient
from metajax.hypergrad._parts import inner_problem, no_carry, query_only, refuse_zero, watch


def finite_difference(*, epsilon: float = 0.01) -> Hypergrad:
    """Hypergradient with second-order products of the last inner step by a central difference (DARTS; Liu et al. 2019).

    Let `v` be the gradient of the outer loss, pulled back through the update rule of the last step to its inner
    gradient `g(params, meta_params)`. The products of `v` with the derivatives of `g` are the difference between the
    gradients of the inner loss at `params + r v` and `params - r v`, divided by `2 r`, where `r = epsilon / |v|` and
    `params` are the fast weights before that step: for SGD, equations 7 and 8 of the paper. The cost is two more
    gradients.

    The steps before the last are treated as in `first_order()`: their gradients are constants, the fast weights pass
    the gradient on to the start, and nothing is kept from these steps except what learned rates need. With one inner
    step, as in the paper, the hypergradient is exact up to an error of order `epsilon**2` and rounding of order
    (machine precision) / `epsilon`. This includes the gradient through the start, so that the estimator supports plain
    MAML. Keep fast weights in float32 or higher precision: in bfloat16 rounding removes most of the displacement.

    Args:
      epsilon: distance of the two points from the fast weights, in the Euclidean norm over all fast weights.

    Returns:
      A `Hypergrad`. Without inner steps nothing is approximated. A learner without an inner problem is differentiated
      directly and exactly. If `v` is zero (no kept query example), the contribution of the inner gradient is zero. A
      NaN inside the inner loop gives NaN.

    Raises:
      ValueError: `epsilon` is not a finite number above 0, or (when used) the objective is one of inner losses.

    Source: Liu, Simonyan and Yang 2019, DARTS: Differentiable Architecture Search, arXiv:1806.09055.

    >>> import metajax
    >>> metajax.hypergrad.finite_difference().init(None, None, None, None)
    ()
    """
    _validate.positive_float("epsilon", epsilon)

    def loop(
        problem: InnerProblem, start: InnerState, arguments: Arguments, steps: Steps, num_steps: int,
        visit: _inner.Visit | None = None,
    ) -> tuple[InnerState, tuple[jax.Array, Any]]:  # fmt: skip
        before, last = max(num_steps - 1, 0), slice(max(num_steps - 1, 0), num_steps)
        first = jax.tree.map(lambda leaf: leaf[:before], steps)
        state, outputs = _inner.scan_loop(stopped_gradient(recorded=False))(
            problem, start, arguments, first, before, visit
        )
        if num_steps == 0:
            return state, outputs
        steps = jax.tree.map(lambda leaf: leaf[last], steps)
        state, more = _inner.scan_loop(_differenced_gradient(epsilon))(problem, state, arguments, steps, 1, visit)
        return state, jax.tree.map(lambda *parts: jnp.concatenate(parts), outputs, more)

    return _of_queries("finite_difference()", explicit(loop))


def sama(*, alpha: float = 1.0) -> Hypergrad:
    """SAMA: implicit differentiation with an identity inner Jacobian, through the update rule (Choe et al. 2023).

    At the end of the inner loop the update `u(g(params, meta_params))` should vanish. The implicit function theorem
    with the identity in place of `du/dparams` leaves the direct gradient of the outer loss minus the product of
    `v = (du/dg)^T d outer_loss / d params` with the mixed second derivative of the inner loss. That product is the
    difference between the gradients with respect to the meta-parameters at `params + r v` and `params - r v`, divided
    by `2 r`, where `r = alpha / |v|` and `params` are the last fast weights.

    `du/dg` is the derivative in the last inner step. The paper derives it for Adam, where it is diagonal; here `v` is
    the vector-Jacobian product through the update, for any optax rule and with bias corrections and schedules. So `v`
    has the scale of the inner rate, also for SGD. If the rule depends on the meta-parameters (learned rates), its
    derivative in the last step is added.

    As in `implicit()`, the hypergradient does not depend on the start of the inner loop: a meta-parameter that only
    enters there receives no gradient from it. The cost beyond the plain inner loop is the time and memory of two
    gradients.

    Args:
      alpha: distance of the two points from the fast weights, in the Euclidean norm over all fast weights; 1 is the
        default of the authors' code, for networks whose weights have a much larger norm.

    Returns:
      A `Hypergrad`. If `v` is zero (no kept query example), the contribution of the inner loop is zero. A NaN inside
      the inner loop gives NaN. The inner loop is assumed to converge; this is not checked. As for
      `finite_difference()`, keep fast weights in float32 or higher precision.

    Raises:
      ValueError: `alpha` is not a finite number above 0, or (when called) the learner has no inner problem, has a carry
        or an objective of inner losses, takes no inner step, or has an inner loss that does not depend on the
        meta-parameters, so that the result would be zero.

    Source: Choe et al. 2023, Making Scalable Meta Learning Practical, arXiv:2310.05674.

    >>> import metajax
    >>> metajax.hypergrad.sama().init(None, None, None, None)
    ()
    """
    _validate.positive_float("alpha", alpha)

    def loop(
        problem: InnerProblem, start: InnerState, arguments: Arguments, steps: Steps, num_steps: int,
        visit: _inner.Visit | None = None,
    ) -> tuple[InnerState, tuple[jax.Array, Any]]:  # fmt: skip
        del visit
        if num_steps == 0:
            raise ValueError("hypergrad: sama() needs num_steps of at least 1, got 0")
        no_carry("sama()", problem)
        loss = _inner.step_loss(problem)
        fixed, start = jax.lax.stop_gradient((arguments, start))
        before, last = (jax.tree.map(part, steps) for part in (lambda leaf: leaf[:-1], lambda leaf: leaf[-1]))
        state, (losses, _) = _inner.scan_loop()(problem, start, fixed, before, num_steps - 1)
        (value, _), (grads, _) = _inner.plain_gradient(loss)(*_inner.loss_inputs(state, fixed, last))
        end = _inner.apply_gradient(problem, state, grads, value, (), fixed, last.valid)
        # the value is zero, but its derivative is the derivative of the inner gradient at the end
        change = _change_of_gradient(loss, alpha)(
            *_inner.loss_inputs(state._replace(params=end.params), arguments, last)
        )
        grads = jax.tree.map(jnp.add, grads, change)
        state = _inner.apply_gradient(problem, state, grads, value, (), arguments, last.valid)
        return state, (jnp.append(losses, value), ())

    estimator = _of_queries("sama()", explicit(loop))

    def value_and_grad(learner: Learner, *arguments: Any, **keywords: Any) -> tuple[Any, Params, Any]:
        inner_problem("sama()", learner)
        return estimator.value_and_grad(learner, *arguments, **keywords)

    return Hypergrad(estimator.init, value_and_grad)


def _of_queries(name: str, estimator: Hypergrad) -> Hypergrad:
    """Restricts an estimator to objectives of the query set alone."""

    def value_and_grad(learner: Learner, *arguments: Any, **keywords: Any) -> tuple[Any, Params, Any]:
        query_only(name, learner)
        return estimator.value_and_grad(learner, *arguments, **keywords)

    return Hypergrad(estimator.init, value_and_grad)


def _differenced_gradient(epsilon: float) -> _inner.Gradient:
    """Returns the inner gradient; its derivative is a central difference. A stream counts as data."""

    def gradient(loss: Callable[..., Any]) -> Callable[..., Any]:
        def backward(inputs: Any, cotangents: Any) -> tuple[Any, ...]:
            params, meta_params, context, carry, *rest = inputs
            (of_loss, of_carry), (of_slope, of_told) = cotangents
            context_floats, context_rest = _tree.split_floats(context)
            carry_floats, carry_rest = _tree.split_floats(carry)

            def pulled(params: Params, *seeds: Any) -> Any:
                def lossy(params: Any, meta_params: Any, context: Any, carry: Any) -> Any:
                    value, after = loss(
                        params, meta_params, _tree.fill(context, context_rest), _tree.fill(carry, carry_rest), *rest
                    )
                    return value, _tree.split_floats(after)[0]

                return jax.vjp(lossy, params, meta_params, context_floats, carry_floats)[1](seeds)

            seeds = jnp.ones_like(of_loss), jax.tree.map(jnp.zeros_like, carry_floats)
            second = _central_difference(lambda params: pulled(params, *seeds), params, of_slope, epsilon)
            first = pulled(params, of_loss + of_told, _floats_of(carry, of_carry))
            return *jax.tree.map(jnp.add, first, second), *[None] * len(rest)

        run = jax.custom_vjp(_inner.plain_gradient(loss))
        run.defvjp(lambda *inputs: (_inner.plain_gradient(loss)(*inputs), inputs), backward)
        return run

    return gradient


def _floats_of(tree: Any, cotangents: Any) -> Any:
    """Returns the cotangents of the leaves that can be differentiated, None for the others."""
    return jax.tree.map(lambda leaf, cotangent: cotangent if _tree.is_float(leaf) else None, tree, cotangents)


def _change_of_gradient(loss: Callable[..., Any], alpha: float) -> Callable[..., Params]:
    """Returns a function with value zero and the derivative of the inner gradient at constant fast weights.

    The derivative with respect to meta-parameters and context is computed by a central difference.
    """

    def backward(inputs: Any, of_slope: Params) -> tuple[Any, ...]:
        params, meta_params, context, *rest = inputs
        floats, others = _tree.split_floats(context)
        watched, reached = watch()

        def slope(params: Params) -> Any:
            return jax.grad(
                lambda meta_params, floats: watched(loss(params, meta_params, _tree.fill(floats, others), *rest)[0]),
                argnums=(0, 1),
            )(meta_params, floats)

        product = _central_difference(slope, params, of_slope, alpha)
        refuse_zero("sama()", reached)
        return None, *product, *[None] * len(rest)

    run = jax.custom_vjp(lambda params, *rest: jax.tree.map(jnp.zeros_like, params))
    run.defvjp(lambda params, *rest: (jax.tree.map(jnp.zeros_like, params), (params, *rest)), backward)
    return run


def _central_difference(function: Callable[[Params], Any], point: Params, direction: Params, distance: float) -> Any:
    """Computes the derivative of a function at a point along a direction, from two points at the given distance."""
    size = optax.tree.norm(direction)
    scale = distance / jnp.where(size == 0, 1, size)

    def at(sign: int) -> Any:
        moved = jax.tree.map(lambda here, part: here + (sign * scale).astype(part.dtype) * part, point, direction)
        return function(moved)

    return jax.tree.map(lambda above, below: (above - below) / (2 * scale).astype(above.dtype), at(1), at(-1))
