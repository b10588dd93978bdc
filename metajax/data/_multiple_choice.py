"""Multiple-choice questions: a task is a kind of question, and a class is the place of the right choice."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from metajax import tasks as tasks_of
from metajax.core import _validate
from metajax.data import _tokens
from metajax.data._class_splits import Splits, divide
from metajax.data._sources import SPLITS, ClassSource
from metajax.data._text_files import a_text, json_lines, read_content, text_files

Path = str | os.PathLike[str]
_LINES = (".jsonl", ".jsonl.gz")


class ChoiceQuestion(NamedTuple):
    """One question with its choices.

    Attributes:
      task: the kind of question.
      context: what stands in front of it, "" for nothing.
      text: the question.
      choices: texts.
      answer: the place of the right one, -1 where nobody says.
      where: its place, for errors.

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


def multiple_choice(
    files: Path | Sequence[Path],
    *,
    tokenizer: Path,
    split: str = "train",
    splits: Splits | None = None,
    max_length: int = 128,
    length_buckets: Sequence[int] | None = None,
    num_choices: int | None = None,
    choice_prefix: str | None = None,
    name: str | None = None,
) -> ClassSource:
    """Multiple-choice questions of any kind (facts, common sense, word inference, stories) from JSON lines.

    A line is one question:

        {"question": "Who wrote it?", "choices": ["Ada", "Bob"], "answer": 0, "context": "Ada wrote.", "task": "books"}

    `answer` is a place in `choices`, from 0, or a choice's text. `context` (a passage or story; may be left out) stands
    in front of the question. A task is what `task` says, or without it the file (its name without extensions); support
    and query of an episode are different questions of one task, `ways` is 1, and tasks are divided by `splits`. One
    source over many files mixes their tasks equally; `metajax.data.mixture` mixes sources by weights.

    Each choice is a sequence of its own: the pair of the prompt (context and question) and the choice, with the special
    tokens of the tokenizer. So an encoder reads `[CLS] prompt [SEP] choice [SEP]`. Where the tokenizer puts nothing
    behind the choice, as those of decoders, nothing stands between the two either: `prompt choice`, or `<s> prompt
    choice`. `metajax.models.score_choices` makes logits of choices of either.

    Args:
      files: one .jsonl file (or .jsonl.gz), several, or a folder of them.
      tokenizer: a file of the tokenizers library (tokenizer.json), or a folder that holds one.
      split: "train", "val" or "test".
      splits: names of tasks by split, or shares that sum to 1, as for `metajax.data.image_folder`. None is 64 % train,
        16 % val and 20 % test; `{"train": 1}` divides nothing.
      max_length: tokens of a prompt and a choice, special tokens included. Longer prompts lose their beginnings, and
        never the question's end or the choice; `source.truncated` counts their questions.
      length_buckets: lengths that batches come in, ascending up to `max_length`; by default a quarter of it, a half and
        all of it.
      num_choices: choices of an example, padding included; None is the most of any question in the files. Sources of
        one mixture, and splits with files of their own, need one number.
      choice_prefix: stands in front of each choice. None is a space, which tokenizers of bytes (GPT-2's) need between
        words, and nothing for those that put one there themselves (SentencePiece).
      name: what reports call it; by default the files.

    Returns:
      A source with inputs `{"tokens": int32, "mask": bool (False: padding), "types": int32 (what the tokenizer calls
      prompt and choice), "choice": bool (tokens of the choice)}`, all `[n, choices, max_length]`, and the right choice,
      int32 `[n]`, as target. A choice whose mask is all False is not there.

    Raises:
      ValueError: a file is not there, too large, or of another extension; a line is no JSON object, has an empty text,
        fewer than 2 choices, two alike or more than `num_choices`, or an answer that is none of them; a choice leaves
        no room for a token of its prompt or has no tokens (each with file and line); the tokenizer is none; an argument
        is out of range.
      ImportError: the tokenizers library is not installed.

    >>> multiple_choice("no/such/file.jsonl", tokenizer="tokenizer.json")
    Traceback (most recent call last):
      ...
    ValueError: files must name regular files, got 'no/such/file.jsonl', which does not exist
    """
    _validate.one_of("split", split, SPLITS)
    buckets = _tokens.buckets_of(max_length, length_buckets)
    if num_choices is not None:
        _validate.int_at_least("num_choices", num_choices, 2)
    if choice_prefix is not None:
        _validate.instance("choice_prefix", choice_prefix, str)
    paths = question_files(files)
    name = name or (str(files) if isinstance(files, str | os.PathLike) else "+".join(map(str, paths)))
    encoder = _tokens.load_tokenizer(tokenizer, max_length, user="multiple_choice", pair=True)
    rows = read_questions(paths)
    widest = max(rows, key=lambda row: len(row.choices))
    width = num_choices or len(widest.choices)
    if len(widest.choices) > width:
        raise ValueError(f"num_choices is {width}, but {widest.where} has {len(widest.choices)} choices")
    tasks = divide({row.task for row in rows}, split, splits, f"{name} (split by task)")
    number = {task: place for place, task in enumerate(tasks)}
    rows = [row for row in rows if row.task in number]
    inputs, lengths, cut = encode_questions(encoder, rows, width, max_length, choice_prefix)
    return ClassSource(
        name,
        split,
        inputs,
        np.array([number[row.task] for row in rows]),
        tuple(tasks),
        targets=np.array([row.answer for row in rows], np.int32),
        task=tasks_of.multiple_choice,
        lengths=lengths,
        length_buckets=buckets,
        length_axis=2,
        truncated=cut,
    )


def question_files(files: Any) -> tuple[pathlib.Path, ...]:
    """Returns the paths of the files of questions that are given, or that a given folder holds, sorted.

    Raises:
      ValueError: there are none, one is not there, stands there twice (packed and unpacked too) or has another
        extension.
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
        if same != path:  # a question would stand in support and query
            raise ValueError(f"files must be one of each name, got {str(same)!r} and {str(path)!r}")
    return paths


def _stem(path: pathlib.Path) -> str:
    return path.name[: len(path.name.lower().removesuffix(".gz").removesuffix(".jsonl"))]


def read_questions(paths: Sequence[pathlib.Path], *, answered: bool | None = True) -> list[ChoiceQuestion]:
    """The questions of files of JSON lines.

    Args:
      paths: of the files.
      answered: as for `read_question`.

    Raises:
      ValueError: a file has no rows, or a line is no question.
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
    """The question of a line.

    Args:
      record: its fields.
      where: its place, for errors.
      file_task: the task of a line that names none.
      answered: True: it must have an answer; None: it may have one; False: what it has is not read.

    Raises:
      ValueError: a text is empty or none, there are fewer than 2 choices, or the answer is none of them.

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
    """Questions as `multiple_choice` gives them.

    Args:
      encoder: a tokenizer without padding and truncation.
      rows: the questions.
      width: choices of each, padding included.
      max_length: tokens of a prompt and a choice.
      prefix: of choices, as `choice_prefix` of `multiple_choice`.

    Returns:
      The inputs, the longest choice of each row with its prompt, and how many rows lost the beginning of a prompt.

    Raises:
      ValueError: a question or a choice gives no tokens, or no token of a question has room.
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
        tokens, types = encoding.ids, encoding.type_ids  # each access makes a new list
        # what continues the prompt begins no text of its own: Llama's tokenizer puts its <s> in front of both
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
    """A space, unless it would be a token of its own in front of a word that has one already."""
    spaced, plain = (len(encoder.encode(text, add_special_tokens=False).ids) for text in (" a", "a"))
    return " " if spaced <= plain else ""
