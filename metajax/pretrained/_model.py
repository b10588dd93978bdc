"""A pretrained model as an ordinary `Model`: its initial parameters are the weights of a folder."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import jax.numpy as jnp

from metajax import models
from metajax.core import Dtype, Model, TaskType
from metajax.models import Remat
from metajax.pretrained import _load


def pretrained_model(
    path: str | os.PathLike[str],
    *,
    head: str | None = None,
    outputs: int | None = None,
    task: TaskType | None = None,
    dtype: Dtype = jnp.float32,
    remat: Remat = True,
    weights: bool = True,
) -> Model:
    """A model in the layout of Hugging Face whose `init` returns the weights of the folder.

    Args:
      path: the folder, as for `load_pretrained_model`.
      head: the kind of output, as for `load_pretrained_model`. None chooses it by the task type: token logits for
        next-token prediction, and for multiple choice if the model continues texts; the ends of a span; otherwise
        features.
      outputs: outputs of a new linear layer on top of features; None adds none. Ignored if the head is "tokens" or
        "span".
      task: the task type, None for features. For multiple choice the model scores the choices of a question.
      dtype: type of the parameters.
      remat: as for `load_pretrained_model`; "example" sends one question at a time through a model that scores choices.
      weights: False initialises at random, if only shapes are needed.

    Returns:
      A `Model`. Its `init(key, inputs)` makes a new head from the key.

    Raises:
      ValueError: as `load_pretrained_model`.

    >>> pretrained_model("no/such/folder")
    Traceback (most recent call last):
      ...
    ValueError: path must be a folder with a config.json, got 'no/such/folder'
    """
    folder = pathlib.Path(path)
    head = head_of(folder, head, task)
    tokens = _load.read_architecture(folder)[1].heads.get(head) in ("tokens", "span")
    choices = task is not None and "score" in task.heads
    one_by_one = choices and remat == "example"  # an example is a question; its choices go through a block together
    options: dict[str, Any] = {
        "head": head, "outputs": None if tokens else outputs, "dtype": dtype, "remat": True if one_by_one else remat,
    }  # fmt: skip
    model = _load.open_model(folder, **options)[2]
    if weights:
        model = model._replace(init=lambda key, inputs: _load.load_pretrained_model(folder, key=key, **options).params)
    return models.score_choices(model, remat=one_by_one) if choices else model


def head_of(path: str | os.PathLike[str], head: str | None, task: TaskType | None) -> str:
    """Returns the head of a pretrained model that serves a task type, if `head` is None.

    Raises:
      ValueError: the model has no such head.

    >>> head_of("no/such/folder", "mean", None)
    'mean'
    """
    if head is not None:
        return head
    folder = pathlib.Path(path)
    architecture = _load.read_architecture(folder)[1]
    for kind in ("span", "tokens"):
        if task is None or kind not in task.heads:
            continue
        serving = next((name for name, made in architecture.heads.items() if made == kind), None)
        if serving is not None:
            return serving
        if "score" not in task.heads:
            raise ValueError(f"path must hold a model with a head for {task.name}, got {str(path)!r} without one")
    # the features of a decoder are not its first head
    return _load.default_head(folder, architecture, 1)
