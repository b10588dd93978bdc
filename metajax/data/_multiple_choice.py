"""Multiple-choice questions: a task is a kind of question, and a class is the place of the right choice."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from metajax import tasks as tasks_of
from metajax.core import _validate
from metajax.data._class_splits import Splits, divide
from metajax.data._sources import SPLITS, ClassSource
from metajax.data.readers import _tokens
from metajax.data.readers._questions import encode_questions, question_files, read_questions

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
