"""Streams of characters that rotate and get new labels, without notice."""

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
    """Returns an endless stream of classification rounds whose task drifts, switches, or both.

    All images of round k are rotated by `k * turn` degrees: a drift. Before each round except the first, with the
    probability `hazard`, letters of the pool are drawn and labelled again: an unannounced switch. With a pool of `ways`
    letters, a switch permutes their labels. Each round draws its own images, different ones for support and query.

    Round k depends only on the arguments and k.

    Args:
      source: images `[n, side, side, channels]` of unsigned 8-bit numbers, such as `metajax.data.glyphs`.
      seed: the seed of the stream, 0 or above.
      ways: number of letters in a round, at least 1.
      shots: number of support images for each letter, at least 1.
      queries: number of query images for each letter, at least 1.
      turn: rotation in degrees per round, counter-clockwise.
      hazard: probability of a switch, 0 to 1.
      pool: number of letters in the whole stream, at least `ways`; None uses all letters of the source.
      first: the round with which the stream begins.

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
    """Rotates images `[n, side, side, channels]` of unsigned 8-bit numbers counter-clockwise; float32 in [0, 1]."""
    from PIL import Image

    def one(channel: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(channel).rotate(degrees % 360, Image.Resampling.BILINEAR))

    moved = [np.stack([one(image[..., c]) for c in range(image.shape[-1])], axis=-1) for image in images]
    return np.stack(moved).astype(np.float32) / 255
