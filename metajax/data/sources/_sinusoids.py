"""Few-shot regression on sine waves."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from metajax.core import _validate
from metajax.core._types import Episode, Examples, PyTree
from metajax.data import _choices
from metajax.data._source import SPLITS, Drawn, MadeSource, Source
from metajax.data._spec import EpisodeSpec, Imbalanced
from metajax.tasks import regression

AMPLITUDES = (0.1, 5.0)
PHASES = (0.0, float(np.pi))
INPUTS = (-5.0, 5.0)


@dataclasses.dataclass(frozen=True)
class _Sinusoids(MadeSource):
    """Draws the points of waves."""

    def check(self, spec: EpisodeSpec) -> None:
        if spec.ways != 1:
            raise ValueError(f"ways must be 1 for {self.name} (a regression task has no classes), got {spec.ways}")
        if isinstance(spec.shots, Imbalanced):
            raise ValueError(
                f"shots must be a number or a pair for {self.name}, which has no classes, got {spec.shots}"
            )
        if spec.hierarchical:
            raise ValueError(f"hierarchical must be False for {self.name}, which has no nodes, got True")

    def bits(self, spec: EpisodeSpec) -> int:
        return 3 + spec.capacity.support + spec.capacity.query

    def draw(self, spec: EpisodeSpec, tables: PyTree, bits: Any) -> Drawn:
        xp = bits.__array_namespace__()
        amplitude, phase, inputs = (
            np.float32(low) + np.float32(high - low) * _choices.uniform(bits[..., part])
            for (low, high), part in ((AMPLITUDES, slice(0, 1)), (PHASES, slice(1, 2)), (INPUTS, slice(3, None)))
        )
        targets = amplitude * xp.sin(inputs - phase)
        low, high = spec.shots if isinstance(spec.shots, tuple) else (spec.shots, spec.shots)
        shots = low + _choices.below(bits[..., 2:3], high - low + 1)  # type: ignore[operator]

        def part(slots: slice, size: Any) -> Examples:
            mask = xp.arange(slots.stop - slots.start) < size
            x, y = (xp.where(mask, values[..., slots], 0)[..., None] for values in (inputs, targets))
            return Examples(x, y, xp.broadcast_to(mask, x.shape[:-1]))

        _, support, query = spec.capacity
        return Drawn(Episode(part(slice(0, support), shots), part(slice(support, support + query), spec.queries)))


def sinusoids(*, split: str = "train") -> Source:
    """Returns a source of sine waves `a sin(x - p)`.

    Amplitude a in [0.1, 5], phase p in [0, pi] and x in [-5, 5] are all uniform.

    A task is one wave: `shots` support points and `queries` query points, drawn from the whole range. Inputs
    and targets are float32 `[n, 1]`, class_mask is None, and `ways` is 1. All splits have the same
    distribution; their streams of episodes differ.

    Source: Finn, Abbeel & Levine 2017, "Model-agnostic meta-learning for fast adaptation of deep networks",
    section 5.1 (arXiv:1703.03400).

    Args:
      split: "train", "val" or "test".

    Raises:
      ValueError: the split is unknown.

    >>> from metajax.data._episodes import episode
    >>> drawn = episode(sinusoids(), EpisodeSpec(ways=1, shots=10, queries=5), seed=0, index=0)
    >>> drawn.support.inputs.shape, drawn.query.targets.shape
    ((10, 1), (5, 1))
    """
    return _Sinusoids("sinusoids", _validate.one_of("split", split, SPLITS), task=regression)
