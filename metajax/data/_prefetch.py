"""Copies batches to the device while the device works on earlier ones."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from metajax.core import _validate


class DeviceIterator(Iterator[Any]):
    """An iterator over the batches of a stream, on the device; created by `prefetch_to_device`.

    Attributes:
      position: the position of the stream after the batch that was returned last; before the first batch, the initial
        position of the stream. None if the stream has no position. Batches that wait on the device do not count.

    >>> DeviceIterator(iter([1.0]), 2, None).position is None
    True
    """

    def __init__(self, stream: Iterable[Any], size: int, device: Any) -> None:
        self._stream, self._batches, self._size, self._device = stream, iter(stream), size, device
        self._waiting: collections.deque[tuple[Any, Any, Exception | None]] = collections.deque()
        self.position = getattr(stream, "position", None)

    def close(self) -> None:
        """Closes the stream if it can be closed; the iterator then gives no more batches."""
        self._waiting.clear()
        self._batches = iter(())
        if hasattr(self._stream, "close"):
            self._stream.close()

    def __iter__(self) -> DeviceIterator:
        return self

    def __next__(self) -> Any:
        while len(self._waiting) < self._size and not (self._waiting and self._waiting[-1][2]):
            try:
                batch = next(self._batches)
            except Exception as error:  # also the end of the stream, raised after the waiting batches
                self._waiting.append((None, self.position, error))
            else:
                placed = _put(batch, self._device)
                self._waiting.append((placed, getattr(self._stream, "position", None), None))
        batch, position, raised = self._waiting.popleft()
        if raised is not None:
            raise raised
        self.position = position
        return batch


def _put(batch: Any, device: Any) -> Any:
    if isinstance(device, jax.sharding.Sharding) and not device.is_fully_addressable:
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(device, leaf), batch)
    return jax.device_put(batch, device)


def prefetch_to_device(stream: Iterable[Any], size: int = 2, device: Any = None) -> DeviceIterator:
    """Copies the batches of a stream to the device before they are needed.

    The copy to the device runs while the device computes, so that a step never waits for its batch. With a `size` of 2,
    the device processes one batch while the next one is copied.

    Args:
      stream: an iterable of pytrees, such as `metajax.data.episodes`.
      size: number of batches that are fetched ahead, including the one that is returned next.
      device: a device or a sharding; JAX's default device by default. `metajax.parallel.task_sharding(mesh)` gives
        each device its own tasks; with several processes, each provides the batches of its own devices.

    Returns:
      An iterator of batches of `jax.Array`, in order. Its `position` is the position of the stream after the last
      returned batch, if the stream has one; a run continues with `start=position`. Its `close` closes the stream. An
      error of the stream is raised after the batches that came before it.

    Raises:
      ValueError: `size` is not a positive integer.

    >>> from metajax.data._pipeline import episodes
    >>> from metajax.data.sources._sinusoids import sinusoids
    >>> from metajax.data._spec import EpisodeSpec
    >>> stream = prefetch_to_device(episodes(sinusoids(), EpisodeSpec(1, 10, 5), batch=4, seed=0))
    >>> next(stream).support.inputs.shape, stream.position
    ((4, 10, 1), 4)
    >>> stream.close()
    """
    return DeviceIterator(stream, _validate.positive_int("size", size), device)
