"""Learners, one family a file."""

from metajax.learners._finetune import finetune, pretrain
from metajax.learners._maml import maml, reptile
from metajax.learners._metric import prototypical

__all__ = ["finetune", "maml", "pretrain", "prototypical", "reptile"]
