"""Validators of arguments: they raise a `ValueError` with the name, the value and the accepted values."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

from metajax.core._types import InnerProblem, Learner


def positive_int(name: str, value: Any) -> int:
    """Returns `value` if it is an integer of at least 1.

    >>> positive_int("ways", 5)
    5
    """
    return int_at_least(name, value, 1)


def int_at_least(name: str, value: Any, minimum: int) -> int:
    """Returns `value` if it is an integer of at least `minimum`.

    >>> int_at_least("start", 0, 0)
    0
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return int(value)


def positive_float(name: str, value: Any) -> float:
    """Returns `value` if it is a finite number above 0.

    >>> positive_float("rate", 0.4)
    0.4
    """
    return _real(name, value, "a finite number above 0", lambda x: x > 0)


def non_negative_float(name: str, value: Any) -> float:
    """Returns `value` if it is a finite number of at least 0.

    >>> non_negative_float("proximal", 0)
    0.0
    """
    return _real(name, value, "a finite number of at least 0", lambda x: x >= 0)


def fraction(name: str, value: Any) -> float:
    """Returns `value` if it is a number from 0 to 1.

    >>> fraction("hazard", 1)
    1.0
    """
    return _real(name, value, "a number from 0 to 1", lambda x: 0 <= x <= 1)


def below_one(name: str, value: Any) -> float:
    """Returns `value` if it is a number of at least 0 and below 1.

    >>> below_one("decay", 0.9)
    0.9
    """
    return _real(name, value, "a number of at least 0 and below 1", lambda x: 0 <= x < 1)


def _real(name: str, value: Any, accepted: str, test: Any) -> float:
    ok = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not ok or not math.isfinite(value) or not test(value):
        raise ValueError(f"{name} must be {accepted}, got {value!r}")
    return float(value)


def instance(name: str, value: Any, kind: type) -> Any:
    """Returns `value` if it is of type `kind`.

    >>> instance("ways", 5, int)
    5
    """
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
    return value


def one_of(name: str, value: Any, accepted: Sequence[Any]) -> Any:
    """Returns `value` if it is one of `accepted`.

    >>> one_of("split", "test", ("train", "val", "test"))
    'test'
    """
    if value not in accepted:
        listed = ", ".join(repr(item) for item in accepted)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")
    return value


def learner(value: Any, parts: Sequence[str] = ("adapt", "predict", "outer_loss")) -> Any:
    """Returns `value` if it is a learner with all required parts.

    >>> import metajax
    >>> learner(metajax.learners.prototypical(metajax.models.mlp(4))).problem is None
    True
    """
    instance("learner", value, Learner)
    for name in parts:
        _function(f"learner.{name}", getattr(value, name))
    one_of("learner.objective", value.objective, ("query", "prequential", "both"))
    if value.problem is None:
        if value.objective != "query":
            raise ValueError(
                f"learner.objective must be 'query' for a learner without an inner problem, got {value.objective!r}"
            )
        return value
    instance("learner.problem", value.problem, InnerProblem)
    for name in ("init", "loss", "optimizer", "finalize"):
        _function(f"learner.problem.{name}", getattr(value.problem, name))
    for name in ("stream", "context", "carry"):
        if getattr(value.problem, name) is not None:
            _function(f"learner.problem.{name}", getattr(value.problem, name), " or None")
    int_at_least("learner.problem.num_steps", value.problem.num_steps, 0)
    return value


def _function(name: str, value: Any, more: str = "") -> None:
    if not callable(value):
        raise ValueError(f"{name} must be a function{more}, got {value!r}")
