"""Functions that estimators of different families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero

from metajax.core import _inner, _tree
from metajax.core._keys import AdaptationKeys
from metajax.core._types import Aux, Episode, Examples, Hypergrad, InnerProblem, Learner, Params


def stateless(value_and_grad: Callable[..., tuple[Any, Params, Any]]) -> Hypergrad:
    """Returns an estimator that keeps no state between outer steps."""

    def init(learner: Learner, meta_params: Params, episode: Episode, key: Any, *, frozen: Params = None) -> tuple[()]:
        del learner, meta_params, episode, key, frozen
        return ()

    return Hypergrad(init, value_and_grad)


def inner_problem(name: str, learner: Learner) -> InnerProblem:
    """Returns the inner problem of a learner; raises a ValueError if it has none."""
    if learner.problem is None:
        raise ValueError(f"hypergrad: {name} needs a learner with an inner problem, got problem=None")
    return learner.problem


def with_inner_loss(aux: Aux, **more: jax.Array) -> Aux:
    """Adds the inner losses of a loop, and further measurements of an estimator, to the metrics of an `Aux`."""
    losses = {} if aux.inner_losses is None else {"inner_loss": aux.inner_losses.values}
    return aux._replace(metrics={**aux.metrics, **losses, **more})


def query_only(name: str, learner: Learner) -> None:
    """Raises a ValueError for an objective of inner losses, which the estimator cannot differentiate."""
    if learner.objective != "query":
        raise ValueError(
            f"hypergrad: {name} needs an objective of the query set, got {learner.objective!r}, whose inner losses it "
            "does not differentiate: take mixed_mode(), unrolled(), forward_mode(), truncated() or first_order()"
        )


def no_carry(name: str, problem: InnerProblem) -> None:
    """Raises a ValueError for an inner problem with a carry: it has no fixed point, because each step changes it."""
    if problem.carry is not None:
        raise ValueError(f"hypergrad: {name} needs an inner problem without a carry, which has no solution to stand at")


def context_and_pullback(
    problem: InnerProblem, meta_params: Params, frozen: Params, support: Examples, keys: AdaptationKeys
) -> tuple[Any, Callable[[Any], Params]]:
    """Returns the context of a task, and the pullback from its cotangent to the meta-parameters."""
    context, pull_back = jax.vjp(
        lambda meta_params: _inner.context_of(problem, _tree.fill(meta_params, frozen), support, keys), meta_params
    )
    return context, lambda of_context: pull_back(of_context)[0]


def watch() -> tuple[Callable[[Any], Any], list[bool]]:
    """Returns an identity function and a list; differentiating the identity at a non-constant argument adds an entry.

    Constants are known while tracing: a derivative that is zero by construction has no tangent.
    """
    reached: list[bool] = []

    @jax.custom_jvp
    def watched(tree: Any) -> Any:
        return tree

    def rule(primals: Any, tangents: Any) -> tuple[Any, Any]:
        is_zero = lambda leaf: isinstance(leaf, SymbolicZero)  # noqa: E731
        if not all(is_zero(leaf) for leaf in jax.tree.leaves(tangents, is_leaf=is_zero)):
            reached.append(True)
        return primals[0], tangents[0]

    watched.defjvp(rule, symbolic_zeros=True)
    return watched, reached


def refuse_zero(name: str, reached: list[bool]) -> None:
    """Raises a ValueError if a product is zero by construction."""
    if not reached:
        raise ValueError(
            f"hypergrad: {name} would be zero, because the inner loss does not depend on the meta-parameters that are "
            "trained (a start that adapts does not count): give the learner a proximal= term, or take another estimator"
        )
