"""metajax: meta-learning in JAX.

A learner adapts to a task, an estimator differentiates through that, and `outer_update` takes the meta step. All
three are pure functions in NamedTuples, written for one task.
"""

from metajax import (
    adaptation,
    adapters,
    data,
    evaluation,
    hypergrad,
    inner,
    learners,
    models,
    parallel,
    pretrained,
    strategies,
    tasks,
    training,
)
from metajax.adaptation import FewShotClassifier, adapt_model, fast_adapt_model
from metajax.core import (
    Aux,
    Collected,
    Episode,
    Examples,
    Hypergrad,
    InnerLosses,
    InnerProblem,
    InnerState,
    Learner,
    MetaState,
    Metric,
    Model,
    OuterUpdate,
    TaskType,
    bilevel,
    inner_init,
    inner_update,
)
from metajax.pretrained import load_pretrained_model, save_pretrained_model
from metajax.strategies import select
from metajax.training import load_run, outer_update

__all__ = [
    "Aux",
    "Collected",
    "Episode",
    "Examples",
    "FewShotClassifier",
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
    "adapt_model",
    "adaptation",
    "adapters",
    "bilevel",
    "data",
    "evaluation",
    "fast_adapt_model",
    "hypergrad",
    "inner",
    "inner_init",
    "inner_update",
    "learners",
    "load_pretrained_model",
    "load_run",
    "models",
    "outer_update",
    "parallel",
    "pretrained",
    "save_pretrained_model",
    "select",
    "strategies",
    "tasks",
    "training",
]
