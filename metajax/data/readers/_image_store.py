"""Stores decoded images in memory: all of them, or up to a limit."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from metajax.core import _validate
from metajax.data.readers import _images

Load = Callable[[int], np.ndarray]  # (row) -> uint8 [height, width, channels]


class StoredImages:
    """Images that are decoded on request, and kept in memory while there is room.

    A kept image is never replaced: episodes draw images uniformly, so all images are equally likely to be needed again,
    and replacing them would not increase the hit rate. Any number of threads may read.

    Attributes:
      shape: `(n, height, width, channels)`.
      dtype: uint8.
      nbytes: number of bytes that all images would take.
      cache_bytes: largest number of bytes that are kept.
      kept_bytes: number of bytes that are kept now.
      owner: any object that must live as long as the images, such as open zips.

    >>> images = StoredImages(lambda row: np.full([2, 2, 1], row, np.uint8), (5, 2, 2, 1), cache_bytes=8)
    >>> images.take(np.array([3, 4, 3, 0]))[:, 0, 0, 0].tolist(), images.kept_bytes
    ([3, 4, 3, 0], 8)
    """

    def __init__(self, load: Load, shape: tuple[int, ...], *, cache_bytes: int) -> None:
        self.shape, self.dtype, self.cache_bytes = shape, np.dtype(np.uint8), cache_bytes
        self.owner: Any = None
        self._load, self._lock, self._each = load, threading.Lock(), int(np.prod(shape[1:]))
        room = min(shape[0], cache_bytes // self._each)
        self._kept = np.empty((room, *shape[1:]), np.uint8)  # the system allocates memory when it is written
        self._place = np.full(shape[0], -1, np.int32)  # the place of each row in `_kept`
        self._used = 0

    @property
    def nbytes(self) -> int:
        """Number of bytes that all images would take."""
        return self.shape[0] * self._each

    @property
    def kept_bytes(self) -> int:
        """Number of bytes that are kept now."""
        return self._used * self._each

    def take(self, rows: np.ndarray, axis: int = 0) -> np.ndarray:
        """Returns images `[*rows.shape, height, width, channels]`; the image for a row of -1 is undefined."""
        flat = np.asarray(rows).reshape(-1)
        images = np.empty((flat.size, *self.shape[1:]), np.uint8)
        places = self._place[flat]
        known = (places >= 0) & (flat >= 0)
        images[known] = self._kept[places[known]]
        missing, back = np.unique(flat[~known], return_inverse=True)
        if missing.size:
            images[~known] = np.stack([self._read(int(row)) for row in missing])[back]
        return images.reshape(*np.shape(rows), *self.shape[1:])

    def _read(self, row: int) -> np.ndarray:
        if row < 0:
            return np.zeros(self.shape[1:], np.uint8)
        image = self._load(row)
        with self._lock:
            if self._used < len(self._kept) and self._place[row] < 0:
                self._kept[self._used] = image
                self._place[row] = self._used  # only now, because other threads read without the lock
                self._used += 1
        return image


def read_images(
    load: Load, name: Callable[[int], str], count: int, *, where: str, cache_bytes: int | None = None
) -> np.ndarray | StoredImages:
    """Reads images `[count, height, width, channels]`, which must have the same shape.

    Args:
      load: decodes the image of a row; called from several threads.
      name: returns the name of a row, for error messages.
      count: number of images, at least 1.
      where: the place of the images in error messages.
      cache_bytes: None decodes all images now and keeps them in memory; a number decodes them on request and keeps at
        most this many bytes.

    Raises:
      ValueError: `cache_bytes` is negative, or sizes or channels differ (raised at once, or when the image is read).

    >>> read_images(lambda row: np.zeros([2, 2, 1], np.uint8), str, 3, where="here").shape
    (3, 2, 2, 1)
    """
    if cache_bytes is not None:
        _validate.int_at_least("cache_bytes", cache_bytes, 0)
    first = load(0)

    def checked(row: int) -> np.ndarray:
        image = load(row)
        _images.check_form(image, name(row), first, name(0), where)
        return image

    shape = (count, *first.shape)
    if cache_bytes is not None:
        return StoredImages(checked, shape, cache_bytes=cache_bytes)
    images = np.empty(shape, np.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row, image in enumerate(pool.map(checked, range(count))):
            images[row] = image
    return images
