"""Pretrained models that become better at new tasks with every task, and classifiers of a task from a few examples."""

from metajax.adaptation._estimator import FewShotClassifier
from metajax.adaptation._fast import FastModel, fast_adapt_model
from metajax.adaptation._meta import MetaTrainedModel, adapt_model

__all__ = ["FastModel", "FewShotClassifier", "MetaTrainedModel", "adapt_model", "fast_adapt_model"]
