"""Adapts pretrained models: meta-trains them over tasks, and makes few-shot classifiers from them."""

from metajax.adaptation._estimator import FewShotClassifier
from metajax.adaptation._fast import FastModel, fast_adapt_model
from metajax.adaptation._meta import MetaTrainedModel, adapt_model

__all__ = ["FastModel", "FewShotClassifier", "MetaTrainedModel", "adapt_model", "fast_adapt_model"]
