"""Questions with choices, as the arrays that a model of choices takes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from metajax.adaptation import _tasks
from metajax.core._types import PyTree
from metajax.data import _multiple_choice
from metajax.data._multiple_choice import ChoiceQuestion
from metajax.data._sources import ClassSource
from metajax.pretrained import PretrainedModel

_FORMS = (
    "a .jsonl file of questions or a folder of such, a pair (questions, answers), or a source of "
    "metajax.data.multiple_choice"
)
_LEAVES = ("tokens", "mask", "types", "choice")


def questions_of(questions: Any, name: str = "inputs") -> list[ChoiceQuestion]:
    """Questions as users write them, dicts as the lines of `data.multiple_choice`; their answers are not looked at.

    Args:
      questions: the dicts.
      name: of the argument, for errors.

    Raises:
      ValueError: something else, or no question.

    >>> questions_of([{"question": "Who?", "choices": ["Ada", "Bob"]}])[0].choices
    ('Ada', 'Bob')
    """
    return _read(_records(questions, name), name, answered=False)


def answered(questions: Any, answers: Any, name: str, answers_name: str) -> list[ChoiceQuestion]:
    """Questions and the places or texts of their right choices.

    Args:
      questions: as for `questions_of`.
      answers: of each.
      name: of the questions, for errors.
      answers_name: of the answers, for errors.

    Raises:
      ValueError: as `questions_of`; answers are of another number, or one is no choice.

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
    return _read(with_answers, name, answered=True)


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


def _read(records: Sequence[Mapping[str, Any]], name: str, *, answered: bool) -> list[ChoiceQuestion]:
    return [
        _multiple_choice.read_question(record, f"index {place} of {name}", name, answered=answered)
        for place, record in enumerate(records)
    ]  # fmt: skip


def read_inputs(base: PretrainedModel, rows: Sequence[ChoiceQuestion], name: str = "inputs") -> PyTree:
    """The leaves of `data.multiple_choice`, with static numbers of choices (2, 4, 8, ...) and lengths.

    Raises:
      ValueError: the model has no tokenizer, or a question does not fit into its lengths beside a choice.
    """
    encoder, lengths = _tasks.tokenizer_of(base), _tasks.lengths_of(base)
    width = _width(max(len(row.choices) for row in rows))
    inputs, longest, cut = _multiple_choice.encode_questions(encoder, rows, width, lengths[-1], None)
    if cut:
        warnings.warn(
            f"{cut} of {len(rows)} {name} have more than {lengths[-1]} tokens, and lose their beginnings", stacklevel=2
        )
    return _tasks.to_length(inputs, int(longest.max()), base)


def _width(choices: int) -> int:
    return max(2, 1 << (choices - 1).bit_length())


def read_task(base: PretrainedModel, task: Any) -> _tasks.Labelled:
    """The questions of a task, with the places of their answers as labels.

    Raises:
      ValueError: `task` is none.
    """
    inputs, answers, _, _, name = _examples(base, task)
    return _tasks.Labelled(inputs, answers, (), name)


def read_sources(base: PretrainedModel, tasks: Sequence[Any]) -> list[ClassSource]:
    """Sources of episodes, whose classes are kinds of questions, all with as many choices as the widest.

    Raises:
      ValueError: a task is none.
    """
    found, lengths = [_examples(base, task) for task in tasks], _tasks.lengths_of(base)
    width = max(inputs["mask"].shape[1] for inputs, *_ in found)
    return [
        ClassSource(
            name, "train", _tasks.to_length(_to_width(inputs, width), lengths[-1], base), numbers, names,
            targets=answers, lengths=inputs["mask"].sum(axis=-1).max(axis=-1), length_buckets=lengths, length_axis=2,
        )
        for inputs, answers, numbers, names, name in found
    ]  # fmt: skip


def _examples(
    base: PretrainedModel, task: Any
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, tuple[str, ...], str]:
    """Inputs, places of answers, numbers of kinds of questions, names of these, and the name of the task."""
    if isinstance(task, ClassSource):
        return _from_source(base, task)
    if isinstance(task, str | os.PathLike):
        if not os.path.exists(task):
            raise ValueError(f"task must be {_FORMS}, got {os.fspath(task)!r}, which does not exist")
        rows = _multiple_choice.read_questions(_multiple_choice.question_files(task))
        name = repr(os.fspath(task))
    elif isinstance(task, tuple) and len(task) == 2:
        rows, name = answered(*task, "questions", "answers"), "the task"
    else:
        raise ValueError(f"task must be {_FORMS}, got {task!r}")
    names = tuple(sorted({row.task for row in rows}))
    answers = np.array([row.answer for row in rows], np.int32)
    numbers = np.array([names.index(row.task) for row in rows])
    return read_inputs(base, rows, "questions"), answers, numbers, names, name


def _from_source(
    base: PretrainedModel, source: ClassSource
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, tuple[str, ...], str]:
    inputs, answers = source.inputs, source.targets
    if not isinstance(inputs, dict) or not {*_LEAVES} - {"types"} <= set(inputs) <= {*_LEAVES}:
        raise ValueError(f"task must be {_FORMS}, which the model takes, got {source!r}")
    shape = inputs["tokens"].shape
    for name, leaf in inputs.items():
        kind = np.bool_ if name in ("mask", "choice") else np.integer
        if len(shape) != 3 or leaf.shape != shape or not np.issubdtype(leaf.dtype, kind):
            raise ValueError(
                f"{name} of {source!r} must be {kind.__name__} of shape [n, choices, length], got {leaf.dtype} of "
                f"shape {leaf.shape}"
            )
    if getattr(answers, "shape", None) != source.labels.shape or not np.issubdtype(answers.dtype, np.integer):
        raise ValueError(f"targets of {source!r} must be {len(source.labels)} places of right choices, got {answers!r}")
    kept = np.flatnonzero(source.labels >= 0)
    if not kept.size:
        raise ValueError(f"labels of {source!r} must keep one question at least, got none that is not negative")
    inputs = {name: leaf.take(kept, axis=0) for name, leaf in inputs.items()}
    _tasks.check_tokens(inputs, base, source)
    mask, answers = inputs["mask"], answers[kept].astype(np.int32)
    if (mask.any(axis=-1) & ~(mask & inputs["choice"]).any(axis=-1)).any():
        raise ValueError(f"choice of {source!r} must pick a token of each choice that is there, got none of one")
    longest, most = int(mask.sum(axis=-1).max()), _tasks.lengths_of(base)[-1]
    if longest > most:
        raise ValueError(f"max_length of {source!r} must be at most {most}, got questions of {longest} tokens")
    _check_answers(answers, mask.any(axis=-1), source)
    inputs = _to_width({"types": np.zeros_like(inputs["tokens"])} | inputs, mask.shape[1])
    return _tasks.to_length(inputs, longest, base), answers, source.labels[kept], source.class_names, repr(source)


def _check_answers(answers: np.ndarray, there: np.ndarray, source: ClassSource) -> None:
    known = (answers >= 0) & (answers < there.shape[1])
    known[known] = there[known, answers[known]]
    if not known.all():
        raise ValueError(f"targets of {source!r} must be places of choices, got {answers[~known][0]}")


def _to_width(inputs: PyTree, choices: int) -> PyTree:
    """Inputs with absent choices up to the static number that holds `choices`."""

    def fit(leaf: np.ndarray) -> np.ndarray:
        return np.pad(leaf, [(0, 0), (0, _width(choices) - leaf.shape[1]), (0, 0)])

    return jax.tree.map(fit, inputs)
