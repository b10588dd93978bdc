"""Checks of exact estimators: they reject update rules that they cannot differentiate."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metajax.core import _inner, _keys, _tree, _validate
from metajax.core._types import Episode, Examples, Hypergrad, InnerProblem, Learner, Params


class _Outcome(NamedTuple):
    """Result of one update by an inner gradient, as NumPy arrays."""

    params: Any
    integers: Any  # integers in the optimizer state
    slopes: Any  # derivatives of the new parameters along a direction, with respect to the gradient and the parameters


# for each function that makes a rule: the parameter shapes for which the rule was accepted
_passed: weakref.WeakKeyDictionary[Callable[..., Any], set[Any]] = weakref.WeakKeyDictionary()


def check_rule(problem: InnerProblem | None, meta_params: Params, support: Examples) -> None:
    """Raises a ValueError if an exact estimator cannot differentiate the update rule of an inner problem.

    The check differentiates one update at three inner gradients: an ordinary one, one with a zero in every parameter
    (dead inputs) and zero. It uses only the shapes of its arguments, so that these may be traced. Probe parameters
    have the value 0.5 and sides of at most 2, and only the first and the last parameter of each rank and dtype are
    probed. If the rule does not pass with these probes, all parameters are probed, and, if it does not run with these,
    their full shapes. A rule that was accepted is not checked again.

    Args:
      problem: the inner problem. Accepts None, rules that fail on the probes, and rules whose derivative at the probes
        is not finite even at an ordinary gradient, because the probes then give no information.
      meta_params: all meta-parameters, trained or not.
      support: the support set of a task.

    Raises:
      ValueError: the problem has no inner step; the derivative of the rule is not finite at a zero (`optax.adam`
        without `eps_root`); the derivative is zero everywhere although the update depends on the gradient
        (`optax.lion`); or the rule keeps integers that depend on the gradient.

    >>> import jax.numpy as jnp, optax, metajax
    >>> model = metajax.Model(lambda key, x: jnp.zeros([3, 2]), lambda w, x: x @ w)
    >>> support = metajax.Examples(jnp.eye(3), jnp.array([0, 1, 1]), jnp.ones(3, bool))
    >>> check_rule(metajax.learners.maml(model, metajax.inner.adam(0.1)).problem, jnp.zeros([3, 2]), support)
    """
    if problem is None:
        return
    _validate.positive_int("num_steps", problem.num_steps)
    shapes = jax.eval_shape(
        lambda meta_params: (_first_params(problem, meta_params, support), meta_params), meta_params
    )
    leaves, structure = jax.tree.flatten(shapes)
    seen = (structure, *((leaf.shape, leaf.dtype) for leaf in leaves))
    if seen in _passed.get(problem.optimizer, ()):
        return
    params, meta_params = shapes
    fault = None
    for tried, side in ((_first_and_last(params), 2), (params, 2), (params, None)):
        try:
            fault = _fault(*_outcomes(problem, tried, meta_params, side))
        except Exception:  # the probes do not fit, or the rule needs unknown values: the inner loop will raise then
            continue
        if fault is None or tried is params:
            break
    if fault is not None:
        raise ValueError(fault)
    _passed.setdefault(problem.optimizer, set()).add(seen)


def _first_params(problem: InnerProblem, meta_params: Params, support: Examples) -> Params:
    keys = _keys.of_adaptation(None)
    context = _inner.context_of(problem, meta_params, support, keys)
    return _inner.params_of(problem, meta_params, support, keys, context)


def checking(estimator: Hypergrad) -> Hypergrad:
    """Wraps an exact estimator: it first raises a ValueError if it cannot differentiate the update rule."""

    def value_and_grad(
        learner: Learner, meta_params: Params, state: Any, episode: Episode, *, key: Any = None, frozen: Params = None
    ) -> tuple[Any, Params, Any]:
        check_rule(learner.problem, _tree.fill(meta_params, frozen), episode.support)
        return estimator.value_and_grad(learner, meta_params, state, episode, key=key, frozen=frozen)

    return Hypergrad(estimator.init, value_and_grad)


def _fault(ordinary: _Outcome, dead: _Outcome, zero: _Outcome) -> str | None:
    """Returns an error message for a rule, None if the rule is accepted."""
    if not _all(np.isfinite, (ordinary.params, ordinary.slopes)):
        return None
    for outcome, where, how in (
        (dead, "one number of the inner gradient", "a dead input"),
        (zero, "the whole inner gradient", "a support set of padding"),
    ):
        if not _all(np.isfinite, (outcome.params, outcome.slopes)):
            return (
                f"inner must be a rule whose derivative is finite where {where} is zero, got one whose derivative is "
                f"not: {how} would make the hypergradient NaN. Take metajax.inner.adam, adamw, rmsprop, muon or "
                "clip_by_global_norm, or give a rule of optax a positive eps_root (or eps), such as eps_root=1e-8"
            )
    flat = all(_all(lambda leaf: leaf == 0, outcome.slopes[0]) for outcome in (ordinary, dead, zero))
    if flat and not _equal(ordinary.params, zero.params):
        return (
            "inner must be a rule that can be differentiated with respect to the inner gradient, got one whose "
            "derivative is zero, as of a sign: first_order() gives the same hypergradient for less"
        )
    if not _equal(ordinary.integers, zero.integers):
        return (
            "inner must be a rule whose state holds no integers that depend on the inner gradient, got one with such: "
            "no derivative passes through them"
        )
    return None


def _all(test: Callable[[Any], Any], tree: Any) -> bool:
    return all(np.all(test(leaf)) for leaf in jax.tree.leaves(tree))


def _equal(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


def _first_and_last(tree: Any) -> Any:
    """Keeps the first and the last leaf of each rank and dtype; replaces the others by None, which is not a leaf."""
    leaves, structure = jax.tree.flatten(tree)
    kinds = [(leaf.ndim, leaf.dtype) for leaf in leaves]
    last = {kind: index for index, kind in enumerate(kinds)}
    kept = {kinds.index(kind) for kind in last} | set(last.values())
    return jax.tree.unflatten(structure, [leaf if index in kept else None for index, leaf in enumerate(leaves)])


def _outcomes(problem: InnerProblem, params: Any, meta_params: Any, side: int | None) -> list[_Outcome]:
    """Computes one update at an ordinary gradient, at one with a zero in every parameter, and at zero."""
    rng = np.random.default_rng(0)

    def stand_in(leaf: Any) -> np.ndarray:
        shape = leaf.shape if side is None else [min(size, side) for size in leaf.shape]
        # 0.5 is a valid rate, decay or weight
        return np.full(shape, 0.5 if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0, leaf.dtype)

    def draw(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: np.asarray(rng.normal(size=leaf.shape), leaf.dtype), tree)

    params, meta_params = jax.tree.map(stand_in, (params, meta_params))
    arguments = _inner.Arguments(meta_params, None, None, None)  # type: ignore[arg-type]

    def update(grads: Params, params: Params) -> tuple[Params, Any]:
        state = problem.optimizer(meta_params).init(params)
        start = _inner.InnerState(params, state, jnp.zeros([], jnp.int32))
        end = _inner.apply_gradient(problem, start, grads, jnp.ones([]), (), arguments)
        return end.params, [leaf for leaf in jax.tree.leaves(end.opt_state) if _is_integer(leaf)]

    def differentiate(grads: Params, direction: Params) -> _Outcome:
        end, pull_back, integers = jax.vjp(update, grads, params, has_aux=True)
        return _Outcome(end, integers, pull_back(direction))

    ordinary, direction = draw(params), draw(params)
    dead, zero = (jax.tree.map(np.copy, ordinary) for _ in range(2))
    for leaf in jax.tree.leaves(dead):
        leaf[(0,) * leaf.ndim] = 0
    for leaf in jax.tree.leaves(zero):
        leaf[...] = 0
    with jax.ensure_compile_time_eval(), jax.debug_nans(False):  # concrete numbers, even if the caller is traced
        # the arrays are small, so compilation takes most of the time
        run = jax.jit(differentiate, compiler_options={"xla_backend_optimization_level": 0})
        return [jax.tree.map(np.asarray, run(grads, direction)) for grads in (ordinary, dead, zero)]


def _is_integer(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.integer) or leaf.dtype == bool
