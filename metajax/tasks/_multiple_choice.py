"""Multiple choice: which of a question's choices is right."""

from __future__ import annotations

from metajax.core import Metric, TaskType, cross_entropy
from metajax.core._losses import hits
from metajax.tasks._classification import counted

# outputs are scores of the choices [n, choices]; targets [n] are places of the right ones, a negative one is left out.
# A model scores a choice by one number for it, or by the logits of its tokens.
multiple_choice = TaskType(
    "multiple choice", cross_entropy, Metric("accuracy", hits), counted, lambda examples: 1, ("tokens", "score")
)
