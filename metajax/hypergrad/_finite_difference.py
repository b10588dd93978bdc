"""Estimators that take second-order products from a central difference of gradients: DARTS' and SAMA.

They need first-order gradients alone, and so serve networks whose operations have a backward pass that cannot be
differentiated itself, such as many kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metajax.core import _inner, _validate
from metajax.core._inner import Arguments, InnerState
from metajax.core._types import Hypergrad, InnerProblem, Learner, Params
from metajax.hypergrad._explicit import explicit, stopped_gradient
from metajax.hypergrad._parts import inner_problem, refuse_zero, watch


def finite_difference(*, epsilon: float = 0.01) -> Hypergrad:
    """The last inner step, its second-order products by one central difference (DARTS; Liu et al. 2019).

    Let `v` be the gradient of the outer loss, pulled back through the update rule of the last step to its inner
    gradient `g(params, meta_params)`. The products of `v` with the derivatives of `g` are the difference between the
    gradients of the inner loss at `params + r v` and `params - r v`, divided by `2 r`, where `r = epsilon / |v|` and
    `params` are the fast weights before that step: for SGD, equations 7 and 8 of the paper. Two more gradients are all
    it costs.

    The steps before the last count as in `first_order()`: their gradients are constants, the fast weights pass the
    gradient on to the start, and nothing of these steps is kept, except for what learned rates need. With one inner
    step, as in the paper, the hypergradient is exact up to an error of order `epsilon**2` and rounding of order
    (machine precision) / `epsilon`, through the start too, so that it serves plain MAML. Keep fast weights in float32
    or better: in bfloat16 most of the displacement is lost to rounding.

    Args:
      epsilon: distance of the two points from the fast weights, in the Euclidean norm over all of them.

    Returns:
      A `Hypergrad`. Without inner steps nothing is approximated. A learner without an inner problem is differentiated
      directly and exactly. Where `v` is zero (no kept query example), so is what the inner gradient contributes. A NaN
      inside the inner loop gives NaN.

    Raises:
      ValueError: `epsilon` is not a finite number above 0.

    Source: Liu, Simonyan and Yang 2019, DARTS: Differentiable Architecture Search, arXiv:1806.09055.

    >>> import metajax
    >>> metajax.hypergrad.finite_difference().init(None, None, None, None)
    ()
    """
    _validate.positive_float("epsilon", epsilon)

    def loop(
        problem: InnerProblem, start: InnerState, arguments: Arguments, num_steps: int,
        visit: _inner.Visit | None = None,
    ) -> tuple[InnerState, tuple[jax.Array, Any]]:  # fmt: skip
        state, outputs = _inner.scan_loop(stopped_gradient)(problem, start, arguments, max(num_steps - 1, 0), visit)
        if num_steps == 0:
            return state, outputs
        state, last = _inner.scan_loop(_differenced_gradient(epsilon))(problem, state, arguments, 1, visit)
        return state, jax.tree.map(lambda *parts: jnp.concatenate(parts), outputs, last)

    return explicit(loop)


def sama(*, alpha: float = 1.0) -> Hypergrad:
    """SAMA: implicit differentiation with the identity for the inner Jacobian, aware of the rule (Choe et al. 2023).

    At the end of the inner loop the update `u(g(params, meta_params))` should vanish. The implicit function theorem
    with the identity in place of `du/dparams` leaves the direct gradient of the outer loss minus the product of
    `v = (du/dg)^T d outer_loss / d params` with the mixed second derivative of the inner loss. That product is the
    difference between the gradients with respect to the meta-parameters at `params + r v` and `params - r v`, divided
    by `2 r`, where `r = alpha / |v|` and `params` are the last fast weights.

    `du/dg` is that of the last inner step. The paper writes it out for Adam, where it is diagonal; here `v` is the
    vector-Jacobian product through the update, for any optax rule and with bias corrections and schedules. So it has
    the scale of the inner rate, SGD's included, and where the rule depends on the meta-parameters (learned rates) its
    own derivative in the last step is added.

    As under `implicit()`, the start of the inner loop is forgotten, and a meta-parameter that only enters there gets
    no gradient from it. Time and memory beyond the plain inner loop are those of two gradients.

    Args:
      alpha: distance of the two points from the fast weights, in the Euclidean norm over all of them; 1 is the default
        of the authors' code, for networks whose weights have a norm far above it.

    Returns:
      A `Hypergrad`. Where `v` is zero (no kept query example), so is what the inner loop contributes. A NaN inside the
      inner loop gives NaN. That the inner loop converges is assumed and not checked. As for `finite_difference()`, keep
      fast weights in float32 or better.

    Raises:
      ValueError: `alpha` is not a finite number above 0, or (when called) the learner has no inner problem, takes no
        inner step, or has an inner loss that does not depend on the meta-parameters, so that all would be zero.

    Source: Choe et al. 2023, Making Scalable Meta Learning Practical, arXiv:2310.05674.

    >>> import metajax
    >>> metajax.hypergrad.sama().init(None, None, None, None)
    ()
    """
    _validate.positive_float("alpha", alpha)

    def loop(
        problem: InnerProblem, start: InnerState, arguments: Arguments, num_steps: int,
        visit: _inner.Visit | None = None,
    ) -> tuple[InnerState, tuple[jax.Array, Any]]:  # fmt: skip
        del visit
        if num_steps == 0:
            raise ValueError("hypergrad: sama() needs num_steps of at least 1, got 0")
        loss = _inner.split_loss(problem)
        fixed, start = jax.lax.stop_gradient((arguments, start))
        state, (losses, _) = _inner.scan_loop()(problem, start, fixed, num_steps - 1)
        value, grads = jax.value_and_grad(loss)(*_inner.loss_arguments(state, fixed))
        end = _inner.apply_gradient(problem, state, grads, value, fixed)
        # zero, but its derivative is that of the inner gradient at the end
        change = _change_of_gradient(loss, alpha)(*_inner.loss_arguments(state._replace(params=end.params), arguments))
        state = _inner.apply_gradient(problem, state, jax.tree.map(jnp.add, grads, change), value, arguments)
        return state, (jnp.append(losses, value), ())

    estimator = explicit(loop)

    def value_and_grad(learner: Learner, *arguments: Any, **keywords: Any) -> tuple[Any, Params, Any]:
        inner_problem("sama()", learner)
        return estimator.value_and_grad(learner, *arguments, **keywords)

    return Hypergrad(estimator.init, value_and_grad)


def _differenced_gradient(epsilon: float) -> _inner.Gradient:
    """The inner gradient, with a central difference for its own derivative."""

    def gradient(loss: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, Params]]:
        value_and_slope = jax.value_and_grad(loss)

        def backward(arguments: Any, cotangents: Any) -> tuple[Any, ...]:
            params, *rest = arguments
            _, of_slope = cotangents  # the losses are metrics: nothing differentiates them
            slopes = lambda params: jax.grad(loss, argnums=(0, 1))(params, *rest)  # noqa: E731
            return *_central_difference(slopes, params, of_slope, epsilon), None, None, None, None

        run = jax.custom_vjp(lambda *arguments: value_and_slope(*arguments))
        run.defvjp(lambda *arguments: (value_and_slope(*arguments), arguments), backward)
        return run

    return gradient


def _change_of_gradient(loss: Callable[..., jax.Array], alpha: float) -> Callable[..., Params]:
    """Zero for the inner gradient at given fast weights, whose derivative in the meta-parameters is a difference."""

    def backward(arguments: Any, of_slope: Params) -> tuple[Any, ...]:
        params, meta_params, *rest = arguments
        watched, reached = watch()

        def slope(params: Params) -> Params:
            return jax.grad(lambda meta_params: watched(loss(params, meta_params, *rest)))(meta_params)

        product = _central_difference(slope, params, of_slope, alpha)
        refuse_zero("sama()", reached)
        return None, product, None, None, None, None

    run = jax.custom_vjp(lambda params, *rest: jax.tree.map(jnp.zeros_like, params))
    run.defvjp(lambda params, *rest: (jax.tree.map(jnp.zeros_like, params), (params, *rest)), backward)
    return run


def _central_difference(function: Callable[[Params], Any], point: Params, direction: Params, distance: float) -> Any:
    """The derivative of a function at a point along a direction, from two points so far away."""
    size = optax.tree.norm(direction)
    scale = distance / jnp.where(size == 0, 1, size)

    def at(sign: int) -> Any:
        moved = jax.tree.map(lambda here, part: here + (sign * scale).astype(part.dtype) * part, point, direction)
        return function(moved)

    return jax.tree.map(lambda above, below: (above - below) / (2 * scale).astype(above.dtype), at(1), at(-1))
