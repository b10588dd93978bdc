"""The specification of episodes: the sampling rule, and the static shapes that hold episodes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from metajax.core import _validate

Range = int | tuple[int, int]


class Bucket(NamedTuple):
    """A static size of episodes; smaller episodes are padded to it.

    Attributes:
      ways: length of the class mask.
      support: rows of the support set.
      query: rows of the query set.

    >>> Bucket(5, 5, 75)
    Bucket(ways=5, support=5, query=75)
    """

    ways: int
    support: int
    query: int


@dataclasses.dataclass(frozen=True)
class Imbalanced:
    """Support sets of random size that follow the frequencies of classes: the rule of Meta-Dataset.

    With n_c examples in class c of the episode and q queries per class, the size of the support set is
    `min(support, sum_c ceil(beta * min(per_class, n_c - q)))` with beta uniform in (0, 1]. Class c gets
    `min(floor(p_c * (size - ways)) + 1, n_c - q)` of these examples, where p_c is proportional to
    `exp(a_c) * n_c` and a_c is uniform in `log_weights`.

    Source: Triantafillou et al. 2020, "Meta-Dataset: a dataset of datasets for learning to learn from few
    examples", section 3.2 (arXiv:1903.03096).

    Attributes:
      support: size of the largest support set.
      per_class: the most examples of a class that count towards the size of the support set.
      log_weights: bounds of a_c; equal bounds keep the frequencies of the source.

    Raises:
      ValueError: a size is not a positive integer, or the bounds are not finite and in order.

    >>> EpisodeSpec(ways=(5, 50), shots=Imbalanced(), queries=10).largest
    Bucket(ways=50, support=500, query=500)
    """

    support: int = 500
    per_class: int = 100
    log_weights: tuple[float, float] = (-math.log(2), math.log(2))

    def __post_init__(self) -> None:
        _validate.positive_int("support", self.support)
        _validate.positive_int("per_class", self.per_class)
        bounds = self.log_weights
        if not isinstance(bounds, tuple) or len(bounds) != 2 or not -math.inf < bounds[0] <= bounds[1] < math.inf:
            raise ValueError(f"log_weights must be a pair of finite numbers in order, got {bounds!r}")


@dataclasses.dataclass(frozen=True)
class EpisodeSpec:
    """The rule for sampling episodes. Frozen and hashable.

    Fixed sizes give N-way, K-shot, Q-query episodes. A pair `(low, high)` draws the number for each episode,
    uniformly and with both ends included; ways never exceed the number of available classes. `Imbalanced` shots
    draw a support set by the rule of Meta-Dataset. Then `queries` is an upper bound too: the query set holds
    `min(queries, half of the smallest class)` examples of each class.

    Shapes are always static. An episode is padded to the smallest of `sizes` that holds it, with masks for
    examples and classes. The episodes of a batch share the size of the largest episode in it. A run therefore
    compiles only once for each size.

    Attributes:
      ways: number of classes in an episode. Regression sources need 1.
      shots: number of support examples of a class.
      queries: number of query examples of a class.
      hierarchical: whether to draw the classes from one node of the source's hierarchy (an alphabet, a domain, a
        subtree), chosen uniformly among the nodes with enough classes.
      buckets: `(ways, support, query)` sizes; the largest must hold every episode. By default there is one size if
        sizes are fixed, else three: all, half and a quarter of the rows that an episode can have.

    Raises:
      ValueError: an attribute is out of range, or a bucket table cannot hold every episode.

    >>> EpisodeSpec(ways=5, shots=1, queries=15)
    EpisodeSpec(ways=5, shots=1, queries=15, hierarchical=False, buckets=())
    >>> print(EpisodeSpec(ways=(5, 20), shots=(1, 5), queries=10))
    5 to 20 ways, 1 to 5 shots, 10 queries a class
    """

    ways: Range = 5
    shots: Range | Imbalanced = 1
    queries: int = 15
    hierarchical: bool = False
    buckets: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        _range("ways", self.ways)
        if not isinstance(self.shots, Imbalanced):
            _range("shots", self.shots)
        elif self.shots.support < self.max_ways:
            raise ValueError(f"shots.support must hold one example of each of {self.max_ways} ways, got {self.shots}")
        _validate.positive_int("queries", self.queries)
        _validate.instance("hierarchical", self.hierarchical, bool)
        if self.buckets:
            self._check_buckets()

    def _check_buckets(self) -> None:
        if not isinstance(self.buckets, tuple) or not all(
            isinstance(bucket, tuple) and len(bucket) == 3 for bucket in self.buckets
        ):
            raise ValueError(f"buckets must be a tuple of (ways, support, query), got {self.buckets!r}")
        for bucket in self.buckets:
            for name, size in zip(Bucket._fields, bucket, strict=True):
                _validate.positive_int(f"{name} of a bucket", size)
        if not any(_holds(bucket, self.largest) for bucket in self.buckets):
            raise ValueError(
                f"buckets must have one that holds the largest episode, {tuple(self.largest)} (ways, support, query), "
                f"got {self.buckets}"
            )

    @property
    def min_ways(self) -> int:
        """Smallest number of classes in an episode."""
        return self.ways[0] if isinstance(self.ways, tuple) else self.ways

    @property
    def max_ways(self) -> int:
        """Largest number of classes in an episode: the number of outputs that a head needs."""
        return self.ways[1] if isinstance(self.ways, tuple) else self.ways

    @property
    def max_shots(self) -> int:
        """Largest number of support examples of one class."""
        if isinstance(self.shots, Imbalanced):
            return self.shots.support - self.min_ways + 1
        return self.shots[1] if isinstance(self.shots, tuple) else self.shots

    @property
    def is_fixed(self) -> bool:
        """Whether every episode has the same size, and so no padding."""
        return isinstance(self.ways, int) and isinstance(self.shots, int)

    @property
    def largest(self) -> Bucket:
        """Size of the largest episode."""
        whole = isinstance(self.shots, Imbalanced)
        support = self.shots.support if whole else self.max_ways * self.max_shots  # type: ignore[union-attr]
        return Bucket(self.max_ways, support, self.max_ways * self.queries)

    @property
    def sizes(self) -> tuple[Bucket, ...]:
        """Possible sizes of batches of episodes, smallest first."""
        if self.buckets:
            return tuple(sorted((Bucket(*bucket) for bucket in self.buckets), key=lambda size: size[1] + size[2]))
        ways, support, query = self.largest
        parts = (1,) if self.is_fixed else (4, 2, 1)
        return tuple(Bucket(ways, -(-support // part), -(-query // part)) for part in parts)

    @property
    def pads(self) -> bool:
        """Whether an episode can have padding."""
        return not self.is_fixed or self.capacity != self.largest

    @property
    def capacity(self) -> Bucket:
        """Size that holds each of `sizes`: episodes are drawn into this many slots and then cut."""
        return Bucket(*map(max, *self.sizes, self.sizes[0]))

    def size_for(self, ways: int, support: int, query: int) -> Bucket:
        """Returns the smallest of `sizes` that holds an episode of this size.

        >>> EpisodeSpec(ways=(2, 4), shots=2, queries=4).size_for(ways=2, support=4, query=8)
        Bucket(ways=4, support=4, query=8)
        """
        return next(size for size in self.sizes if _holds(size, Bucket(ways, support, query)))

    def __str__(self) -> str:
        ways = f"{self.ways}-way" if isinstance(self.ways, int) else f"{told(self.ways)} ways"
        if isinstance(self.shots, Imbalanced):
            size = f"{ways}, imbalanced support of up to {self.shots.support}, up to {self.queries} queries a class"
        elif self.is_fixed:
            size = f"{ways} {self.shots}-shot, {self.queries} queries a class"
        else:
            size = f"{ways}, {told(self.shots)} shots, {self.queries} queries a class"
        return size + (", classes of one node" if self.hierarchical else "")


def _range(name: str, value: Any) -> None:
    pair = ", a pair (low, high) or Imbalanced(...)" if name == "shots" else " or a pair (low, high)"
    if not isinstance(value, tuple):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1{pair}, got {value!r}")
    elif len(value) != 2 or _validate.positive_int(name, value[0]) > _validate.positive_int(name, value[1]):
        raise ValueError(f"{name} must be an integer of at least 1{pair}, got {value!r}")


def _holds(size: tuple[int, ...], episode: tuple[int, ...]) -> bool:
    return all(there >= needed for there, needed in zip(size, episode, strict=True))


def told(value: Any) -> str:
    """Formats a size in words.

    >>> told((5, 10))
    '5 to 10'
    """
    return f"{value[0]} to {value[1]}" if isinstance(value, tuple) else str(value)
