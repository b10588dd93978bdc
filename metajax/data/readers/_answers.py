"""Splits questions whose answers are spans of a context into windows of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from metajax.data.readers import _tokens
from metajax.data.readers._squad import Question


@dataclasses.dataclass(frozen=True)
class Window:
    """One window of one question; lists have one entry for each of its tokens."""

    id: int
    tokens: list[int]
    types: list[int]
    context: list[bool]
    offsets: list[tuple[int, int]]
    target: tuple[int, int]


def windows(encoder: Any, questions: Sequence[Question], max_length: int, overlap: int) -> list[Window]:
    """Returns the windows of questions; the arguments are those of `question_answering`.

    Raises:
      ValueError: a text has no tokens, or a question leaves no room for its context.
    """
    rows: list[Window] = []
    pairs = [(question.text, question.context) for question in questions]
    encodings = _tokens.encode_pairs(encoder, pairs, [question.where for question in questions])
    for number, (question, encoding) in enumerate(zip(questions, encodings, strict=True)):
        first, behind = _tokens.span_of(encoding, 1)
        if first == behind:
            raise ValueError(f"the context of {question.where} gives no tokens")
        tokens, types, offsets = encoding.ids, encoding.type_ids, encoding.offsets  # each access creates a new list
        answer = _answer_tokens(offsets[first:behind], question)
        room = max_length - (len(tokens) - (behind - first))
        if room < behind - first and room <= overlap:
            raise ValueError(
                f"max_length, {max_length}, must leave room for more than overlap, {overlap}, tokens of context beside "
                f"{question.where}, which leaves {room}"
            )
        starts = range(0, max(behind - first - overlap, 1), room - overlap) if room < behind - first else range(1)
        best = _best_window(starts, room, behind - first, answer)
        for start in starts:
            kept = [*range(first), *range(first + start, min(first + start + room, behind))]
            kept += range(behind, len(tokens))
            rows.append(
                Window(
                    number,
                    [tokens[place] for place in kept],
                    [types[place] for place in kept],
                    [first <= place < behind for place in kept],
                    [offsets[place] for place in kept],
                    (first + answer[0] - start, first + answer[1] - start) if start == best else (-1, -1),
                )
            )
    return rows


def _answer_tokens(offsets: Sequence[tuple[int, int]], question: Question) -> tuple[int, int]:
    """Returns the first and the last token of the context that overlap the first answer."""
    covering = [place for place, (start, end) in enumerate(offsets) if start < question.end and end > question.start]
    if not covering:
        raise ValueError(f"the answer of {question.where}, {question.answers[0]!r}, gives no tokens")
    return covering[0], covering[-1]


def _best_window(starts: Sequence[int], room: int, count: int, answer: tuple[int, int]) -> int | None:
    """Returns the start of the window that holds the answer with most context on its shorter side, or None."""
    margins = {start: min(answer[0] - start, min(start + room, count) - 1 - answer[1]) for start in starts}
    best = max(margins, key=lambda start: margins[start])
    return best if margins[best] >= 0 else None
