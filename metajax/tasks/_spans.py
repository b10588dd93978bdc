"""Spans: the first and the last token of an answer in a text (extractive question answering)."""

from __future__ import annotations

from typing import Any

import jax

from metajax.core import Metric, TaskType, span_cross_entropy
from metajax.core._losses import by_end, hits
from metajax.tasks._classification import counted


def _ends(outputs: Any, targets: Any) -> jax.Array:
    """The fraction of the two ends that are right."""
    return hits(by_end(outputs, targets), targets)


# outputs are logits [n, length, 2], of each token to be the first and the last; targets [n, 2] are places, negative
# ones are left out. Texts of answers are scored by metajax.evaluation.
spans = TaskType("spans", span_cross_entropy, Metric("accuracy", _ends), counted, lambda examples: None, ("span",))
