"""The tf.data pipeline that draws and reads episodes ahead of what consumes them."""

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
from metajax.data._sources import Source, Take, cut_to, read
from metajax.data._spec import EpisodeSpec

_PREFETCH = 4  # batches that wait, ready
_BLOCK_BATCHES, _BLOCK_NUMBERS = 16, 2**20  # at most, drawn at once: Python's cost a call is paid once for all
_COPIED = 2**30  # bytes of an array that the graph holds a copy of; a larger one is read where it is
_open: weakref.WeakSet[EpisodeIterator] = weakref.WeakSet()


class EpisodeIterator(Iterator[Episode]):
    """An endless iterator over batches of episodes; leaves are NumPy arrays `[batch, n, ...]`.

    Made by `episodes` and `batches`. Python draws the rows of many batches at once; the graph of tf.data reads the
    examples, transforms them, and keeps a few batches ready, until `close` or until the iterator is deleted. What the
    source raises is raised by `next`.

    Attributes:
      position: where the stream stands, counted over all processes: with `start=position` another stream, in any
        number of processes, goes on with what comes next here. What was drawn ahead does not count.
      task: the task type of the source.

    >>> from metajax.data._sinusoids import sinusoids
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
                except Exception as error:  # tf.data would turn it into a text
                    errors.append(error)
                    raise

            return call

        leaves, structure = jax.tree.flatten(draw(0))  # here, where an error stops the caller
        sent = [place for place, leaf in enumerate(leaves) if leaf.size]  # unbatch crashes on an array without numbers
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
        """Stops the drawing threads; no batch comes after it."""
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
    workers: int | None = None,
) -> EpisodeIterator:
    """An endless stream of batches of episodes, made ahead by a tf.data pipeline.

    Global batch g holds the episodes from `start + g * process_count * batch` on; process h yields its h-th
    contiguous block. So the stream is the same whatever the number of processes, and a run goes on with
    `start=stream.position`, in as many processes as there are then. The splits of one source give different streams
    for one seed. Starting late costs nothing.

    Episodes of varying size come in one of `spec.sizes`, the smallest that holds all episodes of the global batch (and
    sequences in one length), so that all processes see one shape.

    Args:
      source: where episodes are drawn from.
      spec: their size.
      batch: episodes in a batch of this process, the leading axis of every leaf.
      seed: the stream, 0 or above.
      start: how many episodes of the stream are left out, counted over all processes.
      process_index: which process this is, from 0 (`jax.process_index()`).
      process_count: how many there are (`jax.process_count()`).
      workers: threads that read and transform. By default one where the examples are arrays, else one for each core.

    Returns:
      An iterator of `Episode` with NumPy leaves `[batch, n, ...]`.

    Raises:
      ValueError: an argument is out of range, or the source is too small for `spec`; at once, not at the
        first batch.
      ImportError: TensorFlow is not installed. `episode` and `episode_batch` do not need it.

    >>> from metajax.data._sinusoids import sinusoids
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
      workers: as for `episodes`.

    Raises:
      ValueError: an argument is out of range.
      ImportError: TensorFlow is not installed.

    >>> from metajax.data._sources import ClassSource
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
        # each example is an episode of its own, with a query set of one
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
    """How many batches are drawn at once, where one takes so many random numbers."""
    return max(1, min(_BLOCK_BATCHES, _BLOCK_NUMBERS // max(numbers, 1)))


def _workers(source: Source, workers: int | None) -> int:
    if workers is not None:
        return _validate.positive_int("workers", workers)
    arrays = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(source.examples))
    return 1 if arrays else os.cpu_count() or 1


def _graph_taker(tf: ModuleType, source: Source, guarded: Callable[..., Any]) -> Callable[[Any], Take]:
    """Reads rows inside the graph: arrays by an operation, whatever else by a call into Python."""
    copies = {  # with a row of zeros behind the others, for padding
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
    """TensorFlow, kept off the accelerators, or an ImportError that says what needs it."""
    for name, value in (("TF_CPP_MIN_LOG_LEVEL", "2"), ("TF_ENABLE_ONEDNN_OPTS", "0")):  # both talk when it starts
        os.environ.setdefault(name, value)
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError(
            "episodes() and batches() need TensorFlow for their input pipeline: pip install tensorflow "
            "(or tensorflow-cpu). episode(), episode_batch() and device_sampler() work without it"
        ) from error
    # Accelerators belong to JAX; but it is too late where the program has used TensorFlow's devices before.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
    return tf
