"""What users call a task, as the arrays that a pretrained model takes."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from metajax.core._types import PyTree
from metajax.data._episodes import check_type
from metajax.data._image_folder import read_image_folder
from metajax.data._sources import ClassSource, Source
from metajax.data._text_files import a_text, read_rows, text_files
from metajax.pretrained import PretrainedModel

MAX_TOKENS = 128  # of a text; longer ones lose their ends
_LENGTHS = (8, 16, 32, 64, 128)
_COLUMNS = {"text": "text", "label": "label"}
_FORMS = (
    "a folder of CLASS/NAME.png, a file of texts, a pair (inputs, labels), or a source of metajax.data with classes"
)


class Labelled(NamedTuple):
    """The examples of a task.

    Attributes:
      inputs: what the model takes, leaves `[n, ...]` on the host; texts are padded to the length of the longest.
      labels: `[n]` places in `classes`.
      classes: texts or integers, sorted.
      name: of the task, for errors.
    """

    inputs: PyTree
    labels: np.ndarray
    classes: tuple[Any, ...]
    name: str


def lengths_of(base: PretrainedModel) -> tuple[int, ...]:
    """The static lengths of texts, so that a new text seldom means a new compilation."""
    most = min(base.max_length or MAX_TOKENS, MAX_TOKENS)
    return (*(length for length in _LENGTHS if length < most), most)


def read_inputs(base: PretrainedModel, inputs: Any, name: str = "inputs") -> PyTree:
    """Texts or images as the model takes them.

    Args:
      base: whose tokenizer or size of images counts.
      inputs: a list of texts (long ones are cut, with a warning) or uint8 images `[n, height, width, channels]`.
      name: of the argument, for errors.

    Raises:
      ValueError: something else, an empty text, an image of another size, or no example.
    """
    return _texts(base, inputs, name) if base.kind == "text" else _images(base, inputs, name)


def _texts(base: PretrainedModel, inputs: Any, name: str) -> PyTree:
    lengths = lengths_of(base)
    tokenizer = tokenizer_of(base, lengths[-1])
    if isinstance(inputs, str) or not isinstance(inputs, Sequence | np.ndarray) or not len(inputs):
        raise ValueError(f"{name} must be a list of one text or more, got {inputs!r}")
    for place, text in enumerate(inputs):
        if isinstance(text, Mapping):
            raise ValueError(
                f"{name} must be texts, got a dict at index {place}: questions with choices are for a model that "
                "scores them (head='tokens' of a decoder, or outputs=1)"
            )
        a_text(f"index {place} of {name}", text, "text")
    encodings = tokenizer.encode_batch_fast(list(inputs))
    ids = [encoding.ids for encoding in encodings]
    if not all(ids):
        raise ValueError(f"{name} must be texts with tokens, got {inputs[ids.index([])]!r} at index {ids.index([])}")
    if cut := sum(bool(encoding.overflowing) for encoding in encodings):
        warnings.warn(f"{cut} of {len(ids)} {name} have more than {lengths[-1]} tokens, and are cut", stacklevel=2)
    sizes = np.array([len(row) for row in ids])
    length = next(length for length in lengths if length >= sizes.max())
    tokens = np.zeros([len(ids), length], np.int32)
    for row, values in zip(tokens, ids, strict=True):
        row[: len(values)] = values
    return {"tokens": tokens, "mask": np.arange(length) < sizes[:, None]}


def tokenizer_of(base: PretrainedModel, length: int | None = None) -> Any:
    """The tokenizer of a model, which pads nothing, and cuts texts of more than `length` tokens alone.

    Raises:
      ValueError: the model has none.
    """
    if base.tokenizer is None:
        raise ValueError("model must have a tokenizer: its folder holds no tokenizer.json")
    return _limited(base.tokenizer, length)


@functools.lru_cache(maxsize=4)
def _limited(tokenizer: Any, length: int | None) -> Any:
    """A copy: that of the model is the user's."""
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.no_padding()  # it would count as words
    copy.no_truncation()
    if length is not None:
        copy.enable_truncation(length)
    return copy


def _images(base: PretrainedModel, inputs: Any, name: str) -> PyTree:
    images = np.asarray(inputs)
    if images.dtype != np.uint8 or images.shape[1:] != base.image or not len(images):
        raise ValueError(
            f"{name} must be uint8 images [n, {', '.join(map(str, base.image or ()))}], which the model takes, got "
            f"{images.dtype} of shape {images.shape}"
        )
    return images


def read_task(base: PretrainedModel, task: Any) -> Labelled:
    """The examples of a task.

    Raises:
      ValueError: `task` is no task, is of another kind than the model, or has one class only.
    """
    if isinstance(task, str | os.PathLike):
        labelled = _from_path(base, task)
    elif isinstance(task, tuple) and len(task) == 2:
        labelled = _from_pair(base, *task)
    elif isinstance(task, ClassSource):
        labelled = _from_source(base, task)
    else:
        raise ValueError(f"task must be {_FORMS}, got {task!r}")
    if len(labelled.classes) < 2:
        raise ValueError(f"task must have two classes at least, got {len(labelled.classes)} in {labelled.name}")
    return labelled


def _from_path(base: PretrainedModel, path: str | os.PathLike[str]) -> Labelled:
    name = os.fspath(path)
    if not os.path.exists(name):
        raise ValueError(f"task must be {_FORMS}, got {name!r}, which does not exist")
    folder = os.path.isdir(name) or name.lower().endswith(".zip")
    if folder != (base.kind == "image"):
        raise ValueError(f"task must be of {base.kind}s, which the model takes, got {name!r}")
    if not folder:
        rows = read_rows(text_files(name), _COLUMNS, None)
        return _from_pair(base, [row.text for row in rows], [row.label for row in rows], repr(name))
    assert base.image is not None
    height, width, channels = base.image
    found = read_image_folder(path, size=height if height == width else None, channels=channels)
    return Labelled(_images(base, found.images, f"task {name!r}"), found.labels, found.class_names, repr(name))


def _from_pair(base: PretrainedModel, inputs: Any, labels: Any, name: str = "the task") -> Labelled:
    read = read_inputs(base, inputs)
    classes, places = classes_of(labels, len(inputs))
    return Labelled(read, places, classes, name)


def classes_of(labels: Any, count: int) -> tuple[tuple[Any, ...], np.ndarray]:
    """The different labels in order, texts or integers, and the place of each example's.

    Raises:
      ValueError: labels are something else, or not `count`.

    >>> classes_of(["owl", "cat", "owl"], 3)
    (('cat', 'owl'), array([1, 0, 1]))
    """
    labels = list(labels)
    kinds = {type(label.item() if isinstance(label, np.generic) else label) for label in labels}
    if kinds not in ({str}, {int}):
        raise ValueError(f"labels must be all texts or all integers, got {', '.join(k.__name__ for k in kinds)}")
    if len(labels) != count:
        raise ValueError(f"labels must be one for each of the {count} inputs, got {len(labels)}")
    labels = [label.item() if isinstance(label, np.generic) else label for label in labels]
    classes = tuple(sorted(set(labels)))  # not by NumPy, which rounds large integers and strips texts
    places = {label: place for place, label in enumerate(classes)}
    return classes, np.array([places[label] for label in labels], int)


def _from_source(base: PretrainedModel, source: ClassSource) -> Labelled:
    leaves = {"tokens", "mask"} if base.kind == "text" else None
    inputs = source.inputs
    if (set(inputs) if isinstance(inputs, dict) else None) != leaves or source.targets is not None:
        raise ValueError(f"task must be of {base.kind}s with a class each, which the model takes, got {source!r}")
    kept = np.flatnonzero(source.labels >= 0)
    inputs = jax.tree.map(lambda leaf: leaf.take(kept, axis=0), inputs)
    if base.kind == "image":
        inputs = _images(base, inputs, f"inputs of {source!r}")
    else:
        check_tokens(inputs, base, source)
        inputs = to_length(inputs, int(inputs["mask"].sum(axis=1).max()), base)
    return Labelled(inputs, source.labels[kept], source.class_names, repr(source))


def check_tokens(inputs: dict[str, np.ndarray], base: PretrainedModel, source: ClassSource) -> None:
    """Refuses tokens `[..., length]` of another tokenizer than the model's, and padding in front of one.

    Raises:
      ValueError: there are such.
    """
    tokens, mask = inputs["tokens"], inputs["mask"]
    if (mask[..., 1:] & ~mask[..., :-1]).any():
        raise ValueError(f"mask of {source!r} must be padding behind each text, got padding in front of a token")
    rows = base.params["embed"]["embedding"].shape[0]
    unknown = tokens[mask & ((tokens < 0) | (tokens >= rows))]
    if unknown.size:
        raise ValueError(f"tokens of {source!r} must be from 0 to {rows - 1}, got {unknown[0]}: of another tokenizer")


def to_length(inputs: PyTree, longest: int, base: PretrainedModel) -> PyTree:
    """Tokens `[..., length]` cut or filled up to the smallest static length that holds `longest`."""
    lengths = lengths_of(base)
    length = next((length for length in lengths if length >= longest), lengths[-1])

    def fit(leaf: np.ndarray) -> np.ndarray:
        padding = [(0, 0)] * (leaf.ndim - 1) + [(0, max(0, length - leaf.shape[-1]))]
        return np.pad(leaf[..., :length], padding)

    return jax.tree.map(fit, inputs)


def read_source(base: PretrainedModel, task: Any) -> Source:
    """A source of the episodes of a task. One of `metajax.data` that is no `ClassSource` is taken as it is.

    Raises:
      ValueError: as `read_task`.
    """
    if hasattr(task, "draw") and not isinstance(task, ClassSource):
        check_type(task)
        return task
    inputs, labels, classes, name = read_task(base, task)
    texts: dict[str, Any] = {}
    if base.kind == "text":
        lengths = lengths_of(base)
        texts = {"lengths": inputs["mask"].sum(axis=1), "length_buckets": lengths}
        inputs = to_length(inputs, lengths[-1], base)
    names = tuple(map(str, classes))
    options = {"families": task.families, "groups": task.groups} if _whole(task, labels) else {}
    return ClassSource(name, "train", inputs, labels, names, **options, **texts)


def _whole(task: Any, labels: np.ndarray) -> bool:
    return isinstance(task, ClassSource) and len(labels) == len(task.labels)
