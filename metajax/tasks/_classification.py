"""Classification: targets are labels of a task's classes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from metajax.core import Examples, Metric, TaskType, cross_entropy
from metajax.core._losses import hits, require_labels


def counted(targets: Any) -> jax.Array:
    """Returns `[n]` bools: True for examples with at least one non-negative target.

    >>> counted(jnp.array([[0, -1], [-1, -1]])).tolist()
    [True, False]
    """
    require_labels(targets)
    return jnp.any(jnp.asarray(targets) >= 0, axis=tuple(range(1, jnp.ndim(targets))))


def _num_classes(examples: Examples) -> int | None:
    return None if examples.class_mask is None else int(examples.class_mask.shape[-1])


# outputs are logits [n, ..., ways]; targets [n, ...] are integers below `ways`, negative targets are ignored
classification = TaskType(
    "classification", cross_entropy, Metric("accuracy", hits), counted, _num_classes, classes=True
)
