"""Texts and questions to adapt to, and others to predict, read as those of a run."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

_WIDTH = 60  # characters of a text in a table


class Texts(NamedTuple):
    """Texts as inputs of a run.

    Attributes:
      inputs: leaves `[n, ...]`: tokens and mask, or features where the run froze its model.
      shown: the texts, shortened.
      labels: `[n]`, positions in `classes`, or None where the file has no labels.
      classes: names of the classes; () of questions.
      truncated: how many texts lost their ends, or questions their beginnings.
      choices: of each question, in which its label is a position; None of texts.
    """

    inputs: Any
    shown: tuple[str, ...]
    labels: np.ndarray | None
    classes: tuple[str, ...]
    truncated: int
    choices: list[tuple[str, ...]] | None = None


def read(path: str, config: dict[str, Any], *, classes: tuple[str, ...] | None = None) -> Texts:
    """Reads a file of texts.

    Args:
      path: .jsonl, .csv, .tsv or .json as CLINC150, maybe with .gz.
      config: of the run.
      classes: those that the labels must be of, where the file has labels; None requires labels, and takes the classes
        from them.

    Raises:
      ValueError: as `metajax.data.text`; a label is none of `classes`.
    """
    from metajax import data, training
    from metajax.data import _text
    from metajax.data.readers import _files, _tokens
    from metajax.training._data import with_features

    options = training.text_options(config)
    length = options["max_length"]
    files = _text_files.text_files(path)
    columns = {"text": options["text"]}
    if classes is None or _text_files.has_column(files[0], options["label"]):
        columns["label"] = options["label"]
    rows = _text_files.read_rows(files, columns, None)
    known = tuple(sorted({row.label for row in rows})) if classes is None else classes
    labels = None
    if "label" in columns:
        unknown = sorted({row.label for row in rows} - {*known})
        if unknown:
            told = ", ".join(map(repr, unknown))
            raise ValueError(f"must hold classes of support ({', '.join(known)}), got {told}")
        labels = np.array([known.index(row.label) for row in rows], np.int32)
    encoder = _tokens.load_tokenizer(options["tokenizer"], length, user="adapt")
    encoded = _text.encode_rows(encoder, rows, length, prefix=options["prefix"], on_long=options["on_long"])
    source = data.ClassSource(
        path, "test", encoded.inputs, np.zeros(len(rows), int), ("",), lengths=encoded.lengths,
        length_buckets=_tokens.buckets_of(length, options["length_buckets"]),
    )  # fmt: skip
    shown = tuple(_shorten(row.text) for row in rows)
    return Texts(with_features(config, source).inputs, shown, labels, known, encoded.truncated)


def read_questions(path: str, config: dict[str, Any], *, answered: bool) -> Texts:
    """Reads a file of questions with choices.

    Args:
      path: .jsonl, maybe with .gz.
      config: of the run.
      answered: whether all must have answers; else there are labels only where all have them.

    Raises:
      ValueError: as `metajax.data.multiple_choice`.
    """
    from metajax import training
    from metajax.data import _multiple_choice
    from metajax.data.readers import _tokens

    options = training.text_options(config)
    length = options["max_length"]
    rows = _multiple_choice.read_questions(_multiple_choice.question_files(path), answered=True if answered else None)
    answers = np.array([row.answer for row in rows], np.int32)
    encoder = _tokens.load_tokenizer(options["tokenizer"], length, user="adapt", pair=True)
    width = max(len(row.choices) for row in rows)
    inputs, lengths, cut = _multiple_choice.encode_questions(encoder, rows, width, length, None)
    buckets = _tokens.buckets_of(length, options["length_buckets"])
    longest = next(bucket for bucket in buckets if bucket >= lengths.max())
    return Texts(
        {name: leaf[..., :longest] for name, leaf in inputs.items()}, tuple(_shorten(row.text) for row in rows),
        None if (answers < 0).any() else answers, (), cut, [row.choices for row in rows],
    )  # fmt: skip


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WIDTH else line[: _WIDTH - 3] + "..."
