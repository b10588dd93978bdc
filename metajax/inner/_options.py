"""Functions that the rules share: checks of arguments and the mean of gradients."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax


def in_unit_interval(name: str, value: Any) -> Any:
    """Returns `value` if it is a number in [0, 1), or an array.

    >>> in_unit_interval("b1", 0.9)
    0.9
    """
    return _checked(name, value, "a number of at least 0 and below 1", lambda x: 0 <= x < 1)


def positive(name: str, value: Any) -> Any:
    """Returns `value` if it is a finite number above 0, or an array.

    >>> positive("eps", 1e-8)
    1e-08
    """
    return _checked(name, value, "a finite number above 0", lambda x: x > 0)


def non_negative(name: str, value: Any) -> Any:
    """Returns `value` if it is a finite number of at least 0, or an array.

    >>> non_negative("weight_decay", 0.0)
    0.0
    """
    return _checked(name, value, "a finite number of at least 0", lambda x: x >= 0)


def learning_rate(name: str, value: Any) -> Any:
    """Returns `value` if it is a finite number of at least 0, a schedule, or an array.

    >>> learning_rate("rate", 0.1)
    0.1
    """
    return value if callable(value) else non_negative(name, value)


def _checked(name: str, value: Any, accepted: str, test: Callable[[float], bool]) -> Any:
    if isinstance(value, jax.Array | np.ndarray):  # it may be a meta-parameter, whose value is not known yet
        return value
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not test(value):
        raise ValueError(f"{name} must be {accepted}, or an array, got {value!r}")
    return value


def corrected_mean(grads: Any, mean: Any, decay: Any, count: jax.Array, nesterov: bool) -> Any:
    """Returns the bias-corrected running mean of gradients, one step ahead with `nesterov`."""
    if not nesterov:
        return optax.tree.bias_correction(mean, decay, count)
    ahead = optax.tree.bias_correction(mean, decay, optax.safe_increment(count))
    now = optax.tree.bias_correction(grads, decay, count)
    return jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, ahead, now)
