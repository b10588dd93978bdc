"""Extractive question answering: a task is a language and an article."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metajax.core import _validate
from metajax.core._types import TaskType
from metajax.data._class_splits import Splits, divide
from metajax.data._sources import SPLITS, ClassSource
from metajax.data.readers import _tokens
from metajax.data.readers._answers import windows
from metajax.data.readers._files import regular_file
from metajax.data.readers._squad import Question, read_parallel
from metajax.tasks import spans

Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AnswerSource(ClassSource):
    """Questions whose answers are spans of a context; made by `question_answering`.

    A row is a window: a question, and as much of its context as fits. Episodes draw the window of a question that holds
    its answer, with most context around it, so that every example can be learned from. `metajax.evaluation.answers`
    puts all windows of the query's questions in their place (`windows`), and so sees no answer.

    Attributes:
      questions: all of them; `inputs["id"]` are places in it.
      offsets: int32 `[n, length, 2]`, the characters of the context that a token of a row covers.

    >>> import numpy as np
    >>> question = Question("q1", "en", "Moon", "Who ?", "Ada saw it", ("Ada",), 0, "question 'q1'")
    >>> inputs = {"tokens": np.array([[5, 6, 7, 8, 9]]), "id": np.zeros(1, np.int32)}
    >>> offsets = np.array([[[0, 0], [0, 0], [0, 3], [4, 7], [8, 10]]])
    >>> source = AnswerSource(
    ...     "toy", "test", inputs, np.zeros(1, int), ("en/Moon",), targets=np.array([[2, 2]]),
    ...     questions=(question,), offsets=offsets,
    ... )
    >>> source.text(0, 2, 3), source.windows([0]).tolist()
    ('Ada saw', [[0]])
    """

    task: TaskType | None = spans
    questions: tuple[Question, ...] = ()
    offsets: np.ndarray | None = None

    @property
    def left_out(self) -> tuple[Question, ...]:
        """Questions that no episode draws, since no window holds their answer whole."""
        drawn = set(self.inputs["id"][self.targets[:, 0] >= 0].tolist())
        return tuple(question for place, question in enumerate(self.questions) if place not in drawn)

    @property
    def windowed(self) -> int:
        """How many questions have a context of more than one window."""
        return int((np.bincount(self.inputs["id"]) > 1).sum())

    def windows(self, ids: Any) -> np.ndarray:
        """The rows of questions `[...]` as `[..., k]`, -1 where there are fewer; k is 1 where all have one window.

        Else k is the most windows of any question, so that few shapes arise.
        """
        ids, counts = np.asarray(ids), np.bincount(self.inputs["id"])
        widest = 1 if (counts[ids] == 1).all() else int(counts.max())
        place = np.arange(widest)
        first = np.cumsum(counts) - counts
        return np.where(place < counts[ids][..., None], first[ids][..., None] + place, -1)

    def text(self, row: int, start: int, end: int) -> str:
        """What tokens `start` to `end` of a row, both of the span, are in its context."""
        context = self.questions[self.inputs["id"][row]].context
        return context[self.offsets[row, start, 0] : self.offsets[row, end, 1]]  # type: ignore[index]


def question_answering(
    files: Mapping[str, Path],
    *,
    tokenizer: Path,
    split: str = "train",
    splits: Splits | None = None,
    languages: Mapping[str, Sequence[str]] | None = None,
    max_length: int = 384,
    overlap: int = 128,
    length_buckets: Sequence[int] | None = None,
    name: str | None = None,
) -> AnswerSource:
    """Questions and answers in the format of SQuAD v1.1 (plain or .gz): a task is a language and an article.

    Support and query of an episode are different questions about one article, in one language; `ways` is 1, and
    `hierarchical` draws a language first and then an article. Articles are divided, and not questions: article k is the
    same in all files, which is checked by the ids of its questions, so that test articles are unseen in every language.
    With `languages` the languages of test are unseen too:

        languages = {"train": ["en", "de", "es"], "test": ["ru", "zh"]}
        files = {language: f"xquad/xquad.{language}.json.gz" for language in ("en", "de", "es", "ru", "zh")}
        train = question_answering(files, tokenizer="tokenizer.json", languages=languages)
        test = question_answering(files, tokenizer="tokenizer.json", languages=languages, split="test")

    Question and context are one sequence, with the special tokens of the tokenizer. A question is never cut. A context
    that is too long is seen through windows that share `overlap` tokens (see `AnswerSource`); a question whose answer
    fits into none of them is left out, and counted in `source.left_out`. That takes an answer of more than `overlap`
    tokens.

    Args:
      files: a file for each language. Files that are no translations of each other need a source each.
      tokenizer: a file of the tokenizers library (tokenizer.json), or a folder that holds one. Its vocabulary should
        have all languages.
      split: "train", "val" or "test".
      splits: titles of articles (in the first file) by split, or shares that sum to 1, as for `metajax.data.
        image_folder`. None is 64 % train, 16 % val and 20 % test; `{"test": 1}` divides nothing.
      languages: by split; None is all of `files` in each.
      max_length: tokens of question and context, special tokens included.
      overlap: tokens that neighbouring windows share.
      length_buckets: lengths that batches come in, ascending up to `max_length`; by default a quarter of it, a half and
        all of it.
      name: what reports call it; by default the files of the split's languages.

    Returns:
      A source with inputs `{"tokens": int32, "mask": bool (False: padding), "types": int32 (what the tokenizer calls
      question and context), "context": bool (where an answer can stand)}`, all `[n, max_length]`, and `"id"`, int32
      `[n]`, places in `source.questions`; and targets int32 `[n, 2]`, the first and the last token of the first answer.
      Its classes are `LANGUAGE/ARTICLE`, its nodes the languages.

    Raises:
      ValueError: a file is not there, too large, no JSON in this format, or not parallel to the first; an answer lies
        outside its context or does not stand where it says; a text is empty or has no tokens; a question leaves no room
        for its context (each with file and question); the tokenizer is none; an argument is out of range.
      ImportError: the tokenizers library is not installed.

    Source: Rajpurkar et al. 2016 (SQuAD), arXiv:1606.05250; Artetxe et al. 2020 (XQuAD), arXiv:1910.11856; windows as
    in Devlin et al. 2019, arXiv:1810.04805.

    >>> question_answering({"en": "no/such/file.json"}, tokenizer="tokenizer.json")
    Traceback (most recent call last):
      ...
    ValueError: files must name regular files, got 'no/such/file.json', which does not exist
    """
    _validate.one_of("split", split, SPLITS)
    buckets = _tokens.buckets_of(max_length, length_buckets)
    _validate.int_at_least("overlap", overlap, 0)
    if not isinstance(files, Mapping) or not files:
        raise ValueError(f"files must map languages to files, got {files!r}")
    paths = {language: regular_file("files", path) for language, path in files.items()}
    chosen = _languages(languages, split, files)
    name = name or "+".join(str(paths[language]) for language in chosen)
    encoder = _tokens.load_tokenizer(tokenizer, max_length, user="question_answering", pair=True)
    by_language = read_parallel(paths)
    articles = divide(next(iter(by_language.values())), split, splits, f"{name} (split by article)")
    tasks = {f"{language}/{article}": by_language[language][article] for language in chosen for article in articles}
    questions = tuple(question for found in tasks.values() for question in found)
    if not questions:
        raise ValueError(f"files must hold questions, and {name} has none in {split}")
    number = {task: place for place, task in enumerate(tasks)}
    rows = windows(encoder, questions, max_length, overlap)
    labels = [number[f"{questions[row.id].language}/{questions[row.id].article}"] for row in rows]
    targets = np.array([row.target for row in rows], np.int32).reshape(-1, 2)
    length = np.array([len(row.tokens) for row in rows], np.int32)

    def whole(lines: list[Any], dtype: Any, *shape: int) -> np.ndarray:
        values = np.zeros([len(rows), max_length, *shape], dtype)
        for value, line in zip(values, lines, strict=True):
            value[: len(line)] = line
        return values

    return AnswerSource(
        name,
        split,
        {
            "tokens": whole([row.tokens for row in rows], np.int32),
            "mask": np.arange(max_length) < length[:, None],
            "types": whole([row.types for row in rows], np.int32),
            "context": whole([row.context for row in rows], bool),
            "id": np.array([row.id for row in rows], np.int32),
        },
        np.where(targets[:, 0] >= 0, labels, -1),
        tuple(tasks),
        nodes={language: [f"{language}/{article}" for article in articles] for language in chosen},
        targets=targets,
        lengths=length,
        length_buckets=buckets,
        questions=questions,
        offsets=whole([row.offsets for row in rows], np.int32, 2),
    )


def _languages(languages: Any, split: str, files: Mapping[str, Path]) -> list[str]:
    for language in files:
        if not isinstance(language, str) or not language or "/" in language:
            raise ValueError(f"files must map names of languages without '/' to files, got {language!r}")
    if languages is None:
        return list(files)
    if not isinstance(languages, Mapping) or split not in languages:
        raise ValueError(f"languages must name the languages of split {split!r}, got {languages!r}")
    for key, listed in languages.items():
        _validate.one_of("a key of languages", key, SPLITS)
        if isinstance(listed, str) or not listed or len(set(listed)) < len(listed):
            raise ValueError(f"languages[{key!r}] must be a list of different languages, got {listed!r}")
        for language in listed:
            _validate.one_of(f"a language of languages[{key!r}]", language, tuple(files))
    return list(languages[split])
