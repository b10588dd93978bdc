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
    training,
)
from metajax.adaptation import FewShotClassifier, adapt_model, fast_adapt_model
from metajax.core import (
    Episode,
    Examples,
    Hypergrad,
    InnerProblem,
    InnerState,
    Learner,
    MetaState,
    Model,
    OuterUpdate,
    bilevel,
    inner_init,
    inner_update,
)
from metajax.pretrained import load_pretrained_model, save_pretrained_model
from metajax.training import load_run, outer_update

__all__ = [
    "Episode",
    "Examples",
    "FewShotClassifier",
    "Hypergrad",
    "InnerProblem",
    "InnerState",
    "Learner",
    "MetaState",
    "Model",
    "OuterUpdate",
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
    "strategies",
    "training",
]
