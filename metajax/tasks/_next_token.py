"""Next-token prediction: each position of a text predicts the next token."""

from __future__ import annotations

from metajax.core import Metric, TaskType, cross_entropy
from metajax.core._losses import hits
from metajax.tasks._classification import counted

# outputs are logits [n, length, vocabulary]; targets [n, length] are tokens, negative targets are ignored
next_token_prediction = TaskType(
    "next-token prediction", cross_entropy, Metric("accuracy", hits), counted, lambda examples: None, ("tokens",)
)
