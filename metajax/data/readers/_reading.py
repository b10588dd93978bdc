"""What readers take and give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from metajax.core._types import PyTree, TaskType


class Form(NamedTuple):
    """The form in which a model, or a run, takes its inputs.

    Attributes:
      kind: "text" or "image".
      tokenizer: of the tokenizers library, without padding and truncation of its own; None for images.
      lengths: static numbers of tokens, ascending: inputs are padded to the smallest that holds the longest text.
      vocabulary: number of tokens that the model knows; None does not check.
      prefix: stands before every text.
      on_long: what becomes of a text of more tokens than the largest length: "truncate" or "refuse".
      columns: of files of texts, the columns of the text and of the label.
      image: height, width and channels of images, None where these may be any.
      size: height and width to resize images to, None as they are.
      channels: 1 (grey) or 3 (RGB) for images, None as they are.
      invert: True, False or "auto", see `metajax.data.image_folder`.

    >>> Form("image", image=(28, 28, 1)).kind
    'image'
    """

    kind: str
    tokenizer: Any = None
    lengths: tuple[int, ...] = ()
    vocabulary: int | None = None
    prefix: str = ""
    on_long: str = "truncate"
    columns: tuple[str, str] = ("text", "label")
    image: tuple[int, int, int] | None = None
    size: int | None = None
    channels: int | None = None
    invert: Any = False


class Reading(NamedTuple):
    """Examples as a model takes them.

    Attributes:
      inputs: leaves `[n, ...]`, on the host.
      targets: `[n]` places in `classes`, or of the right choice of each question; None without labels.
      classes: the labels, texts or integers, sorted; () where each example brings choices of its own.
      name: of what was read, for errors.
      shown: `[n]` what a table calls the examples, () where they have no names.
      choices: of each example, None where these are the classes.
      lengths: `[n]` tokens of each example, None for images.
      truncated: how many texts lost their ends, or questions their beginnings.
      groups: `[n]` places in `group_names`, the kind of each question; None where the classes are the groups.
      group_names: of the kinds.
      families: as of the source that was read, or None.

    >>> Reading(np.zeros([2, 3]), np.array([0, 1]), ("cat", "owl"), "the task").classes
    ('cat', 'owl')
    """

    inputs: PyTree
    targets: np.ndarray | None
    classes: tuple[Any, ...]
    name: str
    shown: tuple[str, ...] = ()
    choices: list[tuple[str, ...]] | None = None
    lengths: np.ndarray | None = None
    truncated: int = 0
    groups: np.ndarray | None = None
    group_names: tuple[str, ...] = ()
    families: np.ndarray | None = None


class Reader(NamedTuple):
    """Turns what a user has into examples of a task type, for a form of inputs.

    Attributes:
      task: the task type.
      kind: "text" or "image".
      forms: what `read` takes, for errors.
      read: `(form, task, *, classes=None, labelled=True, name="task") -> Reading` of a path, a pair or a source.
        `labelled=False` takes labels where there are some; `classes` are those that labels must be of.
      encode: `(form, inputs, name="inputs") -> Reading` of bare inputs, without labels.

    >>> Reader._fields
    ('task', 'kind', 'forms', 'read', 'encode')
    """

    task: TaskType
    kind: str
    forms: str
    read: Callable[..., Reading]
    encode: Callable[..., Reading]


def to_length(inputs: PyTree, longest: int, lengths: tuple[int, ...]) -> PyTree:
    """Sequences `[..., length]` cut or filled up to the smallest static length that holds `longest`.

    >>> to_length(np.ones([1, 3]), 2, (2, 4)).shape, to_length(np.ones([1, 3]), 3, (2, 4)).shape
    ((1, 2), (1, 4))
    """
    length = next((length for length in lengths if length >= longest), lengths[-1])

    def fit(leaf: np.ndarray) -> np.ndarray:
        padding = [(0, 0)] * (leaf.ndim - 1) + [(0, max(0, length - leaf.shape[-1]))]
        return np.pad(leaf[..., :length], padding)

    return jax.tree.map(fit, inputs)


def check_tokens(inputs: dict[str, np.ndarray], vocabulary: int | None, source: Any) -> None:
    """Refuses tokens `[..., length]` of another tokenizer than the model's, and padding in front of one.

    Raises:
      ValueError: there are such.
    """
    tokens, mask = inputs["tokens"], inputs["mask"]
    if (mask[..., 1:] & ~mask[..., :-1]).any():
        raise ValueError(f"mask of {source!r} must be padding behind each text, got padding in front of a token")
    if vocabulary is not None:
        unknown = tokens[mask & ((tokens < 0) | (tokens >= vocabulary))]
        if unknown.size:
            raise ValueError(
                f"tokens of {source!r} must be from 0 to {vocabulary - 1}, got {unknown[0]}: of another tokenizer"
            )


def classes_of(labels: Any, count: int) -> tuple[tuple[Any, ...], np.ndarray]:
    """The different labels in order, texts or integers, and the place of each example's.

    Raises:
      ValueError: labels are something else, or not `count`.

    >>> classes_of(["owl", "cat", "owl"], 3)
    (('cat', 'owl'), array([1, 0, 1]))
    """
    labels = [label.item() if isinstance(label, np.generic) else label for label in list(labels)]
    kinds = {type(label) for label in labels}
    if kinds not in ({str}, {int}):
        raise ValueError(f"labels must be all texts or all integers, got {', '.join(k.__name__ for k in kinds)}")
    if len(labels) != count:
        raise ValueError(f"labels must be one for each of the {count} inputs, got {len(labels)}")
    classes = tuple(sorted(set(labels)))  # not by NumPy, which rounds large integers and strips texts
    places = {label: place for place, label in enumerate(classes)}
    return classes, np.array([places[label] for label in labels], int)


def places_in(classes: tuple[Any, ...], labels: Any) -> np.ndarray:
    """The place of each label in the classes of a support set.

    Raises:
      ValueError: a label is none of them.

    >>> places_in(("cat", "owl"), ["owl", "owl"]).tolist()
    [1, 1]
    """
    unknown = sorted({*labels} - {*classes})
    if unknown:
        raise ValueError(
            f"must hold classes of support ({', '.join(map(str, classes))}), got {', '.join(map(repr, unknown))}"
        )
    return np.array([classes.index(label) for label in labels], np.int32)


def shorten(text: str, width: int = 60) -> str:
    """A text on one line of a table.

    >>> shorten("one  two", 5)
    'on...'
    """
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."
