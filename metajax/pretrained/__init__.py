"""Pretrained weights: loads folders in the layout of Hugging Face as a `Model` with parameters, and saves them."""

from metajax.pretrained._features import features
from metajax.pretrained._load import (
    PretrainedModel,
    Report,
    load_pretrained_model,
    open_model,
    read_architecture,
    read_preprocessor,
    read_tokenizer,
    tasks_of,
)
from metajax.pretrained._model import head_of, pretrained_model
from metajax.pretrained._save import FILES, named, save_pretrained_model, whole_folder

__all__ = [
    "FILES",
    "PretrainedModel",
    "Report",
    "features",
    "head_of",
    "load_pretrained_model",
    "named",
    "open_model",
    "pretrained_model",
    "read_architecture",
    "read_preprocessor",
    "read_tokenizer",
    "save_pretrained_model",
    "tasks_of",
    "whole_folder",
]
