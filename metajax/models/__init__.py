"""Networks as pure `Model`s, and wrappers that make one of a user's module.

Normalisation is an explicit policy: "batch" (statistics of the call: transductive), "support" (statistics of the
support set, reused for the query: inductive), "layer", "group" or "none".
"""

from metajax.models._choices import score_choices
from metajax.models._conv import conv4
from metajax.models._conv_ops import convolution, max_pool
from metajax.models._decoder import decoder
from metajax.models._encoder import encoder
from metajax.models._generate import generate
from metajax.models._hide import hide_tokens
from metajax.models._mlp import mlp
from metajax.models._precision import mixed_precision
from metajax.models._resnet import resnet12
from metajax.models._vit import vit
from metajax.models._wrap import from_linen, from_nnx

__all__ = [
    "conv4",
    "convolution",
    "decoder",
    "encoder",
    "from_linen",
    "from_nnx",
    "generate",
    "hide_tokens",
    "max_pool",
    "mixed_precision",
    "mlp",
    "resnet12",
    "score_choices",
    "vit",
]
