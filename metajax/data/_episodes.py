"""Streams of episodes. Episode k depends on the source, the seed and k, and on nothing else."""

from __future__ import annotations

import atexit
import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import numpy as np

from metajax.core import _validate
from metajax.core._types import Episode, Examples
from metajax.data._sources import SPLITS, ClassSource, Source
from metajax.data._spec import EpisodeSpec

_PREFETCH = 4  # batches that wait, ready
_EPISODES, _BATCHES = 0, 1  # kinds of stream, which share no random numbers
_open: weakref.WeakSet[EpisodeIterator] = weakref.WeakSet()


class EpisodeIterator(Iterator[Episode]):
    """An endless iterator over batches of episodes; leaves are NumPy arrays `[batch, n, ...]`.

    Made by `episodes` and `batches`. A tf.data pipeline draws ahead in the background, until `close` or until
    the iterator is deleted. What the source raises while it draws is raised by `next`.
    """

    def __init__(self, draw: Callable[[int], Episode], first: Episode) -> None:
        tf = tensorflow()
        leaves, self._structure = jax.tree.flatten(first)  # a class_mask of None has no leaf: it stays None
        errors: list[Exception] = []  # no reference to self: an iterator that is dropped stops at once
        self._errors = errors

        def leaves_of(index: np.ndarray) -> list[np.ndarray]:
            try:
                return jax.tree.leaves(draw(int(index)))
            except Exception as error:  # tf.data would turn it into a text
                errors.append(error)
                raise

        dtypes = [tf.as_dtype(leaf.dtype) for leaf in leaves]
        dataset = tf.data.Dataset.range(np.iinfo(np.int64).max).map(lambda g: tf.numpy_function(leaves_of, [g], dtypes))
        options = tf.data.Options()
        options.threading.private_threadpool_size = 1  # one drawing thread; the cores are for XLA
        options.threading.max_intra_op_parallelism = 1
        options.autotune.enabled = False
        self._batches = dataset.prefetch(_PREFETCH).with_options(options).as_numpy_iterator()
        _open.add(self)

    def close(self) -> None:
        """Stops the drawing thread; no batch comes after it."""
        self._batches = iter(())

    def __iter__(self) -> EpisodeIterator:
        return self

    def __next__(self) -> Episode:
        try:
            leaves = next(self._batches)
        except Exception:
            if self._errors:
                raise self._errors[0] from None
            raise
        return jax.tree.unflatten(self._structure, leaves)


@atexit.register
def _close_all() -> None:
    # A thread that is drawing while the interpreter shuts down waits for ever for the interpreter's lock.
    for iterator in list(_open):
        iterator.close()


def episodes(
    source: Source,
    spec: EpisodeSpec,
    *,
    batch: int,
    seed: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> EpisodeIterator:
    """An endless stream of batches of episodes, drawn ahead by a tf.data pipeline.

    Global batch g holds the episodes from `start + g * process_count * batch` on; process h yields its h-th
    contiguous block. So the stream is the same whatever the number of processes, and a run that took m
    episodes goes on with `start=m`. The splits of one source give different streams for one seed.

    Args:
      source: where episodes are drawn from.
      spec: their size.
      batch: episodes in a batch of this process, the leading axis of every leaf.
      seed: the stream, 0 or above.
      start: how many episodes of the stream are left out, counted over all processes.
      process_index: which process this is, from 0 (`jax.process_index()`).
      process_count: how many there are (`jax.process_count()`).

    Returns:
      An iterator of `Episode` with NumPy leaves `[batch, n, ...]`.

    Raises:
      ValueError: an argument is out of range, or the source is too small for `spec`; at once, not at the
        first batch.
      ImportError: TensorFlow is not installed. `episode` and `episode_batch` do not need it.

    >>> from metajax.data._sinusoids import sinusoids
    >>> stream = episodes(sinusoids(), EpisodeSpec(1, 10, 5), batch=4, seed=0)
    >>> next(stream).support.inputs.shape
    (4, 10, 1)
    """
    check_source(source, spec)
    offset, stride = _block(batch, seed, start, process_index, process_count)

    def draw(index: int) -> Episode:
        return episode_batch(source, spec, seed=seed, start=offset + index * stride, count=batch)

    return EpisodeIterator(draw, draw(0))


def episode(source: Source, spec: EpisodeSpec, *, seed: int, index: int) -> Episode:
    """Episode `index` of the stream `seed`, with NumPy leaves `[n, ...]`; needs no TensorFlow.

    Raises:
      ValueError: as `episodes`.

    >>> from metajax.data._sinusoids import sinusoids
    >>> episode(sinusoids(), EpisodeSpec(1, 10, 5), seed=0, index=3).query.inputs.shape
    (5, 1)
    """
    check_source(source, spec)
    return source.sample(spec, _Generators(source, seed, _EPISODES)(_validate.int_at_least("index", index, 0)))


def episode_batch(source: Source, spec: EpisodeSpec, *, seed: int, start: int, count: int) -> Episode:
    """Episodes `start` to `start + count - 1` of the stream `seed`, stacked: NumPy leaves `[count, n, ...]`.

    Needs no TensorFlow.

    Raises:
      ValueError: as `episodes`.

    >>> from metajax.data._sinusoids import sinusoids
    >>> spec = EpisodeSpec(1, 10, 5)
    >>> several = episode_batch(sinusoids(), spec, seed=0, start=2, count=8)
    >>> bool((several.query.inputs[1] == episode(sinusoids(), spec, seed=0, index=3).query.inputs).all())
    True
    """
    check_source(source, spec)
    _validate.int_at_least("start", start, 0)
    _validate.positive_int("count", count)
    generators = _Generators(source, seed, _EPISODES)
    indices = range(start, start + count)
    if isinstance(source, ClassSource) and type(source).sample is ClassSource.sample:
        rows = [source.draw(spec, generators(index)) for index in indices]  # one copy of the images, not two
        return source.gather(spec, np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows]))
    return _stack([source.sample(spec, generators(index)) for index in indices])


def batches(
    source: Source,
    size: int,
    seed: int,
    *,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> EpisodeIterator:
    """An endless stream of labelled batches over all classes at once, for supervised pre-training.

    A batch is an `Episode` with a task axis of 1, so that what trains on episodes trains on it: its query
    holds `size` examples, drawn uniformly and independently from the whole source, with the global labels of
    the source, `[1, size, ...]`; its support is empty, `[1, 0, ...]`; class_mask is `[1, num_classes]`, all
    True. From a source without classes (regression), a batch holds one point of each of `size` tasks, and
    class_mask is None.

    Args:
      source: where examples are drawn from.
      size: examples in a batch of this process.
      seed: the stream, 0 or above.
      start: how many batches are left out, counted over all processes.
      process_index: which process this is, from 0; process h takes the batches `start + g * process_count + h`.
      process_count: how many there are.

    Raises:
      ValueError: an argument is out of range.
      ImportError: TensorFlow is not installed.

    >>> source = ClassSource("toy", "train", np.arange(6.0)[:, None], np.array([0, 0, 0, 1, 1, 1]), ("a", "b"))
    >>> batch = next(batches(source, 8, seed=0))
    >>> batch.query.inputs.shape, batch.support.inputs.shape, batch.query.class_mask.shape
    ((1, 8, 1), (1, 0, 1), (1, 2))
    """
    _check_type(source)
    _validate.positive_int("size", size)
    offset, stride = _block(1, seed, start, process_index, process_count)
    generators = _Generators(source, seed, _BATCHES)

    def draw(index: int) -> Episode:
        return _labelled_batch(source, size, generators(offset + index * stride))

    return EpisodeIterator(draw, draw(0))


def check_source(source: Source, spec: EpisodeSpec) -> None:
    """Raises a ValueError where `source` cannot give episodes of `spec`.

    >>> from metajax.data._sinusoids import sinusoids
    >>> check_source(sinusoids(), EpisodeSpec(ways=1))
    """
    _check_type(source)
    if not isinstance(spec, EpisodeSpec):
        raise ValueError(f"spec must be an EpisodeSpec, got {spec!r}")
    source.check(spec)


def _check_type(source: Any) -> None:
    if not all(hasattr(source, name) for name in ("name", "split", "check", "sample")):
        raise ValueError(f"source must be a data source (name, split, check, sample), got {source!r}")
    _validate.one_of("source.split", source.split, SPLITS)


def _block(batch: int, seed: int, start: int, process_index: int, process_count: int) -> tuple[int, int]:
    """First index of this process, and the step from its batch to its next."""
    _validate.positive_int("batch", batch)
    _validate.int_at_least("seed", seed, 0)
    _validate.int_at_least("start", start, 0)
    _validate.positive_int("process_count", process_count)
    if _validate.int_at_least("process_index", process_index, 0) >= process_count:
        raise ValueError(f"process_index must lie below process_count, {process_count}, got {process_index}")
    return start + process_index * batch, process_count * batch


class _Generators:
    """Generators of one stream: index -> NumPy generator, counter-based, so that none costs more than another.

    One object is set to each index in turn (0.8 us, where a new generator takes 11 us): a generator is
    good until the next call.
    """

    def __init__(self, source: Source, seed: int, kind: int) -> None:
        if _validate.int_at_least("seed", seed, 0) >= 2**64:
            raise ValueError(f"seed must lie below 2**64, got {seed}")
        stream = kind * len(SPLITS) + SPLITS.index(source.split)
        self._generator = np.random.Generator(np.random.Philox(0))
        self._state: dict[str, Any] = dict(self._generator.bit_generator.state)
        self._state.update(buffer_pos=4, has_uint32=0, uinteger=0)
        self._state["state"]["counter"] = np.array([0, 0, 0, stream], np.uint64)  # 2**192 draws apart
        self._state["state"]["key"] = np.array([seed, 0], np.uint64)

    def __call__(self, index: int) -> np.random.Generator:
        self._state["state"]["key"][1] = index
        self._generator.bit_generator.state = self._state
        return self._generator


def _labelled_batch(source: Source, size: int, rng: np.random.Generator) -> Episode:
    if isinstance(source, ClassSource):
        rows = rng.integers(len(source.inputs), size=size)
        query = Examples(
            np.take(source.inputs, rows, axis=0),
            source.labels[rows].astype(np.int32),
            np.ones(size, bool),
            np.ones(source.num_classes, bool),
        )
    else:
        drawn = _stack([source.sample(EpisodeSpec(1, 1, 1), rng) for _ in range(size)]).query
        query = jax.tree.map(lambda leaf: leaf[:, 0], drawn._replace(class_mask=None))
    support = jax.tree.map(lambda leaf: leaf[:0], query._replace(class_mask=None))
    return _stack([Episode(support._replace(class_mask=query.class_mask), query)])


def _stack(drawn: list[Episode]) -> Episode:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *drawn)


def tensorflow() -> ModuleType:
    """TensorFlow, kept off the accelerators, or an ImportError that says what needs it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # its start-up messages; to be set before the import
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError(
            "episodes() and batches() need TensorFlow for their input pipeline: pip install tensorflow "
            "(or tensorflow-cpu). episode() and episode_batch() work without it"
        ) from error
    # Accelerators belong to JAX; but it is too late where the program has used TensorFlow's devices before.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
    return tf
