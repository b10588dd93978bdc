"""The contract, the inner loop, and the masks and losses that all packages share."""

from metajax.core._inner import InnerState, inner_init, inner_update
from metajax.core._losses import accuracy, cross_entropy, span_cross_entropy, squared_error
from metajax.core._objective import outer_objective
from metajax.core._tree import merge, split
from metajax.core._types import (
    Aux,
    Collected,
    Dtype,
    Episode,
    Examples,
    Features,
    Hypergrad,
    InnerLosses,
    InnerProblem,
    Learner,
    MetaState,
    Metric,
    Model,
    OuterUpdate,
    TaskType,
)

__all__ = [
    "Aux",
    "Collected",
    "Dtype",
    "Episode",
    "Examples",
    "Features",
    "Hypergrad",
    "InnerLosses",
    "InnerProblem",
    "InnerState",
    "Learner",
    "MetaState",
    "Metric",
    "Model",
    "OuterUpdate",
    "TaskType",
    "accuracy",
    "cross_entropy",
    "inner_init",
    "inner_update",
    "merge",
    "outer_objective",
    "span_cross_entropy",
    "split",
    "squared_error",
]
