"""Learners. Each file holds one family."""

from metajax.learners._bayesian import bayesian
from metajax.learners._bilevel import bilevel
from metajax.learners._contrastive import contrastive, random_view
from metajax.learners._finetune import finetune, pretrain
from metajax.learners._forward import Adapted
from metajax.learners._in_context import in_context
from metajax.learners._maml import maml, reptile
from metajax.learners._matching import matching
from metajax.learners._meta_sgd import meta_sgd
from metajax.learners._metric import prototypical
from metajax.learners._proto_maml import proto_maml
from metajax.learners._recurrent import Cell, recurrent

__all__ = [
    "Adapted",
    "Cell",
    "bayesian",
    "bilevel",
    "contrastive",
    "finetune",
    "in_context",
    "maml",
    "matching",
    "meta_sgd",
    "pretrain",
    "proto_maml",
    "prototypical",
    "random_view",
    "recurrent",
    "reptile",
]
