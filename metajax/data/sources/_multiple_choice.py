"""Multiple-choice questions: a task is a kind of question, and the target is the index of the right choice."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from metajax import tasks as tasks_of
from metajax.core import _validate
from metajax.data._source import SPLITS, ClassSource
from metajax.data.readers import _tokens
from metajax.data.readers._questions import encode_questions, question_files, read_questions
from metajax.data.sources._class_splits import Splits, divide

Path = str | os.PathLike[str]


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
    """Loads multiple-choice questions of any kind (facts, common sense, word inference, stories) from JSON lines.

    Each line is one question:

        {"question": "Who wrote it?", "choices": ["Ada", "Bob"], "answer": 0, "context": "Ada wrote.", "task": "books"}

    `answer` is an index into `choices`, from 0, or the text of a choice. `context` (an optional passage or story)
    precedes the question. `task` names the task; by default it is the name of the file without extensions. Support and
    query of an episode are different questions of one task, `ways` is 1, and `splits` divides the tasks. One source
    over many files mixes their tasks equally; `metajax.data.mixture` mixes sources by weights.

    Each choice is a separate sequence: the pair of the prompt (context and question) and the choice, with the special
    tokens of the tokenizer. An encoder reads `[CLS] prompt [SEP] choice [SEP]`. If the tokenizer puts nothing after the
    choice, as the tokenizers of decoders do, there is nothing between the two either: `prompt choice`, or `<s> prompt
    choice`. `metajax.models.score_choices` computes the logits of choices in both cases.

    Args:
      files: one .jsonl file (or .jsonl.gz), several, or a folder of them.
      tokenizer: a file of the tokenizers library (tokenizer.json), or a folder that holds one.
      split: "train", "val" or "test".
      splits: names of tasks by split, or shares that sum to 1, as for `metajax.data.image_folder`. None gives 64 %
        train, 16 % val and 20 % test; `{"train": 1}` puts all tasks in one split.
      max_length: largest number of tokens of a prompt and a choice, special tokens included. Longer prompts are cut at
        the beginning, never the end of the question or the choice; `source.truncated` counts the questions cut.
      length_buckets: lengths of batches, ascending up to `max_length`; by default a quarter of it, a half and all of
        it.
      num_choices: number of choices of an example, padding included; None takes the largest number in the files. The
        sources of a mixture, and splits with separate files, need the same number.
      choice_prefix: text before each choice. None takes a space, which byte-level tokenizers (GPT-2's) need between
        words, and nothing for tokenizers that add one themselves (SentencePiece).
      name: the name in reports; by default the files.

    Returns:
      A source with inputs `{"tokens": int32, "mask": bool (False: padding), "types": int32 (the tokenizer's types of
      prompt and choice), "choice": bool (tokens of the choice)}`, all `[n, choices, max_length]`. The target is the
      index of the right choice, int32 `[n]`. A choice whose mask is all False does not exist.

    Raises:
      ValueError: a file does not exist, is too large, or has another extension; a line is not a JSON object, has an
        empty text, fewer than 2 choices, two equal choices or more than `num_choices`, or an answer that is not a
        choice; a choice leaves no room for a token of its prompt or has no tokens (each with file and line); the
        tokenizer is invalid; an argument is out of range.
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
