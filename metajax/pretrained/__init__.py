"""Pretrained weights: from folders in the layout of Hugging Face to a `Model` and its parameters, and back."""

from metajax.pretrained._features import features
from metajax.pretrained._load import PretrainedModel, Report, load_pretrained_model, open_model, read_architecture
from metajax.pretrained._save import save_pretrained_model

__all__ = [
    "PretrainedModel",
    "Report",
    "features",
    "load_pretrained_model",
    "open_model",
    "read_architecture",
    "save_pretrained_model",
]
