"""The inputs and outputs of readers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from metajax.core._types import PyTree, TaskType


class Form(NamedTuple):
    """The form in which a model, or a run, accepts its inputs.

    Attributes:
      kind: "text" or "image".
      tokenizer: a tokenizer of the tokenizers library, without its own padding and truncation; None for images.
      lengths: static numbers of tokens, ascending: inputs are padded to the smallest that holds the longest text.
      vocabulary: number of tokens that the model knows; None skips the check.
      prefix: text that is put before every text.
      on_long: what happens to a text of more tokens than the largest length: "truncate" or "refuse".
      columns: the columns of the text and of the label in files of texts.
      image: height, width and channels of images, None to accept any.
      size: height and width to resize images to, None to keep them.
      channels: 1 (grey) or 3 (RGB) for images, None to keep them.
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
    """Examples in the form that a model accepts.

    Attributes:
      inputs: leaves `[n, ...]`, on the host.
      targets: `[n]` indices into `classes`, or of the right choice of each question; None without labels.
      classes: the labels, texts or integers, sorted; () if each example has its own choices.
      name: the name of the data, for error messages.
      shown: `[n]` names of the examples in a table, () if they have no names.
      choices: the choices of each example, None if these are the classes.
      lengths: `[n]` number of tokens of each example, None for images.
      truncated: number of texts that were cut at the end, or of questions that were cut at the beginning.
      groups: `[n]` indices into `group_names`, the kind of each question; None if the classes are the groups.
      group_names: the names of the kinds.
      families: the families of the source that was read, or None.

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
    """Converts user data to examples of a task type, for a form of inputs.

    Attributes:
      task: the task type.
      kind: "text" or "image".
      forms: what `read` accepts, for error messages.
      read: `(form, task, *, classes=None, labelled=True, name="task") -> Reading` of a path, a pair or a source.
        `labelled=False` reads labels if there are any; labels must be in `classes`.
      encode: `(form, inputs, name="inputs") -> Reading` of inputs without labels.

    >>> Reader._fields
    ('task', 'kind', 'forms', 'read', 'encode')
    """

    task: TaskType
    kind: str
    forms: str
    read: Callable[..., Reading]
    encode: Callable[..., Reading]


def to_length(inputs: PyTree, longest: int, lengths: tuple[int, ...]) -> PyTree:
    """Cuts or pads sequences `[..., length]` to the smallest static length that holds `longest`.

    >>> to_length(np.ones([1, 3]), 2, (2, 4)).shape, to_length(np.ones([1, 3]), 3, (2, 4)).shape
    ((1, 2), (1, 4))
    """
    length = next((length for length in lengths if length >= longest), lengths[-1])

    def fit(leaf: np.ndarray) -> np.ndarray:
        padding = [(0, 0)] * (leaf.ndim - 1) + [(0, max(0, length - leaf.shape[-1]))]
        return np.pad(leaf[..., :length], padding)

    return jax.tree.map(fit, inputs)


def check_tokens(inputs: dict[str, np.ndarray], vocabulary: int | None, source: Any) -> None:
    """Checks that tokens `[..., length]` are in the model's vocabulary and that no padding precedes a token.

    Raises:
      ValueError: a token is not in the vocabulary, or padding precedes a token.
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
    """Returns the different labels in order, texts or integers, and the index of each example's label.

    Raises:
      ValueError: labels are something else, or their number is not `count`.

    >>> classes_of(["owl", "cat", "owl"], 3)
    (('cat', 'owl'), array([1, 0, 1]))
    """
    labels = [label.item() if isinstance(label, np.generic) else label for label in list(labels)]
    kinds = {type(label) for label in labels}
    if kinds not in ({str}, {int}):
        raise ValueError(f"labels must be all texts or all integers, got {', '.join(k.__name__ for k in kinds)}")
    if len(labels) != count:
        raise ValueError(f"labels must be one for each of the {count} inputs, got {len(labels)}")
    classes = tuple(sorted(set(labels)))  # not with NumPy, which rounds large integers and strips texts
    places = {label: place for place, label in enumerate(classes)}
    return classes, np.array([places[label] for label in labels], int)


def places_in(classes: tuple[Any, ...], labels: Any) -> np.ndarray:
    """Returns the index of each label in the classes of a support set.

    Raises:
      ValueError: a label is not in `classes`.

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
    """Shortens a text to one line of a table.

    >>> shorten("one  two", 5)
    'on...'
    """
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."
