"""Networks as pure `Model`s, and wrappers that turn a user's module into one.

Normalisation is an explicit policy: "batch" (statistics of the call: transductive), "support" (statistics of the
support set, reused for the query: inductive), "layer", "group" or "none"."""

from metajax.models._blocks import Remat
from metajax.models._choices import score_choices
from metajax.models._conv import conv4
from metajax.models._conv_ops import convolution, max_pool
from metajax.models._decoder import decoder, last_kept
from metajax.models._encoder import encoder
from metajax.models._generate import continued, generate
from metajax.models._growth import Growth, deepen, grow_frozen, grow_state, stack_blocks, widen
from metajax.models._hide import hide_tokens
from metajax.models._mlp import mlp
from metajax.models._precision import mixed_precision
from metajax.models._progressive import progressive_column
from metajax.models._resnet import resnet12
from metajax.models._vit import vit
from metajax.models._wrap import as_floats, from_linen, from_nnx

__all__ = [
    "Growth",
    "Remat",
    "as_floats",
    "continued",
    "conv4",
    "convolution",
    "decoder",
    "deepen",
    "encoder",
    "from_linen",
    "from_nnx",
    "generate",
    "grow_frozen",
    "grow_state",
    "hide_tokens",
    "last_kept",
    "max_pool",
    "mixed_precision",
    "mlp",
    "progressive_column",
    "resnet12",
    "score_choices",
    "stack_blocks",
    "vit",
    "widen",
]
