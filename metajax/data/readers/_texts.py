"""Reads labelled texts as tokens."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from metajax.core import _validate
from metajax.data._source import ClassSource
from metajax.data.readers import _tokens
from metajax.data.readers._files import Row, a_text, has_column, read_json, read_rows, regular_file, text_files
from metajax.data.readers._reading import (
    Form,
    Reader,
    Reading,
    check_tokens,
    classes_of,
    places_in,
    shorten,
    to_length,
)
from metajax.tasks import classification

LONG = ("truncate", "refuse")
FORMS = "a folder of CLASS/NAME.png, a file of texts, a pair (inputs, labels), or a source of metajax.data with classes"


class Encoded(NamedTuple):
    """Texts as tokens.

    Attributes:
      inputs: `{"tokens": int32 [n, max_length], "mask": bool [n, max_length]}`; the mask is False for padding.
      lengths: `[n]`, the number of tokens of each text.
      truncated: number of texts that were cut at the end.
    """

    inputs: dict[str, np.ndarray]
    lengths: np.ndarray
    truncated: int


def read_domains(domain: Any) -> dict[str, str]:
    """Returns the domain of each label.

    Args:
      domain: labels by domain, or a .json file with these.

    Raises:
      ValueError: `domain` is neither, or a label is in two domains.

    >>> read_domains({"travel": ["flight"], "bank": ["card"]})
    {'flight': 'travel', 'card': 'bank'}
    """
    where = "domain"
    if not isinstance(domain, Mapping):
        file = regular_file("domain", domain)
        where, domain = f"domain {str(file)!r}", read_json(file)
    if not isinstance(domain, Mapping):
        raise ValueError(f"{where} must map domains to lists of labels, got a {type(domain).__name__}")
    by_label: dict[str, str] = {}
    for key, labels in domain.items():
        names = [key, *labels] if isinstance(labels, Sequence) and not isinstance(labels, str) else [None]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"{where} must map {key!r} to a list of labels, got {labels!r}")
        for label in labels:
            if by_label.setdefault(label, key) != key:
                raise ValueError(f"{where} has label {label!r} in two domains, {by_label[label]!r} and {key!r}")
    return by_label


def encode_rows(
    encoder: Any, rows: Sequence[Row], max_length: int, *, prefix: str = "", on_long: str = "truncate"
) -> Encoded:
    """Tokenises texts; the arguments are those of `text`, and `load_tokenizer` returns the `encoder`.

    Raises:
      ValueError: a text cannot be tokenised, has no tokens, or is too long and `on_long` is "refuse".
    """
    _validate.one_of("on_long", on_long, LONG)
    _validate.instance("prefix", prefix, str)
    encoder.enable_truncation(max_length)
    tokens, lengths = np.zeros([len(rows), max_length], np.int32), np.zeros(len(rows), np.int32)
    truncated = 0
    for first in range(0, len(rows), _tokens.BLOCK):
        for place, encoding in enumerate(_encode(encoder, rows[first : first + _tokens.BLOCK], prefix), first):
            ids = encoding.ids
            if not ids:
                raise ValueError(f"the text in {rows[place].where} gives no tokens")
            if encoding.overflowing:
                truncated += 1
                if on_long == "refuse":
                    raise ValueError(f"the text in {rows[place].where} has more than {max_length} tokens, max_length")
            tokens[place, : len(ids)] = ids
            lengths[place] = len(ids)
    return Encoded({"tokens": tokens, "mask": np.arange(max_length) < lengths[:, None]}, lengths, truncated)


def _encode(encoder: Any, rows: Sequence[Row], prefix: str) -> list[Any]:
    try:
        return encoder.encode_batch_fast([prefix + row.text for row in rows])
    except Exception as error:  # the error does not say which text it was
        if len(rows) == 1:
            raise ValueError(f"the text in {rows[0].where} cannot be tokenised ({error})") from error
    return [encoding for row in rows for encoding in _encode(encoder, [row], prefix)]


def limited(tokenizer: Any, length: int | None = None) -> Any:
    """Returns a copy of a tokenizer that does not pad and only cuts texts of more than `length` tokens.

    Raises:
      ValueError: there is no tokenizer.
    """
    if tokenizer is None:
        raise ValueError("model must have a tokenizer: its folder holds no tokenizer.json")
    return _limited(tokenizer, length)


@functools.lru_cache(maxsize=4)
def _limited(tokenizer: Any, length: int | None) -> Any:
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.no_padding()  # padding would count as words
    copy.no_truncation()
    if length is not None:
        copy.enable_truncation(length)
    return copy


def encode(form: Form, inputs: Any, name: str = "inputs") -> Reading:
    """Encodes a list of texts; long texts are cut, with a warning.

    Raises:
      ValueError: the inputs are something else, hold an empty text, or are empty.
    """
    if isinstance(inputs, str) or not isinstance(inputs, Sequence | np.ndarray) or not len(inputs):
        raise ValueError(f"{name} must be a list of one text or more, got {inputs!r}")
    rows = []
    for place, text in enumerate(inputs):
        if isinstance(text, Mapping):
            raise ValueError(
                f"{name} must be texts, got a dict at index {place}: questions with choices are for a model that "
                "scores them (head='tokens' of a decoder, or outputs=1)"
            )
        where = f"index {place} of {name}"
        rows.append(Row(a_text(where, text, "text"), "", where))
    found = _encoded(form, rows, name)
    if found.truncated:
        warnings.warn(
            f"{found.truncated} of {len(rows)} {name} have more than {form.lengths[-1]} tokens, and are cut",
            stacklevel=2,
        )
    return found


def _encoded(form: Form, rows: Sequence[Row], name: str) -> Reading:
    """Encodes rows of texts at the smallest static length that holds them."""
    tokenizer = limited(form.tokenizer)
    encoded = encode_rows(tokenizer, rows, form.lengths[-1], prefix=form.prefix, on_long=form.on_long)
    inputs = to_length(encoded.inputs, int(encoded.lengths.max()), form.lengths)
    shown = tuple(shorten(row.text) for row in rows)
    return Reading(inputs, None, (), name, shown, lengths=encoded.lengths, truncated=encoded.truncated)


def read(
    form: Form, task: Any, *, classes: tuple[Any, ...] | None = None, labelled: bool = True, name: str = "task"
) -> Reading:
    """Reads labelled texts: a file, a pair of a list of texts and their labels, or a source of `metajax.data.text`.

    Raises:
      ValueError: the task is something else, or holds images, an empty text (the message states its place), a label
        outside `classes`, or tokens that the model does not know.
    """
    if isinstance(task, str | os.PathLike):
        return _from_file(form, os.fspath(task), classes, labelled, name)
    if isinstance(task, tuple) and len(task) == 2:
        inputs, labels = task
        found = encode(form, inputs)
        known, places = classes_of(labels, len(inputs))
        return found._replace(targets=places, classes=known, name=f"the {name}")
    if isinstance(task, ClassSource):
        return _from_source(form, task, name)
    raise ValueError(f"{name} must be {FORMS}, got {task!r}")


def _from_file(form: Form, path: str, classes: tuple[Any, ...] | None, labelled: bool, name: str) -> Reading:
    if not os.path.exists(path):
        raise ValueError(f"{name} must be {FORMS}, got {path!r}, which does not exist")
    if os.path.isdir(path) or path.lower().endswith(".zip"):
        raise ValueError(f"{name} must be of texts, which the model takes, got {path!r}")
    files, (text, label) = text_files(path), form.columns
    columns = {"text": text}
    if labelled or has_column(files[0], label):
        columns["label"] = label
    rows = read_rows(files, columns, None)
    found = _encoded(form, rows, repr(path))
    if "label" not in columns:
        return found._replace(classes=classes or ())
    labels = [row.label for row in rows]
    if classes is not None:
        return found._replace(targets=places_in(classes, labels), classes=classes)
    known, places = classes_of(labels, len(rows))
    return found._replace(targets=places, classes=known)


def _from_source(form: Form, source: ClassSource, name: str) -> Reading:
    inputs = source.inputs
    if not isinstance(inputs, dict) or set(inputs) != {"tokens", "mask"} or source.task is not classification:
        raise ValueError(f"{name} must be of texts with a class each, which the model takes, got {source!r}")
    kept = np.flatnonzero(source.labels >= 0)
    inputs = jax.tree.map(lambda leaf: leaf.take(kept, axis=0), inputs)
    check_tokens(inputs, form.vocabulary, source)
    lengths = inputs["mask"].sum(axis=1)
    inputs = to_length(inputs, int(lengths.max()), form.lengths)
    families = source.families if len(kept) == len(source.labels) else None
    return Reading(inputs, source.labels[kept], source.class_names, repr(source), lengths=lengths, families=families)


reader = Reader(classification, "text", FORMS, read, encode)
