"""The tf.data pipeline, which draws and reads episodes before they are needed."""

from __future__ import annotations

import atexit
import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, cast

import jax
import numpy as np

from metajax.core import _validate
from metajax.core._types import Episode
from metajax.data import _episodes
from metajax.data._source import Source, Take, cut_to, read
from metajax.data._spec import EpisodeSpec

_PREFETCH = 4  # batches that are kept ready
_BLOCK_BATCHES, _BLOCK_NUMBERS = 16, 2**20  # most drawn at once: one Python call serves them all
_COPIED = 2**30  # bytes of the largest array that the graph copies; larger arrays are read in place
_open: weakref.WeakSet[EpisodeIterator] = weakref.WeakSet()


class EpisodeIterator(Iterator[Episode]):
    """An endless iterator over batches of episodes; leaves are NumPy arrays `[batch, n, ...]`.

    `episodes` and `batches` create it. Python draws the rows of many batches at once. The tf.data graph reads the
    examples, transforms them, and keeps a few batches ready, until `close` is called or the iterator is deleted.
    `next` raises the errors that the source raises.

    Attributes:
      position: the position in the stream, counted over all processes. Another stream with `start=position`, in any
        number of processes, continues with the next batch of this one. Batches drawn ahead do not count.
      task: the task type of the source.

    >>> from metajax.data.sources._sinusoids import sinusoids
    >>> stream = episodes(sinusoids(), EpisodeSpec(1, 10, 5), batch=4, seed=0, start=8)
    >>> _ = next(stream), next(stream)
    >>> stream.position
    16
    """

    def __init__(
        self, source: Source, draw: Callable[[int], Any], finish: Callable[[Any, Callable[[Any], Take]], Episode], *,
        start: int, stride: int, workers: int,
    ) -> None:  # fmt: skip
        tf = tensorflow()
        self.position, self._stride, self.task = start, stride, getattr(source, "task", None)
        errors: list[Exception] = []  # no reference to self: an iterator that is dropped stops at once
        self._errors = errors

        def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                try:
                    return function(*arguments)
                except Exception as error:  # tf.data would turn it into a string
                    errors.append(error)
                    raise

            return call

        leaves, structure = jax.tree.flatten(draw(0))  # here, so that an error reaches the caller
        sent = [place for place, leaf in enumerate(leaves) if leaf.size]  # unbatch crashes on an empty array
        given = [None if leaf.size else leaf[0] for leaf in leaves]
        taker = _graph_taker(tf, source, guarded)
        structures = []

        def leaves_of(block: np.ndarray) -> list[np.ndarray]:
            drawn = jax.tree.leaves(draw(int(block)))
            return [drawn[place] for place in sent]

        def drawn(block: Any) -> tuple[Any, ...]:
            dtypes = [tf.as_dtype(leaves[place].dtype) for place in sent]
            arrays = tf.numpy_function(guarded(leaves_of), [block], dtypes)
            return tuple(tf.ensure_shape(array, leaves[place].shape) for array, place in zip(arrays, sent, strict=True))

        def finished(*arrays: Any) -> tuple[Any, ...]:
            rest = iter(arrays)
            all_of_them = [next(rest) if leaf is None else tf.constant(leaf) for leaf in given]
            ready, made = jax.tree.flatten(finish(jax.tree.unflatten(structure, all_of_them), taker))
            structures.append(made)  # a class_mask of None has no leaf: it stays None
            return tuple(ready)

        as_it_is = tf.autograph.experimental.do_not_convert
        dataset = tf.data.Dataset.range(np.iinfo(np.int64).max).map(as_it_is(drawn)).unbatch()
        dataset = dataset.map(as_it_is(finished), num_parallel_calls=workers, deterministic=True)
        options = tf.data.Options()
        options.threading.private_threadpool_size = workers  # the other cores are for XLA
        options.threading.max_intra_op_parallelism = 1
        options.autotune.enabled = False
        self._structure = structures[0]
        self._batches = dataset.prefetch(_PREFETCH).with_options(options).as_numpy_iterator()
        _open.add(self)

    def close(self) -> None:
        """Stops the drawing threads; the iterator then gives no more batches."""
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
        self.position += self._stride
        return jax.tree.unflatten(self._structure, leaves)


@atexit.register
def _close_all() -> None:
    # A thread that draws while the interpreter shuts down waits forever for the interpreter's lock.
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
    workers: int | None = None,
) -> EpisodeIterator:
    """Returns an endless stream of batches of episodes, prepared ahead of time by a tf.data pipeline.

    Global batch g holds the episodes from `start + g * process_count * batch` on; process h yields its h-th
    contiguous block. The stream is therefore the same for any number of processes, and a run can continue with
    `start=stream.position` in a different number of processes. The splits of one source give different streams
    for the same seed. A late start costs nothing.

    Episodes of varying size are padded to the smallest of `spec.sizes` that holds all episodes of the global batch, and
    sequences to one length, so that all processes see the same shape.

    Args:
      source: the source of the episodes.
      spec: the size of the episodes.
      batch: number of episodes in a batch of this process, the leading axis of every leaf.
      seed: the seed of the stream, 0 or above.
      start: number of episodes to skip at the start of the stream, counted over all processes.
      process_index: index of this process, from 0 (`jax.process_index()`).
      process_count: number of processes (`jax.process_count()`).
      workers: number of threads that read and transform examples. By default one if the examples are arrays, else one
        for each core.

    Returns:
      An iterator of `Episode` with NumPy leaves `[batch, n, ...]`.

    Raises:
      ValueError: an argument is out of range, or the source is too small for `spec`; raised at once, not at the
        first batch.
      ImportError: TensorFlow is not installed. `episode` and `episode_batch` do not need it.

    >>> from metajax.data.sources._sinusoids import sinusoids
    >>> stream = episodes(sinusoids(), EpisodeSpec(1, 10, 5), batch=4, seed=0)
    >>> next(stream).support.inputs.shape, stream.position
    ((4, 10, 1), 4)
    """
    _episodes.check_source(source, spec)
    _check_block(batch, start, process_index, process_count)
    numbers = _episodes.Numbers(source, seed, _episodes.EPISODES)
    stride, own = process_count * batch, slice(process_index * batch, (process_index + 1) * batch)
    several = _block_size(source.bits(spec) * stride)
    tables = source.tables(spec)

    def draw(block: int) -> _episodes.Batch:
        first = start + block * several * stride
        drawn = _episodes.draw_batches(source, spec, numbers, first, batch=stride, batches=several, tables=tables)
        return drawn._replace(drawn=jax.tree.map(lambda leaf: leaf[:, own], drawn.drawn))

    def finish(drawn: _episodes.Batch, taker: Callable[[Any], Take]) -> Episode:
        return source.finish(_episodes.cut(drawn), source.examples, taker(drawn.length))

    return EpisodeIterator(source, draw, finish, start=start, stride=stride, workers=_workers(source, workers))


def batches(
    source: Source,
    size: int,
    seed: int,
    *,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int | None = None,
) -> EpisodeIterator:
    """Returns an endless stream of labelled batches over all classes at once, for supervised pre-training.

    A batch is an `Episode` with a task axis of 1, so code that trains on episodes can train on it. Its query
    holds `size` examples, drawn uniformly and independently from the whole source, with the global labels of
    the source, `[1, size, ...]`. Its support is empty, `[1, 0, ...]`. Its class_mask is `[1, num_classes]`, all
    True. For a source without classes (regression), a batch holds one point of each of `size` tasks, and
    class_mask is None.

    Args:
      source: the source of the examples.
      size: number of examples in a batch of this process.
      seed: the seed of the stream, 0 or above.
      start: number of batches to skip at the start of the stream, counted over all processes.
      process_index: index of this process, from 0; process h takes the batches `start + g * process_count + h`.
      process_count: number of processes.
      workers: as for `episodes`.

    Raises:
      ValueError: an argument is out of range.
      ImportError: TensorFlow is not installed.

    >>> from metajax.data._source import ClassSource
    >>> source = ClassSource("toy", "train", np.arange(6.0)[:, None], np.array([0, 0, 0, 1, 1, 1]), ("a", "b"))
    >>> batch = next(batches(source, 8, seed=0))
    >>> batch.query.inputs.shape, batch.support.inputs.shape, batch.query.class_mask.shape
    ((1, 8, 1), (1, 0, 1), (1, 2))
    """
    _episodes.check_type(source)
    _validate.positive_int("size", size)
    _check_block(1, start, process_index, process_count)
    numbers, one = _episodes.Numbers(source, seed, _episodes.BATCHES), EpisodeSpec(1, 1, 1)
    classes, labelled = getattr(source, "num_classes", None), cast("Any", source)
    bits = source.bits(one) if classes is None else labelled.label_bits
    tables = source.tables(one) if classes is None else None
    several = _block_size(bits * size)

    def draw(block: int) -> _episodes.Batch:
        places = [start + process_index + (block * several + line) * process_count for line in range(several)]
        own = numbers(places, bits * size).reshape(several * size, bits)
        # each example is a separate episode with a query set of one
        drawn = source.draw(one, tables, own) if classes is None else labelled.draw_labelled(own)
        drawn = jax.tree.map(lambda leaf: leaf.reshape(several, size, *leaf.shape[1:]), drawn)
        return _episodes.Batch(
            drawn, np.zeros([several, 3], int), np.full(several, max(source.length_buckets, default=0))
        )

    def finish(drawn: _episodes.Batch, taker: Callable[[Any], Take]) -> Episode:
        query = source.finish(drawn.drawn, source.examples, taker(drawn.length)).query._replace(class_mask=None)
        query = jax.tree.map(lambda leaf: leaf[:, 0][None], query)
        support = jax.tree.map(lambda leaf: leaf[:, :0], query)
        mask = None if classes is None else np.ones([1, classes], bool)
        return Episode(support._replace(class_mask=mask), query._replace(class_mask=mask))

    return EpisodeIterator(source, draw, finish, start=start, stride=process_count, workers=_workers(source, workers))


def _check_block(batch: int, start: int, process_index: int, process_count: int) -> None:
    _validate.positive_int("batch", batch)
    _validate.int_at_least("start", start, 0)
    _validate.positive_int("process_count", process_count)
    if _validate.int_at_least("process_index", process_index, 0) >= process_count:
        raise ValueError(f"process_index must lie below process_count, {process_count}, got {process_index}")


def _block_size(numbers: int) -> int:
    """Returns how many batches are drawn at once if each takes this many random numbers."""
    return max(1, min(_BLOCK_BATCHES, _BLOCK_NUMBERS // max(numbers, 1)))


def _workers(source: Source, workers: int | None) -> int:
    if workers is not None:
        return _validate.positive_int("workers", workers)
    arrays = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(source.examples))
    return 1 if arrays else os.cpu_count() or 1


def _graph_taker(tf: ModuleType, source: Source, guarded: Callable[..., Any]) -> Callable[[Any], Take]:
    """Returns a reader of rows inside the graph: arrays by an operation, other leaves by a call into Python."""
    copies = {  # with a row of zeros after the others, for padding
        id(leaf): tf.concat([leaf, tf.zeros([1, *leaf.shape[1:]], leaf.dtype)], axis=0)
        for leaf in jax.tree.leaves(source.examples)
        if isinstance(leaf, np.ndarray) and leaf.nbytes <= _COPIED
    }

    def taker(length: Any) -> Take:
        def one(leaf: Any, rows: Any) -> Any:
            if id(leaf) in copies:
                values = tf.gather(copies[id(leaf)], tf.where(rows < 0, tf.constant(len(leaf), rows.dtype), rows))
            else:
                values = tf.numpy_function(guarded(lambda rows: read(leaf, rows)), [rows], tf.as_dtype(leaf.dtype))
                values = tf.ensure_shape(values, [*rows.shape, *leaf.shape[1:]])
            return cut_to(source, leaf, values, length, leading=1)

        return lambda examples, rows: jax.tree.map(lambda leaf: one(leaf, rows), examples)

    return taker


def tensorflow() -> ModuleType:
    """Returns TensorFlow, kept off the accelerators, or raises an ImportError that says what needs it.

    >>> tensorflow().__name__
    'tensorflow'
    """
    for name, value in (("TF_CPP_MIN_LOG_LEVEL", "2"), ("TF_ENABLE_ONEDNN_OPTS", "0")):  # against messages at start-up
        os.environ.setdefault(name, value)
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError(
            "episodes() and batches() need TensorFlow for their input pipeline: pip install tensorflow "
            "(or tensorflow-cpu). episode(), episode_batch() and device_sampler() work without it"
        ) from error
    # Accelerators belong to JAX; this fails if the program has already used TensorFlow's devices.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
    return tf
