"""Single episodes of a stream. Episode k depends only on the source, the spec, the seed and k."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from metajax.core import _validate
from metajax.core._types import Episode, Examples, PyTree
from metajax.data._source import SPLITS, Drawn, Source, Take, cut_to, read
from metajax.data._spec import EpisodeSpec

EPISODES, BATCHES = 0, 1  # kinds of stream; they share no random numbers


def episode(source: Source, spec: EpisodeSpec, *, seed: int, index: int) -> Episode:
    """Returns episode `index` of the stream `seed`, with NumPy leaves `[n, ...]`; does not need TensorFlow.

    Raises:
      ValueError: an argument is out of range, or the source is too small for `spec`.

    >>> from metajax.data.sources._sinusoids import sinusoids
    >>> episode(sinusoids(), EpisodeSpec(1, 10, 5), seed=0, index=3).query.inputs.shape
    (5, 1)
    """
    _validate.int_at_least("index", index, 0)
    return jax.tree.map(lambda leaf: leaf[0], episode_batch(source, spec, seed=seed, start=index, count=1))


def episode_batch(source: Source, spec: EpisodeSpec, *, seed: int, start: int, count: int) -> Episode:
    """Returns episodes `start` to `start + count - 1` of the stream `seed`, stacked: NumPy leaves `[count, n, ...]`.

    Episodes of varying size are padded to the smallest of `spec.sizes` that holds them all. TensorFlow is not needed.

    Raises:
      ValueError: an argument is out of range, or the source is too small for `spec`.

    >>> from metajax.data.sources._sinusoids import sinusoids
    >>> spec = EpisodeSpec(1, 10, 5)
    >>> several = episode_batch(sinusoids(), spec, seed=0, start=2, count=8)
    >>> bool((several.query.inputs[1] == episode(sinusoids(), spec, seed=0, index=3).query.inputs).all())
    True
    """
    check_source(source, spec)
    _validate.int_at_least("start", start, 0)
    _validate.positive_int("count", count)
    drawn = draw_batches(source, spec, Numbers(source, seed, EPISODES), start, batch=count, batches=1)
    drawn = jax.tree.map(lambda leaf: leaf[0], drawn)
    return source.finish(cut(drawn), source.examples, taker(source, drawn.length))


class Batch(NamedTuple):
    """Drawn episodes of batches; the episodes of each batch share a static size.

    Attributes:
      drawn: the episodes, of size `spec.capacity`.
      size: `[..., 3]` ways, support and query slots of the batch.
      length: `[...]`, the length of the batch's sequences; 0 if examples have no length.
    """

    drawn: Drawn
    size: Any
    length: Any


def draw_batches(
    source: Source, spec: EpisodeSpec, numbers: Numbers, start: int, *, batch: int, batches: int,
    tables: PyTree = None,
) -> Batch:  # fmt: skip
    """Draws the episodes from `start` on, as NumPy arrays `[batches, batch, ...]`, and finds each batch's size."""
    tables = source.tables(spec) if tables is None else tables
    drawn = source.draw(spec, tables, numbers(range(start, start + batches * batch), source.bits(spec)))
    length = np.zeros(batches, int)
    if source.length_buckets:
        longest = source.longest(drawn).reshape(batches, batch).max(axis=1)
        length = np.array([next(bucket for bucket in source.length_buckets if bucket >= most) for most in longest])
    drawn = jax.tree.map(lambda leaf: leaf.reshape(batches, batch, *leaf.shape[1:]), drawn)
    return Batch(drawn, _sizes(spec, drawn.episode), length)


def _sizes(spec: EpisodeSpec, episodes: Episode) -> np.ndarray:
    """Returns `[batches, 3]`: the smallest size that holds each batch."""
    if len(spec.sizes) == 1:
        return np.tile(spec.sizes[0], (len(episodes.support.mask), 1))
    support, query = (part.mask.sum(axis=-1).max(axis=-1) for part in episodes)
    present = episodes.query.class_mask
    ways = np.ones_like(support) if present is None else present.sum(axis=-1).max(axis=-1)
    return np.array([spec.size_for(*map(int, size)) for size in zip(ways, support, query, strict=True)])


def cut(batch: Batch) -> Drawn:
    """Cuts off padding down to the size of the batch `[batch, ...]`; padding comes after the examples."""
    ways, support, query = batch.size[0], batch.size[1], batch.size[2]

    def shorten(part: Examples, slots: Any) -> Examples:
        present = None if part.class_mask is None else part.class_mask[:, :ways]
        shorter = jax.tree.map(lambda leaf: leaf[:, :slots], part._replace(class_mask=None))
        return shorter._replace(class_mask=present)

    episode = batch.drawn.episode
    return batch.drawn._replace(episode=Episode(shorten(episode.support, support), shorten(episode.query, query)))


def taker(source: Source, length: Any) -> Take:
    """Returns a function that reads rows into NumPy arrays, with sequences cut to `length`."""

    def take(examples: PyTree, rows: np.ndarray) -> PyTree:
        return jax.tree.map(lambda leaf: read(cut_to(source, leaf, leaf, length), rows), examples)

    return take


def check_source(source: Source, spec: EpisodeSpec) -> None:
    """Raises a ValueError if `source` cannot provide episodes of `spec`.

    >>> from metajax.data.sources._sinusoids import sinusoids
    >>> check_source(sinusoids(), EpisodeSpec(ways=1))
    """
    check_type(source)
    _validate.instance("spec", spec, EpisodeSpec)
    source.check(spec)


def check_type(source: Any) -> None:
    """Raises a ValueError if `source` is not a data source.

    >>> check_type(3)
    Traceback (most recent call last):
    ValueError: source must be a data source (see metajax.data.Source), got 3
    """
    if not all(hasattr(source, name) for name in ("name", "split", "examples", "check", "draw", "finish")):
        raise ValueError(f"source must be a data source (see metajax.data.Source), got {source!r}")
    _validate.one_of("source.split", source.split, SPLITS)


class Numbers:
    """Random numbers of one stream: `(indices, count) -> uint32 [len(indices), count]`.

    The generator is counter-based and keyed by the seed and the index, so all indices cost the same. Each thread has
    one generator and sets it to each index in turn (0.8 us; a new generator takes 11 us).
    """

    def __init__(self, source: Source, seed: int, kind: int) -> None:
        if _validate.int_at_least("seed", seed, 0) >= 2**64:
            raise ValueError(f"seed must lie below 2**64, got {seed}")
        self._seed, self._stream = seed, kind * len(SPLITS) + SPLITS.index(source.split)
        self._local = threading.local()

    def __call__(self, indices: Sequence[int], count: int) -> np.ndarray:
        if not hasattr(self._local, "philox"):
            self._local.philox = np.random.Philox(0)
            self._local.state = dict(self._local.philox.state, buffer_pos=4, has_uint32=0, uinteger=0)
            counter = np.array([0, 0, 0, self._stream], np.uint64)  # 2**192 draws apart
            self._local.state["state"] = {"counter": counter, "key": np.array([self._seed, 0], np.uint64)}
        philox, state = self._local.philox, self._local.state
        words = np.empty([len(indices), -(-count // 2)], np.uint64)
        for line, index in zip(words, indices, strict=True):
            state["state"]["key"][1] = index
            philox.state = state
            line[:] = philox.random_raw(words.shape[1])
        return words.astype("<u8", copy=False).view("<u4")[:, :count]
