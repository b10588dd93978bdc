"""Hypergradient of a converged inner loop, from the linear system at its solution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metajax.core import _inner, _keys, _tree, _validate
from metajax.core._objective import judge
from metajax.core._types import Aux, Episode, Hypergrad, Learner, Params
from metajax.hypergrad._parts import (
    context_and_pullback,
    inner_problem,
    no_carry,
    query_only,
    refuse_zero,
    stateless,
    watch,
    with_inner_loss,
)

Product = Callable[[Params], Params]


def implicit(
    solver: str = "cg",
    *,
    steps: int = 10,
    tol: float = 1e-5,
    ridge: float = 0.0,
    rate: float | None = None,
    max_residual: float | None = None,
) -> Hypergrad:
    """Implicit differentiation at the end of the inner loop (iMAML; Rajeswaran et al. 2019, Lorraine et al. 2020).

    Where the inner gradient vanishes, the fast weights are a function of the meta-parameters, and the derivative of
    this function does not depend on the trajectory. Let `H` be the Hessian of the inner loss at this point. The
    estimator solves `(H + ridge I) v = d outer_loss / d params` with Hessian-vector products. The hypergradient is the
    direct gradient of the outer loss with respect to the meta-parameters, minus the product of `v` with the mixed
    second derivative of the inner loss. Memory does not depend on the number of inner steps. All products use the
    inner loss of the last step, with one draw of its key.

    The hypergradient does not depend on the start, the rule and the length of the inner loop: a meta-parameter that
    only enters there receives no gradient. A proximal term in the inner loss makes its solution depend on the start of
    MAML. With `adapts=`, the parameters that do not adapt enter the inner loss anyway.

    Args:
      solver: "cg" (conjugate gradients, for a positive definite Hessian), "neumann" (a series, whose first `steps`
        terms are the gradient through `steps` more steps of gradient descent at `rate`) or "gmres" (also for an
        indefinite Hessian, at the memory of `steps` more copies of the fast weights).
      steps: maximum number of Hessian-vector products.
      tol: relative residual at which "cg" and "neumann" stop; "gmres" always takes all steps.
      ridge: added to the diagonal of the Hessian.
      rate: step size of "neumann", below 2 divided by the largest eigenvalue, or the series diverges.
      max_residual: if the relative residual is larger, the gradient is NaN, so that a training loop stops or
        `optax.apply_if_finite` skips the step; None accepts any residual.

    Returns:
      A `Hypergrad`. Its `aux.metrics` have two more scalars: `solver_residual`, the norm of the residual of the system
      divided by the norm of its right-hand side, and `inner_grad_norm`, the norm of the inner gradient at the end. The
      system is solved in float32 or higher precision.

    Raises:
      ValueError: an argument is invalid, or (when used) a case of the table is refused.

    | case | result |
    |---|---|
    | the inner loop has not converged | biased; `inner_grad_norm` measures the distance from convergence |
    | the solver has not converged | `solver_residual` shows it, see `max_residual` |
    | the Hessian is not positive definite | "cg" stops at the first direction that shows it and returns its solution |
    | zero inner steps | the same formula at the start |
    | no kept support example | finite |
    | no kept query example | zero, with residual zero |
    | NaN inside the inner loop | loss, gradient and residual are NaN |
    | a learner without an inner problem | refused |
    | an inner loss that does not depend on the trained parameters | refused: the gradient would silently be zero |
    | a stream | the inner loss is that of the last step's data |
    | a carry, or an objective of inner losses | refused |

    Source: Rajeswaran et al. 2019, Meta-Learning with Implicit Gradients, arXiv:1909.04630; Lorraine, Vicol and
    Duvenaud 2020, Optimizing Millions of Hyperparameters by Implicit Differentiation, arXiv:1911.02590.

    >>> import jax, jax.numpy as jnp, optax, metajax
    >>> model = metajax.Model(lambda key, x: jnp.zeros([3, 1]), lambda w, x: x @ w)
    >>> learner = metajax.learners.maml(
    ...     model, optax.sgd(0.5), 20, proximal=1.0, loss=metajax.core.squared_error)
    >>> examples = metajax.Examples(jnp.eye(3), jnp.ones([3, 1]), jnp.ones(3, bool))
    >>> fn = jax.jit(metajax.hypergrad.value_and_grad(learner, metajax.hypergrad.implicit()))
    >>> (loss, aux), grads = fn(jnp.zeros([3, 1]), metajax.Episode(examples, examples))
    >>> [bool(aux.metrics[name] < 1e-5) for name in ("solver_residual", "inner_grad_norm")]
    [True, True]
    """
    _validate.one_of("solver", solver, ("cg", "neumann", "gmres"))
    _validate.positive_int("steps", steps)
    _validate.non_negative_float("tol", tol)
    _validate.non_negative_float("ridge", ridge)
    if max_residual is not None:
        _validate.positive_float("max_residual", max_residual)
    if solver == "neumann":
        rate = _validate.positive_float("rate", rate)
    elif rate is not None:
        raise ValueError(f'rate must be None except with solver="neumann", got {rate!r} with {solver!r}')

    def solve(product: Product, target: Params) -> Params:
        if solver == "gmres":
            return _gmres(product, target, steps)
        if solver == "cg":
            return _conjugate_gradients(product, target, steps, tol)
        return _neumann(product, target, steps, tol, rate)

    def value_and_grad(
        learner: Learner, meta_params: Params, state: Any, episode: Episode, *, key: Any = None, frozen: Params = None
    ) -> tuple[Any, Params, Any]:
        problem = inner_problem("implicit()", learner)
        query_only("implicit()", learner)
        no_carry("implicit()", problem)
        keys, full = _keys.of_task(key), _tree.fill(meta_params, frozen)
        result = _inner.unroll(problem, meta_params, episode.support, key=keys.adapt, frozen=frozen)
        adapt_keys, outer_key = _keys.of_adaptation(keys.adapt), _keys.fold(keys.outer, problem.num_steps)
        support = _inner.without_padding(episode.support)
        context, pull_back = context_and_pullback(problem, meta_params, frozen, support, adapt_keys)
        shared = (meta_params, context)

        def arguments_of(meta_params: Params, context: Any) -> _inner.Arguments:
            return _inner.Arguments(meta_params, frozen, support, adapt_keys.step, context)

        def outer(params: Params, shared: Any) -> tuple[jax.Array, Aux]:
            arguments = arguments_of(*shared)
            adapted = _inner.finalize(problem, params, (), arguments, adapt_keys, problem.num_steps)
            return judge(learner, adapted, arguments.full, episode, outer_key, result.losses)

        value_and_slopes = jax.value_and_grad(outer, argnums=(0, 1), has_aux=True)
        (loss, aux), (slope, direct) = value_and_slopes(result.params, shared)
        steps = _inner.steps_of(problem, full, support, adapt_keys, max(problem.num_steps, 1))
        last = max(problem.num_steps - 1, 0)

        def inner_loss(params: Params, shared: Any) -> jax.Array:
            here = _inner.InnerState(params, None, jnp.asarray(last, jnp.int32))
            inputs = jax.tree.map(lambda leaf: leaf[last], steps)
            return _inner.step_loss(problem)(*_inner.loss_inputs(here, arguments_of(*shared), inputs))[0]

        def inner_slope(params: Params, argnum: int) -> Params:
            return jax.grad(inner_loss, argnums=argnum)(params, shared)

        def along(function: Product, vector: Params) -> Params:
            """Computes the derivative of a function of the fast weights along a vector, cast to their precision."""
            vector = jax.tree.map(lambda part, leaf: part.astype(leaf.dtype), vector, result.params)
            return jax.jvp(function, (result.params,), (vector,))[1]

        def product(vector: Params) -> Params:
            image = along(lambda params: inner_slope(params, 0), vector)
            return jax.tree.map(lambda part, leaf: part.astype(leaf.dtype) + ridge * leaf, image, vector)

        precision = jnp.result_type(jnp.float32, *jax.tree.leaves(slope))
        target = jax.tree.map(lambda leaf: leaf.astype(precision), slope)
        solution = solve(product, target)
        watched, reached = watch()
        mixed = along(lambda params: watched(inner_slope(params, 1)), solution)
        refuse_zero("implicit()", reached)
        of_meta_params, of_context = jax.tree.map(jnp.subtract, direct, mixed)
        grads = jax.tree.map(jnp.add, of_meta_params, pull_back(of_context))
        size = optax.tree.norm(target)
        left = optax.tree.norm(optax.tree.sub(target, product(solution)))
        residual = left / jnp.where(size == 0, 1, size)
        if max_residual is not None:
            grads = jax.tree.map(lambda leaf: jnp.where(residual <= max_residual, leaf, jnp.nan), grads)
        size = optax.tree.norm(inner_slope(result.params, 0))
        return (loss, with_inner_loss(aux, solver_residual=residual, inner_grad_norm=size)), grads, state

    return stateless(value_and_grad)


class _Progress(NamedTuple):
    """State of a solver; `going` is False if no further step can be taken."""

    step: jax.Array
    solution: Params
    residual: Params
    direction: Params
    going: jax.Array


def _rounding(value: jax.Array) -> float:
    """Returns the relative size below which a value is rounding error."""
    return 10 * float(jnp.finfo(value.dtype).eps)


def _iterate(improve: Callable[[_Progress], _Progress], target: Params, steps: int, tol: float) -> Params:
    """Iterates from zero until the relative residual is at most `tol`, for at most `steps` steps."""
    limit = tol * optax.tree.norm(target)

    def unsolved(now: _Progress) -> jax.Array:
        # ~(<=) instead of (>): the loop must continue on NaN, so that the NaN reaches the result
        return (now.step < steps) & now.going & ~(optax.tree.norm(now.residual) <= limit)

    zeros = jax.tree.map(jnp.zeros_like, target)
    start = _Progress(jnp.zeros([], jnp.int32), zeros, target, target, jnp.ones([], bool))
    return jax.lax.while_loop(unsolved, improve, _tree.vary(start, _tree.varying_axes(target))).solution


def _conjugate_gradients(product: Product, target: Params, steps: int, tol: float) -> Params:
    """Hestenes and Stiefel's method; stops at a direction without positive curvature, like truncated Newton methods."""

    def improve(now: _Progress) -> _Progress:
        image = product(now.direction)
        squared, curvature = optax.tree.vdot(now.residual, now.residual), optax.tree.vdot(now.direction, image)
        # relative to both norms, because the sign of a curvature below rounding error has no meaning
        going = ~(curvature <= _rounding(curvature) * optax.tree.norm(now.direction) * optax.tree.norm(image))
        length = jnp.where(going, squared / curvature, 0)
        residual = optax.tree.add_scale(now.residual, -length, image)
        ratio = optax.tree.vdot(residual, residual) / squared
        solution = optax.tree.add_scale(now.solution, length, now.direction)
        return _Progress(now.step + 1, solution, residual, optax.tree.add_scale(residual, ratio, now.direction), going)

    return _iterate(improve, target, steps, tol)


def _neumann(product: Product, target: Params, steps: int, tol: float, rate: Any) -> Params:
    """`rate * sum_k (I - rate A)^k target`, whose next term is `rate` times the residual."""

    def improve(now: _Progress) -> _Progress:
        solution = optax.tree.add_scale(now.solution, rate, now.residual)
        residual = optax.tree.add_scale(now.residual, -rate, product(now.residual))
        return now._replace(step=now.step + 1, solution=solution, residual=residual)

    return _iterate(improve, target, steps, tol)


def _gmres(product: Product, target: Params, steps: int) -> Params:
    """Saad and Schultz's method: finds the smallest residual in the Krylov space of `steps` products.

    Used because `jax.scipy.sparse.linalg.gmres` returns NaN for a singular matrix and does not run under `shard_map`.
    """
    size, highest = optax.tree.norm(target), jax.lax.Precision.HIGHEST

    def overlaps(basis: Params, vector: Params) -> jax.Array:
        dots = jax.tree.map(lambda rows, leaf: jnp.tensordot(rows, leaf, leaf.ndim, precision=highest), basis, vector)
        return sum(jax.tree.leaves(dots))  # type: ignore[return-value]

    def combine(weights: jax.Array, basis: Params) -> Params:
        return jax.tree.map(lambda rows: jnp.tensordot(weights, rows, 1, precision=highest), basis)

    def unit(vector: Params, length: jax.Array) -> Params:
        return jax.tree.map(lambda leaf: jnp.where(length == 0, 0, leaf / length), vector)

    def extend(index: jax.Array, carry: tuple[Params, jax.Array]) -> tuple[Params, jax.Array]:
        basis, table = carry
        image = product(jax.tree.map(lambda rows: rows[index], basis))
        before, column = optax.tree.norm(image), jnp.zeros_like(table[:, 0])
        for _ in range(2):  # a single pass loses orthogonality to rounding
            weights = overlaps(basis, image)
            image, column = optax.tree.sub(image, combine(weights, basis)), column + weights
        length = optax.tree.norm(image)
        # a vector of rounding errors is not a direction: the space is exhausted
        length = jnp.where(length <= _rounding(length) * before, 0, length)
        basis = jax.tree.map(lambda rows, leaf: rows.at[index + 1].set(leaf), basis, unit(image, length))
        return basis, table.at[:, index].set(column.at[index + 1].set(length))

    first = unit(target, size)
    basis = jax.tree.map(lambda leaf: jnp.zeros([steps + 1, *leaf.shape], leaf.dtype).at[0].set(leaf), first)
    start = (basis, jnp.zeros([steps + 1, steps], size.dtype))
    basis, table = jax.lax.fori_loop(0, steps, extend, _tree.vary(start, _tree.varying_axes(target)))
    weights = jnp.linalg.lstsq(table, jnp.zeros_like(table[:, 0]).at[0].set(size))[0]
    return combine(weights, jax.tree.map(lambda rows: rows[:-1], basis))
