"""What a source of episodes is, and the class-indexed source that the image sources share.

A source draws one task from one NumPy generator and knows nothing of batches, devices or TensorFlow.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from metajax.core import _validate
from metajax.core._types import Episode, Examples
from metajax.data._spec import EpisodeSpec

SPLITS = ("train", "val", "test")


class Source(Protocol):
    """Anything that episodes are drawn from.

    Attributes:
      name: what reports call it.
      split: "train", "val" or "test".
    """

    @property
    def name(self) -> str: ...

    @property
    def split(self) -> str: ...

    def check(self, spec: EpisodeSpec) -> None:
        """Raises a ValueError where this source cannot give episodes of this size."""
        ...

    def sample(self, spec: EpisodeSpec, rng: np.random.Generator) -> Episode:
        """Draws one episode; leaves are NumPy arrays without a task axis."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class ClassSource:
    """Examples that are indexed by class, held in memory.

    Attributes:
      name: what reports call it.
      split: "train", "val" or "test".
      inputs: `[n, ...]`, all examples; images are uint8 `[n, height, width, channels]`.
      labels: `[n]` integers in `[0, num_classes)`.
      class_names: one name for each class.
      groups: `[num_classes]` integers or None. Classes that share a group (characters that look alike)
        never stand in one episode.
      families: `[n]` integers or None. Support and query of a class come from different families where
        the class has enough examples outside the families of its support (fonts, writers).

    Raises:
      ValueError: lengths disagree, labels, groups or families are no integers, or a class has fewer than two examples.

    >>> import numpy as np
    >>> source = ClassSource("toy", "train", np.arange(6.0)[:, None], np.array([0, 0, 0, 1, 1, 1]), ("a", "b"))
    >>> source.sample(EpisodeSpec(2, 1, 2), np.random.default_rng(0)).query.inputs.shape
    (4, 1)
    """

    name: str
    split: str
    inputs: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    groups: np.ndarray | None = None
    families: np.ndarray | None = None
    members: tuple[np.ndarray, ...] = dataclasses.field(init=False, repr=False)
    _by_class: np.ndarray = dataclasses.field(init=False, repr=False)  # rows, class after class
    _first: np.ndarray = dataclasses.field(init=False, repr=False)  # where a class starts in them
    _counts: np.ndarray = dataclasses.field(init=False, repr=False)  # and how many it has
    _family: np.ndarray | None = dataclasses.field(init=False, repr=False)  # numbered from 0

    def __post_init__(self) -> None:
        _validate.one_of("split", self.split, SPLITS)
        object.__setattr__(self, "inputs", np.asarray(self.inputs))
        for name in ("labels", "groups", "families"):
            if getattr(self, name) is not None:
                line = np.asarray(getattr(self, name))
                if line.ndim != 1 or not np.issubdtype(line.dtype, np.integer):
                    raise ValueError(f"{name} must be a line of integers, got {line.dtype} of shape {line.shape}")
                object.__setattr__(self, name, line)
        for name, value, length, what in (
            ("labels", self.labels, len(self.inputs), "inputs"),
            ("groups", self.groups, self.num_classes, "classes"),
            ("families", self.families, len(self.inputs), "inputs"),
        ):
            if value is not None and len(value) != length:
                raise ValueError(f"{name} must have one entry for each of the {length} {what}, got {len(value)}")
        if self.num_classes == 0:
            raise ValueError(f"class_names of {self.name} ({self.split}) is empty; a source needs at least one class")
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < self.num_classes:
            raise ValueError(
                f"labels must lie in [0, {self.num_classes}), got {self.labels.min()} to {self.labels.max()}"
            )
        by_class = np.argsort(self.labels, kind="stable")
        counts = np.bincount(self.labels, minlength=self.num_classes)
        first = np.cumsum(counts) - counts
        for name, count in zip(self.class_names, counts, strict=True):
            if count < 2:
                raise ValueError(
                    f"class {name!r} of {self.name} has {count} example(s); "
                    "a class needs at least 2, one for the support set and one for the query set"
                )
        family = None if self.families is None else np.unique(self.families, return_inverse=True)[1]
        object.__setattr__(self, "members", tuple(np.split(by_class, first[1:])))
        object.__setattr__(self, "_by_class", by_class)
        object.__setattr__(self, "_first", first)
        object.__setattr__(self, "_counts", counts)
        object.__setattr__(self, "_family", family)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def check(self, spec: EpisodeSpec) -> None:
        """Raises a ValueError where a class or the source is too small for `spec`."""
        available = self.num_classes if self.groups is None else len(np.unique(self.groups))
        if spec.ways > available:
            what = "classes" if self.groups is None else "classes that may stand in one episode"
            raise ValueError(f"ways is {spec.ways}, but {self.name} ({self.split}) has {available} {what}")
        smallest = int(np.argmin(self._counts))
        if spec.shots + spec.queries > self._counts[smallest]:
            raise ValueError(
                f"shots + queries is {spec.shots} + {spec.queries} = {spec.shots + spec.queries}, but class "
                f"{self.class_names[smallest]!r} of {self.name} ({self.split}) has "
                f"{self._counts[smallest]} examples"
            )

    def sample(self, spec: EpisodeSpec, rng: np.random.Generator) -> Episode:
        """Draws classes without replacement, then disjoint support and query examples of each."""
        support, query = self.draw(spec, rng)
        return self.gather(spec, support, query)

    def draw(self, spec: EpisodeSpec, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draws one episode as rows of `inputs`: support `[ways * shots]` and query `[ways * queries]`, class by class.

        Classes come in random order, one that shares a group with an earlier one is passed over. Every set of
        examples of a class is equally likely (with families: the support comes from as few families as hold it).
        """
        classes = self._draw_classes(spec.ways, rng)
        counts = self._counts[classes]
        width = int(counts.max())
        keys = rng.random((spec.ways, width))  # examples sorted by random keys are examples in random order
        if int(counts.min()) < width:
            keys[np.arange(width) >= counts[:, None]] = 2.0  # past the end of a small class: behind all others
        first = self._first[classes][:, None]
        if self._family is None:
            rows = self._by_class[first + _smallest(keys, spec.shots + spec.queries)]
            return rows[:, : spec.shots].reshape(-1), rows[:, spec.shots :].reshape(-1)
        order = np.argsort(keys, axis=1)
        return self._draw_across_families(spec, rng, first + order, np.arange(width) < counts[:, None])

    def gather(self, spec: EpisodeSpec, support: np.ndarray, query: np.ndarray) -> Episode:
        """Makes episodes of drawn rows; rows may have leading task axes, which the leaves then have too."""
        return Episode(self._examples(support, spec.ways, spec.shots), self._examples(query, spec.ways, spec.queries))

    def _examples(self, rows: np.ndarray, ways: int, each: int) -> Examples:
        targets = np.repeat(np.arange(ways, dtype=np.int32), each)
        return Examples(
            inputs=np.take(self.inputs, rows, axis=0),
            targets=np.broadcast_to(targets, rows.shape).copy(),
            mask=np.ones(rows.shape, bool),
            class_mask=np.ones((*rows.shape[:-1], ways), bool),
        )

    def _draw_classes(self, ways: int, rng: np.random.Generator) -> np.ndarray:
        if self.groups is None:
            return rng.choice(self.num_classes, ways, replace=False)
        order = rng.permutation(self.num_classes)
        first = np.unique(self.groups[order], return_index=True)[1]  # where each group comes first in that order
        return order[np.sort(first)[:ways]]

    def _draw_across_families(
        self, spec: EpisodeSpec, rng: np.random.Generator, places: np.ndarray, valid: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws from `places` `[ways, width]` (into `_by_class`, in random order, the `valid` ones first)."""
        assert self._family is not None
        line = np.arange(spec.ways)[:, None]
        rows = self._by_class[np.where(valid, places, places[:, :1])]
        family = self._family[rows]
        families = int(self._family.max()) + 1
        rank = rng.random((spec.ways, families))
        by_family = np.argsort(np.where(valid, rank[line, family], 2.0), axis=1, kind="stable")  # whole families
        support = np.take_along_axis(rows, by_family[:, : spec.shots], axis=1)
        used = np.zeros((spec.ways, families), bool)
        used[line, self._family[support]] = True
        elsewhere = valid & ~used[line, family]
        query = np.take_along_axis(rows, np.argsort(~elsewhere, axis=1, kind="stable")[:, : spec.queries], axis=1)
        short = np.flatnonzero(elsewhere.sum(axis=1) < spec.queries)
        for index in short:  # too few in other families: whatever the support left, far families first
            left = by_family[index, spec.shots : int(valid[index].sum())]
            query[index] = rows[index, left[len(left) - spec.queries :]]
        return support.reshape(-1), query.reshape(-1)


def _smallest(keys: np.ndarray, count: int) -> np.ndarray:
    """Columns of the `count` smallest keys of each row, in order of their keys."""
    if keys.shape[1] < 4 * count:
        return np.argsort(keys, axis=1)[:, :count]
    columns = np.argpartition(keys, count - 1, axis=1)[:, :count]
    order = np.argsort(np.take_along_axis(keys, columns, axis=1), axis=1)
    return np.take_along_axis(columns, order, axis=1)
