"""metajax: meta-learning in JAX. See the README for a tour."""

from metajax import hypergrad, learners, models, training
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
    inner_init,
    inner_update,
)
from metajax.training import outer_update
