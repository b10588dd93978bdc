"""Extractive question answering: a task is an article in a language."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metajax.core import _validate
from metajax.core._types import TaskType
from metajax.data._source import SPLITS, ClassSource
from metajax.data.readers import _tokens
from metajax.data.readers._answers import windows
from metajax.data.readers._files import regular_file
from metajax.data.readers._squad import Question, read_parallel
from metajax.data.sources._class_splits import Splits, divide
from metajax.tasks import spans

Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AnswerSource(ClassSource):
    """A source of questions whose answers are spans of a context; created by `question_answering`.

    A row is a window: a question, and as much of its context as fits. Episodes draw the window of a question that holds
    its answer with most context around it, so that every example is useful for learning. `metajax.evaluation.answers`
    replaces them by all windows of the query's questions (`windows`), so it does not use the answers.

    Attributes:
      questions: all questions; `inputs["id"]` are indices into it.
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
        """Questions that no episode draws, because no window holds their whole answer."""
        drawn = set(self.inputs["id"][self.targets[:, 0] >= 0].tolist())
        return tuple(question for place, question in enumerate(self.questions) if place not in drawn)

    @property
    def windowed(self) -> int:
        """Number of questions with a context of more than one window."""
        return int((np.bincount(self.inputs["id"]) > 1).sum())

    def windows(self, ids: Any) -> np.ndarray:
        """Returns the rows of questions `[...]` as `[..., k]`, padded with -1; k is 1 if all have one window.

        Otherwise k is the largest number of windows of any question, so that there are few shapes.
        """
        ids, counts = np.asarray(ids), np.bincount(self.inputs["id"])
        widest = 1 if (counts[ids] == 1).all() else int(counts.max())
        place = np.arange(widest)
        first = np.cumsum(counts) - counts
        return np.where(place < counts[ids][..., None], first[ids][..., None] + place, -1)

    def text(self, row: int, start: int, end: int) -> str:
        """Returns the text in the context of a row from token `start` to token `end`, both included."""
        context = self.questions[self.inputs["id"][row]].context
        return context[self.offsets[row, start, 0] : self.offsets[row, end, 1]]  # type: ignore[index]


def question_answering(
    files: Path | Mapping[str, Path],
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
    """Loads questions and answers in the format of SQuAD v1.1 (plain or .gz): a task is an article in a language.

    Support and query of an episode are different questions about one article, in one language; `ways` is 1, and
    `hierarchical` draws a language first and then an article. `splits` divides articles, not questions. Article k is
    the same in all files, which is checked by the ids of its questions, so test articles are unseen in every language.
    With `languages` the test languages are unseen too:

        languages = {"train": ["en", "de", "es"], "test": ["ru", "zh"]}
        files = {language: f"xquad/xquad.{language}.json.gz" for language in ("en", "de", "es", "ru", "zh")}
        train = question_answering(files, tokenizer="tokenizer.json", languages=languages)
        test = question_answering(files, tokenizer="tokenizer.json", languages=languages, split="test")

    Question and context form one sequence, with the special tokens of the tokenizer. A question is never cut. A context
    that is too long is divided into windows that share `overlap` tokens (see `AnswerSource`). A question whose answer
    fits into no window is left out and listed in `source.left_out`; this requires an answer of more than `overlap`
    tokens.

    Args:
      files: a file for each language, or one path with `{}` in the place of the language if `languages` is given, or
        one file. Files that are not translations of each other need separate sources.
      tokenizer: a file of the tokenizers library (tokenizer.json), or a folder that holds one. Its vocabulary should
        cover all languages.
      split: "train", "val" or "test".
      splits: titles of articles (in the first file) by split, or shares that sum to 1, as for
        `metajax.data.image_folder`. None gives 64 % train, 16 % val and 20 % test; `{"test": 1}` puts all articles in
        one split.
      languages: languages by split; None uses all languages of `files` in each split.
      max_length: largest number of tokens of question and context, special tokens included.
      overlap: number of tokens that neighbouring windows share.
      length_buckets: lengths of batches, ascending up to `max_length`; by default a quarter of it, a half and all of
        it.
      name: the name in reports; by default the files of the split's languages.

    Returns:
      A source with inputs `{"tokens": int32, "mask": bool (False: padding), "types": int32 (the tokenizer's types of
      question and context), "context": bool (where an answer can be)}`, all `[n, max_length]`, and `"id"`, int32 `[n]`,
      indices into `source.questions`. Targets are int32 `[n, 2]`, the first and the last token of the first answer. The
      classes are `LANGUAGE/ARTICLE`, the nodes are the languages.

    Raises:
      ValueError: a file does not exist, is too large, is not JSON in this format, or is not parallel to the first; an
        answer is outside its context or not at the stated position; a text is empty or has no tokens; a question leaves
        no room for its context (each with file and question); the tokenizer is invalid; an argument is out of range.
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
    files = _by_language(files, languages)
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


def _by_language(files: Path | Mapping[str, Path], languages: Mapping[str, Sequence[str]] | None) -> Mapping[str, Path]:
    """Returns a file for each language."""
    if isinstance(files, Mapping) and files:
        return files
    if not isinstance(files, str | os.PathLike):
        raise ValueError(f"files must be a path or map languages to files, got {files!r}")
    spoken = sorted({language for names in (languages or {}).values() for language in names})
    if ("{}" in os.fspath(files)) != bool(spoken):
        raise ValueError(
            "files must have {} in the place of the language where languages names some, and else none, got "
            f"{os.fspath(files)!r} for {', '.join(spoken) or 'no languages'}"
        )
    return {language: os.fspath(files).replace("{}", language) for language in spoken} or {"text": files}


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
