"""Reads questions with choices as pairs of a prompt and each choice."""

from __future__ import annotations

import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from metajax.data._source import ClassSource
from metajax.data.readers import _tokens
from metajax.data.readers._files import a_text, json_lines, read_content, text_files
from metajax.data.readers._reading import Form, Reader, Reading, check_tokens, shorten, to_length
from metajax.data.readers._texts import limited
from metajax.tasks import multiple_choice

_LINES = (".jsonl", ".jsonl.gz")
_LEAVES = ("tokens", "mask", "types", "choice")
FORMS = (
    "a .jsonl file of questions or a folder of such, a pair (questions, answers), or a source of "
    "metajax.data.multiple_choice"
)


class ChoiceQuestion(NamedTuple):
    """One question with its choices.

    Attributes:
      task: the kind of question.
      context: the text before the question, "" if there is none.
      text: the question.
      choices: the texts of the choices.
      answer: the index of the right choice, -1 if it is unknown.
      where: the place of the question, for error messages.

    >>> ChoiceQuestion("books", "Ada wrote.", "Who wrote it?", ("Ada", "Bob"), 0, "line 1").prompt
    'Ada wrote. Who wrote it?'
    """

    task: str
    context: str
    text: str
    choices: tuple[str, ...]
    answer: int
    where: str

    @property
    def prompt(self) -> str:
        """The context and the question."""
        return f"{self.context} {self.text}" if self.context else self.text


def question_files(files: Any) -> tuple[pathlib.Path, ...]:
    """Returns the paths of the given files of questions, or of those in a given folder, sorted.

    Raises:
      ValueError: there are no files, or a file does not exist, is listed twice (also packed and unpacked) or has
        another extension.
    """
    if isinstance(files, str | os.PathLike) and os.path.isdir(files):
        found = sorted(file for file in pathlib.Path(files).iterdir() if file.name.lower().endswith(_LINES))
        if not found:
            raise ValueError(
                f"files must be {' or '.join(_LINES)}, got the folder {os.fspath(files)!r}, which has none"
            )
        files = found
    paths, seen = text_files(files), dict[pathlib.Path, pathlib.Path]()
    for path in paths:
        if not path.name.lower().endswith(_LINES):
            raise ValueError(f"files must end in {' or '.join(_LINES)}, got {str(path)!r}")
        same = seen.setdefault(path.resolve().with_name(_stem(path)), path)
        if same != path:  # a question would be in both support and query
            raise ValueError(f"files must be one of each name, got {str(same)!r} and {str(path)!r}")
    return paths


def _stem(path: pathlib.Path) -> str:
    return path.name[: len(path.name.lower().removesuffix(".gz").removesuffix(".jsonl"))]


def read_questions(paths: Sequence[pathlib.Path], *, answered: bool | None = True) -> list[ChoiceQuestion]:
    """Reads the questions of files of JSON lines.

    Args:
      paths: the paths of the files.
      answered: as for `read_question`.

    Raises:
      ValueError: a file has no rows, or a line is not a question.
    """
    rows: list[ChoiceQuestion] = []
    for path in paths:
        before = len(rows)
        for where, record in json_lines(read_content(path), repr(str(path))):
            rows.append(read_question(record, where, _stem(path), answered=answered))
        if len(rows) == before:
            raise ValueError(f"{str(path)!r} has no rows")
    return rows


def read_question(
    record: Mapping[str, Any], where: str, file_task: str, *, answered: bool | None = True
) -> ChoiceQuestion:
    """Returns the question of a line.

    Args:
      record: the fields of the line.
      where: the place of the line, for error messages.
      file_task: the task, if the line does not name one.
      answered: True requires an answer, None allows one, False ignores it.

    Raises:
      ValueError: a text is empty or not a text, there are fewer than 2 choices, or the answer is not one of them.

    >>> read_question({"question": "Who?", "choices": ["Ada", "Bob"], "answer": "Bob"}, "line 1", "books").answer
    1
    """
    text = a_text(where, record.get("question"), "question")
    context = a_text(where, record["context"], "context") if record.get("context") not in (None, "") else ""
    task = file_task if record.get("task") is None else a_text(where, record["task"], "task")
    choices, answer = record.get("choices"), record.get("answer")
    if not isinstance(choices, list | tuple) or len(choices) < 2:
        raise ValueError(f"{where} must have a list of 2 choices at least, got {choices!r}")
    choices = tuple(a_text(where, choice, "choice") for choice in choices)
    if len(set(choices)) < len(choices):
        raise ValueError(f"{where} must have different choices, got {choices}")
    if answered is False or (answered is None and answer is None):
        return ChoiceQuestion(task, context, text, choices, -1, where)
    if isinstance(answer, str):
        if answer not in choices:
            raise ValueError(f"{where} has the answer {answer!r}, which is not among its choices, {choices}")
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"{where} must have one of its {len(choices)} choices as answer, from 0 on, got {answer!r}")
    return ChoiceQuestion(task, context, text, choices, answer, where)


def encode_questions(
    encoder: Any, rows: Sequence[ChoiceQuestion], width: int, max_length: int, prefix: str | None
) -> tuple[dict[str, np.ndarray], np.ndarray, int]:
    """Encodes questions in the form that `multiple_choice` returns.

    Args:
      encoder: a tokenizer without padding and truncation.
      rows: the questions.
      width: number of choices of each question, padding included.
      max_length: largest number of tokens of a prompt and a choice.
      prefix: text before each choice, as `choice_prefix` of `multiple_choice`.

    Returns:
      The inputs, the length of the longest choice of each row with its prompt, and the number of rows with a prompt
      that was cut at the beginning.

    Raises:
      ValueError: a question or a choice has no tokens, or there is no room for a token of a question.
    """
    prefix = _prefix(encoder) if prefix is None else prefix
    shape = (len(rows), width, max_length)
    inputs = {name: np.zeros(shape, np.int32) for name in ("tokens", "types")}
    inputs |= {name: np.zeros(shape, bool) for name in ("mask", "choice")}
    places = [(line, choice) for line, row in enumerate(rows) for choice in range(len(row.choices))]
    pairs = [(rows[line].prompt, prefix + rows[line].choices[choice]) for line, choice in places]
    lengths, cut = np.zeros(len(rows), np.int32), set[int]()
    encodings = _tokens.encode_pairs(encoder, pairs, [rows[line].where for line, _ in places])
    for (line, choice), encoding in zip(places, encodings, strict=True):
        (begin, end), (begin_choice, end_choice) = _tokens.span_of(encoding, 0), _tokens.span_of(encoding, 1)
        tokens, types = encoding.ids, encoding.type_ids  # each access creates a new list
        # a choice that continues the prompt needs no start token: Llama's tokenizer puts <s> before both
        between = range(end, begin_choice if end_choice == len(tokens) else end)
        surplus = max(len(tokens) - len(between) - max_length, 0)
        for what, missing in (("question", begin == end), (f"choice {choice}", begin_choice == end_choice)):
            if missing:
                raise ValueError(f"the {what} of {rows[line].where} gives no tokens")
        if surplus >= end - begin:
            raise ValueError(
                f"max_length, {max_length}, must leave room for a token of the question beside choice {choice} of "
                f"{rows[line].where}, which takes {len(tokens) - len(between) - (end - begin)} with special tokens"
            )
        if surplus:
            cut.add(line)
        kept = [*range(begin), *range(begin + surplus, end), *range(between.stop, len(tokens))]
        here = (line, choice, slice(len(kept)))
        inputs["tokens"][here] = [tokens[place] for place in kept]
        inputs["types"][here] = [types[place] for place in kept]
        inputs["choice"][here] = [begin_choice <= place < end_choice for place in kept]
        inputs["mask"][here] = True
        lengths[line] = max(lengths[line], len(kept))
    return inputs, lengths, len(cut)


def _prefix(encoder: Any) -> str:
    """Returns a space, unless the tokenizer adds one to a word itself and would make this one a separate token."""
    spaced, plain = (len(encoder.encode(text, add_special_tokens=False).ids) for text in (" a", "a"))
    return " " if spaced <= plain else ""


def questions_of(questions: Any, name: str = "inputs") -> list[ChoiceQuestion]:
    """Reads questions from dicts like the lines of `data.multiple_choice`; their answers are ignored.

    Args:
      questions: the dicts.
      name: the name of the argument, for error messages.

    Raises:
      ValueError: `questions` is something else, or holds no question.

    >>> questions_of([{"question": "Who?", "choices": ["Ada", "Bob"]}])[0].choices
    ('Ada', 'Bob')
    """
    return _listed(_records(questions, name), name, answered=False)


def answered(questions: Any, answers: Any, name: str, answers_name: str) -> list[ChoiceQuestion]:
    """Reads questions and the indices or texts of their right choices.

    Args:
      questions: as for `questions_of`.
      answers: the answer of each question.
      name: the name of the questions, for error messages.
      answers_name: the name of the answers, for error messages.

    Raises:
      ValueError: as for `questions_of`; or the number of answers differs, or an answer is not a choice.

    >>> answered([{"question": "Who?", "choices": ["Ada", "Bob"]}], ["Bob"], "questions", "answers")[0].answer
    1
    """
    records = _records(questions, name)
    if isinstance(answers, str) or not isinstance(answers, Sequence | np.ndarray) or np.ndim(answers) != 1:
        raise ValueError(f"{answers_name} must be a list of places or texts of right choices, got {answers!r}")
    if len(answers) != len(records):
        raise ValueError(f"{answers_name} must be one for each of the {len(records)} questions, got {len(answers)}")
    answers = [answer.item() if isinstance(answer, np.generic) else answer for answer in answers]
    with_answers = [{**record, "answer": answer} for record, answer in zip(records, answers, strict=True)]
    return _listed(with_answers, name, answered=True)


def _records(questions: Any, name: str) -> Sequence[Mapping[str, Any]]:
    listed = isinstance(questions, Sequence | np.ndarray) and not isinstance(questions, str)
    if not listed or np.ndim(questions) != 1 or not len(questions):
        raise ValueError(f"{name} must be a list of one question or more, got {questions!r}")
    for place, question in enumerate(questions):
        if not isinstance(question, Mapping):
            raise ValueError(
                f"index {place} of {name} must be a question, {{'question': ..., 'choices': [...]}}, got {question!r}"
            )
    return questions


def _listed(records: Sequence[Mapping[str, Any]], name: str, *, answered: bool) -> list[ChoiceQuestion]:
    return [
        read_question(record, f"index {place} of {name}", name, answered=answered)
        for place, record in enumerate(records)
    ]  # fmt: skip


def encode(form: Form, inputs: Any, name: str = "inputs") -> Reading:
    """Encodes questions from dicts like the lines of `data.multiple_choice`; their answers are ignored.

    Raises:
      ValueError: as for `questions_of`, or a question and a choice do not fit into the lengths.
    """
    return _encoded(form, questions_of(inputs, name), name, warn=True)


def _encoded(form: Form, rows: Sequence[ChoiceQuestion], name: str, *, warn: bool) -> Reading:
    """Returns the leaves of `data.multiple_choice`, with static numbers of choices (2, 4, 8, ...) and lengths."""
    width = static_choices(max(len(row.choices) for row in rows))
    inputs, longest, cut = encode_questions(limited(form.tokenizer), rows, width, form.lengths[-1], None)
    if cut and warn:
        warnings.warn(
            f"{cut} of {len(rows)} {name} have more than {form.lengths[-1]} tokens, and lose their beginnings",
            stacklevel=3,
        )
    names = tuple(sorted({row.task for row in rows}))
    answers = np.array([row.answer for row in rows], np.int32)
    return Reading(
        to_length(inputs, int(longest.max()), form.lengths), None if (answers < 0).any() else answers, (), name,
        tuple(shorten(row.text) for row in rows), [row.choices for row in rows], longest, cut,
        np.array([names.index(row.task) for row in rows]), names,
    )  # fmt: skip


def static_choices(choices: int) -> int:
    """Returns the static number of choices that holds `choices`.

    >>> static_choices(2), static_choices(5)
    (2, 8)
    """
    return max(2, 1 << (choices - 1).bit_length())


def read(
    form: Form, task: Any, *, classes: tuple[Any, ...] | None = None, labelled: bool = True, name: str = "task"
) -> Reading:
    """Reads questions with answers: a file or folder of files, a pair, or a source of `metajax.data.multiple_choice`.

    With `labelled=False`, the answers of a file are used only if all its questions have one.

    Raises:
      ValueError: the task is something else, an answer is not a choice, or the model does not know a token.
    """
    del classes  # questions have their own choices
    if isinstance(task, ClassSource):
        return _from_source(form, task, name)
    if isinstance(task, str | os.PathLike):
        path = os.fspath(task)
        if not os.path.exists(path):
            raise ValueError(f"{name} must be {FORMS}, got {path!r}, which does not exist")
        rows = read_questions(question_files(path), answered=True if labelled else None)
        return _encoded(form, rows, "questions", warn=labelled)._replace(name=repr(path))
    if isinstance(task, tuple) and len(task) == 2:
        rows = answered(*task, "questions", "answers")
        return _encoded(form, rows, "questions", warn=True)._replace(name=f"the {name}")
    raise ValueError(f"{name} must be {FORMS}, got {task!r}")


def _from_source(form: Form, source: ClassSource, name: str) -> Reading:
    inputs, answers = source.inputs, source.targets
    if not isinstance(inputs, dict) or not {*_LEAVES} - {"types"} <= set(inputs) <= {*_LEAVES}:
        raise ValueError(f"{name} must be {FORMS}, which the model takes, got {source!r}")
    shape = inputs["tokens"].shape
    for leaf_name, leaf in inputs.items():
        kind = np.bool_ if leaf_name in ("mask", "choice") else np.integer
        if len(shape) != 3 or leaf.shape != shape or not np.issubdtype(leaf.dtype, kind):
            raise ValueError(
                f"{leaf_name} of {source!r} must be {kind.__name__} of shape [n, choices, length], got {leaf.dtype} of "
                f"shape {leaf.shape}"
            )
    if getattr(answers, "shape", None) != source.labels.shape or not np.issubdtype(answers.dtype, np.integer):
        raise ValueError(f"targets of {source!r} must be {len(source.labels)} places of right choices, got {answers!r}")
    kept = np.flatnonzero(source.labels >= 0)
    if not kept.size:
        raise ValueError(f"labels of {source!r} must keep one question at least, got none that is not negative")
    inputs = {leaf_name: leaf.take(kept, axis=0) for leaf_name, leaf in inputs.items()}
    check_tokens(inputs, form.vocabulary, source)
    mask, answers = inputs["mask"], answers[kept].astype(np.int32)
    if (mask.any(axis=-1) & ~(mask & inputs["choice"]).any(axis=-1)).any():
        raise ValueError(f"choice of {source!r} must pick a token of each choice that is there, got none of one")
    lengths = mask.sum(axis=-1).max(axis=-1)
    longest, most = int(lengths.max()), form.lengths[-1]
    if longest > most:
        raise ValueError(f"max_length of {source!r} must be at most {most}, got questions of {longest} tokens")
    _check_answers(answers, mask.any(axis=-1), source)
    inputs = with_choices({"types": np.zeros_like(inputs["tokens"])} | inputs, mask.shape[1])
    return Reading(
        to_length(inputs, longest, form.lengths), answers, (), repr(source), lengths=lengths,
        groups=source.labels[kept], group_names=source.class_names,
    )  # fmt: skip


def _check_answers(answers: np.ndarray, there: np.ndarray, source: ClassSource) -> None:
    known = (answers >= 0) & (answers < there.shape[1])
    known[known] = there[known, answers[known]]
    if not known.all():
        raise ValueError(f"targets of {source!r} must be places of choices, got {answers[~known][0]}")


def with_choices(inputs: dict[str, np.ndarray], choices: int) -> dict[str, np.ndarray]:
    """Pads inputs `[n, choices, length]` with absent choices to the static number that holds `choices`."""
    return {
        name: np.pad(leaf, [(0, 0), (0, static_choices(choices) - leaf.shape[1]), (0, 0)])
        for name, leaf in inputs.items()
    }


reader = Reader(multiple_choice, "text", FORMS, read, encode)
