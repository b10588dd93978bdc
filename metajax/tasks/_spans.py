"""Spans: the first and the last token of an answer in a text (extractive question answering)."""

from __future__ import annotations

from typing import Any

import jax

from metajax.core import Metric, TaskType, span_cross_entropy
from metajax.core._losses import by_end, hits
from metajax.tasks._classification import counted


def _ends(outputs: Any, targets: Any) -> jax.Array:
    """Returns the fraction of the two ends that are correct."""
    return hits(by_end(outputs, targets), targets)


# outputs are logits [n, length, 2]: each token as the first and as the last token; targets [n, 2] are positions,
# negative targets are ignored. metajax.evaluation scores the texts of answers.
spans = TaskType("spans", span_cross_entropy, Metric("accuracy", _ends), counted, lambda examples: None, ("span",))
