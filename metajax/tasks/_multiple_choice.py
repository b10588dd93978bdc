"""Multiple choice: predicts which choice of a question is correct."""

from __future__ import annotations

from metajax.core import Metric, TaskType, cross_entropy
from metajax.core._losses import hits
from metajax.tasks._classification import counted

# outputs are scores of the choices [n, choices]; targets [n] are indices of the correct ones, negative targets are
# ignored. A model scores a choice by one number, or by the logits of its tokens.
multiple_choice = TaskType(
    "multiple choice", cross_entropy, Metric("accuracy", hits), counted, lambda examples: 1, ("tokens", "score")
)
