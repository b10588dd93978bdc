"""Few-shot regression on sine waves."""

from __future__ import annotations

import dataclasses

import numpy as np

from metajax.core import _validate
from metajax.core._types import Episode, Examples
from metajax.data._sources import SPLITS, Source
from metajax.data._spec import EpisodeSpec

AMPLITUDES = (0.1, 5.0)
PHASES = (0.0, np.pi)
INPUTS = (-5.0, 5.0)


@dataclasses.dataclass(frozen=True)
class _Sinusoids:
    name: str
    split: str

    def check(self, spec: EpisodeSpec) -> None:
        if spec.ways != 1:
            raise ValueError(f"ways must be 1 for {self.name} (a regression task has no classes), got {spec.ways}")

    def sample(self, spec: EpisodeSpec, rng: np.random.Generator) -> Episode:
        amplitude, phase = rng.uniform(*AMPLITUDES), rng.uniform(*PHASES)
        inputs = rng.uniform(*INPUTS, (spec.shots + spec.queries, 1))
        targets = amplitude * np.sin(inputs - phase)
        support, query = (
            Examples(inputs[part].astype(np.float32), targets[part].astype(np.float32), np.ones(count, bool))
            for part, count in ((slice(spec.shots), spec.shots), (slice(spec.shots, None), spec.queries))
        )
        return Episode(support, query)


def sinusoids(*, split: str = "train") -> Source:
    """Sine waves `a sin(x - p)` with amplitude a in [0.1, 5], phase p in [0, pi] and x in [-5, 5], all uniform.

    A task is one wave: `shots` support points and `queries` query points, drawn from the whole range. Inputs
    and targets are float32 `[n, 1]`, class_mask is None, and `ways` is 1. All splits have the same
    distribution; their streams of episodes differ.

    Source: Finn, Abbeel & Levine 2017, "Model-agnostic meta-learning for fast adaptation of deep networks",
    section 5.1 (arXiv:1703.03400).

    Args:
      split: "train", "val" or "test".

    Raises:
      ValueError: another split.

    >>> episode = sinusoids().sample(EpisodeSpec(ways=1, shots=10, queries=5), np.random.default_rng(0))
    >>> episode.support.inputs.shape, episode.query.targets.shape
    ((10, 1), (5, 1))
    """
    return _Sinusoids("sinusoids", _validate.one_of("split", split, SPLITS))
