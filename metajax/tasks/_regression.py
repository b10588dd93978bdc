"""Regression: targets are numbers that the outputs predict."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from metajax.core import Examples, Metric, TaskType, squared_error


def every(targets: Any) -> jax.Array:
    """Returns `[n]` True: every example counts, even if a target is a negative integer.

    >>> every(jnp.array([3, -1])).tolist()
    [True, True]
    """
    return jnp.ones(jax.tree.leaves(targets)[0].shape[:1], bool)


def _size(examples: Examples) -> int | None:
    return int(examples.targets[0].size)


# outputs and targets are numbers of the same shape [n, ...]
regression = TaskType(
    "regression", squared_error, Metric("mse", squared_error, higher_is_better=False, percent=False), every, _size
)
