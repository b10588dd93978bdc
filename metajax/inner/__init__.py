"""Inner update rules whose gradients stay finite where an inner gradient is zero.

Use the rules of optax directly if this package has no rule of that name: SGD with or without momentum, weight decay,
schedules, clipping by value, Adagrad and RMSprop with `eps` in the root.
"""

from metajax.inner._adaptive import adam, adamw, rmsprop
from metajax.inner._clipping import clip_by_global_norm
from metajax.inner._muon import muon

__all__ = ["adam", "adamw", "clip_by_global_norm", "muon", "rmsprop"]
