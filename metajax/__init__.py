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
    online,
    parallel,
    pretrained,
    replay,
    run,
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
    inner_init,
    inner_update,
)
from metajax.pretrained import load_pretrained_model, save_pretrained_model
from metajax.run import load_run, select
from metajax.training import outer_update

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
    "online",
    "outer_update",
    "parallel",
    "pretrained",
    "replay",
    "run",
    "save_pretrained_model",
    "select",
    "tasks",
    "training",
]
