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
from metajax.data._multiple_choice import ChoiceQuestion, encode_questions, read_question, read_questions
from metajax.data._sources import ClassSource
from metajax.data._text_files import text_files
from metajax.pretrained import PretrainedModel

_FORMS = "a .jsonl file of questions, a pair (questions, answers), or a source of metajax.data.multiple_choice"
_LEAVES = ("tokens", "mask", "types", "choice")


def questions_of(questions: Any, answers: Any = None, name: str = "inputs") -> list[ChoiceQuestion]:
    """Questions as users write them.

    Args:
      questions: dicts as the lines of `data.multiple_choice`.
      answers: a place or a text of each, or None where nobody says.
      name: of the argument, for errors.

    Raises:
      ValueError: something else, no question, or another number of answers.

    >>> questions_of([{"question": "Who?", "choices": ["Ada", "Bob"]}], ["Bob"])[0].answer
    1
    """
    if isinstance(questions, str | Mapping) or not isinstance(questions, Sequence | np.ndarray) or not len(questions):
        raise ValueError(f"{name} must be a list of one question or more, got {questions!r}")
    for place, question in enumerate(questions):
        if not isinstance(question, Mapping):
            raise ValueError(
                f"index {place} of {name} must be a question, {{'question': ..., 'choices': [...]}}, got {question!r}"
            )
    if answers is not None:
        answers = [answer.item() if isinstance(answer, np.generic) else answer for answer in answers]
        if len(answers) != len(questions):
            raise ValueError(f"labels must be one for each of the {len(questions)} questions, got {len(answers)}")
        questions = [
            {**question, "answer": answer} for question, answer in zip(questions, answers, strict=True)
        ]  # fmt: skip
    return [
        read_question(question, f"index {place} of {name}", name, answered=answers is not None)
        for place, question in enumerate(questions)
    ]


def read_inputs(base: PretrainedModel, rows: Sequence[ChoiceQuestion], name: str = "inputs") -> PyTree:
    """The leaves of `data.multiple_choice`, with static numbers of choices (2, 4, 8, ...) and lengths.

    Raises:
      ValueError: the model has no tokenizer, or a question does not fit into its lengths beside a choice.
    """
    encoder, lengths = _tasks.tokenizer_of(base), _tasks.lengths_of(base)
    width = _width(max(len(row.choices) for row in rows))
    inputs, longest, cut = encode_questions(encoder, rows, width, lengths[-1], None)
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
        rows, name = read_questions(text_files([task])), repr(os.fspath(task))
    elif isinstance(task, tuple) and len(task) == 2:
        rows, name = questions_of(*task, name="questions"), "the task"
    else:
        raise ValueError(f"task must be {_FORMS}, got {task!r}")
    names = tuple(sorted({row.task for row in rows}))
    answers = np.array([row.answer for row in rows], np.int32)
    numbers = np.array([names.index(row.task) for row in rows])
    return read_inputs(base, rows, "questions"), answers, numbers, names, name


def _from_source(
    base: PretrainedModel, source: ClassSource
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, tuple[str, ...], str]:
    kept = np.flatnonzero(source.labels >= 0)
    inputs = source.inputs
    if not isinstance(inputs, dict) or not {*_LEAVES} - {"types"} <= set(inputs) <= {*_LEAVES}:
        raise ValueError(f"task must be {_FORMS}, which the model takes, got {source!r}")
    inputs = {name: leaf.take(kept, axis=0) for name, leaf in inputs.items()}
    _tasks.check_tokens(inputs, base, source)
    mask, answers = inputs["mask"], np.asarray(source.targets)[kept].astype(np.int32)
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
