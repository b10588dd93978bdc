"""Few-shot language modelling on texts that repeat a secret word."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from metajax.core import _validate
from metajax.core._types import Episode, Examples, PyTree
from metajax.data import _choices
from metajax.data._source import SPLITS, Drawn, MadeSource, Source
from metajax.data._spec import EpisodeSpec
from metajax.tasks import next_token_prediction


@dataclasses.dataclass(frozen=True)
class _Cycles(MadeSource):
    """Draws the tokens of texts."""

    vocab: int
    length: int
    period: int

    def check(self, spec: EpisodeSpec) -> None:
        if spec.ways != 1:
            raise ValueError(f"ways must be 1 for {self.name} (texts have no classes), got {spec.ways}")
        if not isinstance(spec.shots, int):
            raise ValueError(f"shots must be a number for {self.name}, got {spec.shots}")
        if spec.hierarchical:
            raise ValueError(f"hierarchical must be False for {self.name}, which has no nodes, got True")

    def bits(self, spec: EpisodeSpec) -> int:
        return self.period + spec.capacity.support + spec.capacity.query

    def draw(self, spec: EpisodeSpec, tables: PyTree, bits: Any) -> Drawn:
        xp = bits.__array_namespace__()
        word = _choices.below(bits[..., : self.period], self.vocab).astype(np.int32)
        begins = _choices.below(bits[..., self.period :], self.period).astype(np.int32)
        places = (begins[..., None] + xp.arange(self.length + 1, dtype=np.int32)) % self.period
        tokens = xp.take_along_axis(word[..., None, :], places, axis=-1)

        def part(texts: Any) -> Examples:
            return Examples(texts[..., :-1], texts[..., 1:], xp.ones(texts.shape[:-1], bool))

        support = spec.capacity.support
        return Drawn(Episode(part(tokens[..., :support, :]), part(tokens[..., support:, :])))


def cycles(*, split: str = "train", vocab: int = 256, length: int = 64, period: int = 16) -> Source:
    """Returns a source of texts for a language model, where each text of a task repeats the same random word.

    The word of a task has `period` random tokens, and each text begins at a random place of the word. The word
    determines each next token; both the support texts and the beginning of each text reveal the word. Nothing is
    downloaded, and texts may have any length, so that the training of large decoders can be tested and planned.

    Inputs are tokens, int32 `[n, length]`, and targets the tokens that follow them, int32 `[n, length]`; class_mask is
    None, and `ways` is 1. All splits have the same distribution; their streams of episodes differ.

    Args:
      split: "train", "val" or "test".
      vocab: number of different tokens.
      length: number of tokens in a text.
      period: number of tokens in the word.

    Raises:
      ValueError: the split is unknown, or a size is below 1.

    >>> from metajax.data._episodes import episode
    >>> drawn = episode(cycles(length=6, period=2), EpisodeSpec(ways=1, shots=3, queries=2), seed=0, index=0)
    >>> drawn.support.inputs.shape, bool((drawn.query.inputs[:, 2:] == drawn.query.inputs[:, :-2]).all())
    ((3, 6), True)
    """
    for name, size in (("vocab", vocab), ("length", length), ("period", period)):
        _validate.positive_int(name, size)
    split = _validate.one_of("split", split, SPLITS)
    return _Cycles("cycles", split, vocab, length, period, task=next_token_prediction)
