"""What estimators of different families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero

from metajax.core._types import Episode, Hypergrad, InnerProblem, Learner, Params


def stateless(value_and_grad: Callable[..., tuple[Any, Params, Any]]) -> Hypergrad:
    """An estimator that keeps nothing from one outer step to the next."""

    def init(learner: Learner, meta_params: Params, episode: Episode, key: Any) -> tuple[()]:
        del learner, meta_params, episode, key
        return ()

    return Hypergrad(init, value_and_grad)


def inner_problem(name: str, learner: Learner) -> InnerProblem:
    """The inner problem of a learner that must have one."""
    if learner.problem is None:
        raise ValueError(f"hypergrad: {name} needs a learner with an inner problem, got problem=None")
    return learner.problem


def watch() -> tuple[Callable[[Any], Any], list[bool]]:
    """An identity, and a list that gets an entry where it is differentiated and its argument is not constant.

    What is constant is known while tracing: a derivative that is zero by construction has no tangent at all.
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
    """Refuses a product that is zero by construction."""
    if not reached:
        raise ValueError(
            f"hypergrad: {name} would be zero, because the inner loss does not depend on the meta-parameters that are "
            "trained (a start that adapts does not count): give the learner a proximal= term, or take another estimator"
        )
