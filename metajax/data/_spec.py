"""What an episode looks like."""

from __future__ import annotations

import dataclasses

from metajax.core import _validate


@dataclasses.dataclass(frozen=True)
class EpisodeSpec:
    """The size of an episode: N-way, K-shot, Q-query. Frozen and hashable.

    Attributes:
      ways: classes in an episode. Regression sources take 1.
      shots: support examples of a class.
      queries: query examples of a class.

    Raises:
      ValueError: an attribute is not a positive integer.

    >>> EpisodeSpec(ways=5, shots=1, queries=15)
    EpisodeSpec(ways=5, shots=1, queries=15)
    """

    ways: int = 5
    shots: int = 1
    queries: int = 15

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _validate.positive_int(field.name, getattr(self, field.name))
