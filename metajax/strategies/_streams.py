"""Streams of characters that turn and are renamed, without notice."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from metajax.core import _validate
from metajax.core._types import Episode, Examples
from metajax.data import ClassSource


def character_stream(
    source: ClassSource,
    *,
    seed: int,
    ways: int = 5,
    shots: int = 1,
    queries: int = 5,
    turn: float = 0.0,
    hazard: float = 0.0,
    pool: int | None = None,
    first: int = 0,
) -> Iterator[Episode]:
    """An endless stream of classification rounds whose task drifts, switches, or both.

    All images of round k are turned by `k * turn` degrees: a drift. Before each round but the first, with the
    probability `hazard`, other letters of the pool are drawn and labelled anew: a switch, of which nothing tells. A
    pool of `ways` letters permutes their labels. The images of a round are drawn anew, support and query apart.

    Round k is a function of the arguments and k alone.

    Args:
      source: images `[n, side, side, channels]` of unsigned 8-bit numbers, such as `metajax.data.glyphs`.
      seed: of the stream, 0 or above.
      ways: letters of a round, at least 1.
      shots: support images a letter, at least 1.
      queries: query images a letter, at least 1.
      turn: degrees a round, counter-clockwise.
      hazard: probability of a switch, 0 to 1.
      pool: letters of the whole stream, from `ways` on; None takes all of the source.
      first: round that the stream begins with.

    Yields:
      Episodes of `ways * shots` and `ways * queries` images, float32 in [0, 1].

    Raises:
      ValueError: an argument is out of its range, or the source has too few classes or images.

    >>> import itertools, metajax
    >>> source = metajax.data.glyphs("val", size=14)
    >>> rounds = list(itertools.islice(character_stream(source, seed=0, turn=3.0, hazard=0.1), 2))
    >>> rounds[1].query.inputs.shape
    (25, 14, 14, 1)
    """
    _validate.instance("source", source, ClassSource)
    for name, value in (("seed", seed), ("first", first)):
        _validate.int_at_least(name, value, 0)
    for name, value in (("ways", ways), ("shots", shots), ("queries", queries)):
        _validate.positive_int(name, value)
    pool = source.num_classes if pool is None else _validate.int_at_least("pool", pool, ways)
    if not ways <= pool <= source.num_classes:
        raise ValueError(
            f"ways and pool must be at most {source.num_classes}, the classes of the source, got {ways} and {pool}"
        )
    fewest = int(np.bincount(source.labels, minlength=source.num_classes).min())
    if shots + queries > fewest:
        raise ValueError(f"shots + queries must be at most {fewest}, the images of a class, got {shots + queries}")
    _validate.fraction("hazard", hazard)
    if not np.isfinite(turn):
        raise ValueError(f"turn must be a finite number of degrees, got {turn!r}")
    return _rounds(source, seed, ways, shots, queries, float(turn), float(hazard), pool, first)


def _rounds(
    source: ClassSource, seed: int, ways: int, shots: int, queries: int, turn: float, hazard: float, pool: int,
    first: int,
) -> Iterator[Episode]:  # fmt: skip
    letters = np.random.default_rng([seed, 0]).choice(source.num_classes, pool, replace=False)
    regime = number = 0
    while True:
        rng = np.random.default_rng([seed, 1, number])
        regime += number > 0 and rng.random() < hazard
        if number >= first:
            chosen = np.random.default_rng([seed, 2, regime]).choice(letters, ways, replace=False)
            picked = np.stack(
                [rng.permutation(np.flatnonzero(source.labels == one))[: shots + queries] for one in chosen]
            )
            parts = picked[:, :shots].ravel(), picked[:, shots:].ravel()
            support, query = (_examples(source.inputs[rows], ways, number * turn) for rows in parts)
            yield Episode(support, query)
        number += 1


def _examples(images: np.ndarray, ways: int, degrees: float) -> Examples:
    targets = np.repeat(np.arange(ways, dtype=np.int32), len(images) // ways)
    return Examples(turned(images, degrees), targets, np.ones(len(images), bool))


def turned(images: np.ndarray, degrees: float) -> np.ndarray:
    """Images `[n, side, side, channels]` of unsigned 8-bit numbers, turned counter-clockwise; float32 in [0, 1]."""
    from PIL import Image

    def one(channel: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(channel).rotate(degrees % 360, Image.Resampling.BILINEAR))

    moved = [np.stack([one(image[..., c]) for c in range(image.shape[-1])], axis=-1) for image in images]
    return np.stack(moved).astype(np.float32) / 255
