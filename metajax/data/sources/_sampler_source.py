"""A source that calls a user's function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from metajax.core import _validate
from metajax.core._types import Episode, Examples, PyTree, TaskType
from metajax.data._source import SPLITS, Drawn, MadeSource, Source
from metajax.data._spec import EpisodeSpec

Sample = Callable[[EpisodeSpec, np.random.Generator], Episode]


@dataclasses.dataclass(frozen=True, eq=False)
class _SamplerSource(MadeSource):
    """Draws values with a NumPy generator that is seeded by the bits; on the host only."""

    sample: Sample
    host_only: bool = True

    def check(self, spec: EpisodeSpec) -> None:
        self._padded(spec, self.sample(spec, np.random.default_rng(0)))

    def bits(self, spec: EpisodeSpec) -> int:
        return 4  # the key of a generator

    def draw(self, spec: EpisodeSpec, tables: PyTree, bits: Any) -> Drawn:
        keys = np.ascontiguousarray(bits).view(np.uint64)
        several = [self.sample(spec, np.random.Generator(np.random.Philox(key=key))) for key in keys]
        padded = [self._padded(spec, episode) for episode in several]
        return Drawn(jax.tree.map(lambda *leaves: np.stack(leaves), *padded))

    def _padded(self, spec: EpisodeSpec, episode: Any) -> Episode:
        if not isinstance(episode, Episode) or not all(isinstance(part, Examples) for part in episode):
            raise ValueError(f"sample of {self.name} must return an Episode of Examples, got {type(episode).__name__}")
        ways, *slots = spec.capacity

        def pad(what: str, leaf: Any, size: int) -> np.ndarray:
            leaf = np.asarray(leaf)
            if not leaf.ndim or len(leaf) > size:
                raise ValueError(
                    f"sample of {self.name} must return at most {size} {what} for {spec!r}, got shape {leaf.shape}"
                )
            return np.concatenate([leaf, np.zeros([size - len(leaf), *leaf.shape[1:]], leaf.dtype)])

        def fill(part: Examples, size: int, name: str) -> Examples:
            present = part.class_mask if part.class_mask is None else pad("classes", part.class_mask, ways)
            rest = jax.tree.map(lambda leaf: pad(f"{name} examples", leaf, size), part._replace(class_mask=None))
            return rest._replace(class_mask=present)

        return Episode(*map(fill, episode, slots, ("support", "query")))


def from_sampler(sample: Sample, *, name: str = "tasks", split: str = "train", task: TaskType | None = None) -> Source:
    """Returns a source that calls a function for each task: simulators, regression, sequences, anything in NumPy.

    Args:
      sample: `(spec, rng) -> Episode` with NumPy leaves. It must depend only on its arguments; `rng` is seeded by the
        seed and the number of the episode. It may return fewer examples than `spec` allows; they are padded.
      name: the name in reports.
      split: "train", "val" or "test".
      task: the task type of the episodes; None leaves it unspecified, and then learners are not checked against it.

    Raises:
      ValueError: the split is unknown; or (when episodes are drawn) the function returns something that is not an
        episode, or an episode that is too large for the spec.

    >>> def line(spec, rng):
    ...     slope, x = rng.normal(), rng.normal(size=[spec.max_shots + spec.queries, 1])
    ...     part = lambda x: Examples(x, slope * x, np.ones(len(x), bool))
    ...     return Episode(part(x[: spec.max_shots]), part(x[spec.max_shots :]))
    >>> from metajax.data._episodes import episode
    >>> episode(from_sampler(line), EpisodeSpec(1, 10, 5), seed=0, index=3).query.targets.shape
    (5, 1)
    """
    if not callable(sample):
        raise ValueError(f"sample must be a function (spec, rng) -> Episode, got {sample!r}")
    return _SamplerSource(name, _validate.one_of("split", split, SPLITS), sample, task=task)
