"""Learners, one family a file."""

from metajax.learners._bayesian import bayesian
from metajax.learners._finetune import finetune, pretrain
from metajax.learners._in_context import in_context
from metajax.learners._maml import maml, reptile
from metajax.learners._meta_sgd import meta_sgd
from metajax.learners._metric import prototypical

__all__ = ["bayesian", "finetune", "in_context", "maml", "meta_sgd", "pretrain", "prototypical", "reptile"]
