"""Task types: how outputs are scored and which targets count, one file each."""

from metajax.tasks._classification import classification
from metajax.tasks._lookup import ALL, of, require_same, resolve
from metajax.tasks._multiple_choice import multiple_choice
from metajax.tasks._next_token import next_token_prediction
from metajax.tasks._regression import regression
from metajax.tasks._spans import spans

__all__ = [
    "ALL",
    "classification",
    "multiple_choice",
    "next_token_prediction",
    "of",
    "regression",
    "require_same",
    "resolve",
    "spans",
]
