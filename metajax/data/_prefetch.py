"""Batches on their way to the device while the one before them is worked on."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from metajax.core import _validate


class DeviceIterator(Iterator[Any]):
    """The batches of a stream, on the device; made by `prefetch_to_device`.

    Attributes:
      position: the position of the stream when it gave the batch that was handed out last; at first, where it stood
        before. None for a stream that has none. What waits on the device does not count.

    >>> DeviceIterator(iter([1.0]), 2, None).position is None
    True
    """

    def __init__(self, stream: Iterable[Any], size: int, device: Any) -> None:
        self._stream, self._batches, self._size, self._device = stream, iter(stream), size, device
        self._waiting: collections.deque[tuple[Any, Any, Exception | None]] = collections.deque()
        self.position = getattr(stream, "position", None)

    def close(self) -> None:
        """Closes the stream, where it can be closed; no batch comes after it."""
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
            except Exception as error:  # the end of the stream too: it comes after the batches that wait
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
    """Moves the batches of a stream to the device ahead of what consumes them.

    The copy to the device runs while the device computes, so that a step never waits for its batch: with a `size` of 2
    one batch is worked on and the next one is copied.

    Args:
      stream: an iterable of pytrees, such as `metajax.data.episodes`.
      size: how many batches are fetched ahead, the one that is handed out next included.
      device: a device or a sharding; JAX's default device by default. `metajax.parallel.task_sharding(mesh)` gives
        each device its own tasks; over several processes, each gives the batches of its own devices.

    Returns:
      An iterator of batches of `jax.Array`, in order. Its `position` is that of the stream, where the stream has one,
      for what was handed out: a run goes on with `start=position`. Its `close` closes the stream. What the stream
      raises is raised after the batches before it.

    Raises:
      ValueError: `size` is no positive integer.

    >>> from metajax.data._pipeline import episodes
    >>> from metajax.data._sinusoids import sinusoids
    >>> from metajax.data._spec import EpisodeSpec
    >>> stream = prefetch_to_device(episodes(sinusoids(), EpisodeSpec(1, 10, 5), batch=4, seed=0))
    >>> next(stream).support.inputs.shape, stream.position
    ((4, 10, 1), 4)
    >>> stream.close()
    """
    return DeviceIterator(stream, _validate.positive_int("size", size), device)
