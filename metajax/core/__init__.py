"""The contract, the inner loop, and the masks and losses that everything shares."""

from metajax.core._bilevel import bilevel
from metajax.core._inner import InnerState, inner_init, inner_update
from metajax.core._losses import accuracy, cross_entropy, span_cross_entropy, squared_error
from metajax.core._types import (
    Episode,
    Examples,
    Hypergrad,
    InnerProblem,
    Learner,
    MetaState,
    Model,
    OuterUpdate,
)

__all__ = [
    "Episode",
    "Examples",
    "Hypergrad",
    "InnerProblem",
    "InnerState",
    "Learner",
    "MetaState",
    "Model",
    "OuterUpdate",
    "accuracy",
    "bilevel",
    "cross_entropy",
    "inner_init",
    "inner_update",
    "span_cross_entropy",
    "squared_error",
]
