"""Caches decoded data sets on disk between runs. If the cache fails in any way, the data is computed again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np


def cached(key: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the arrays stored under `key`; if there are none, calls `make` and stores its result.

    The files are `.npz` files without pickled objects, in the folder given by the environment variable
    METAJAX_CACHE (by default `~/.cache/metajax`). An empty METAJAX_CACHE turns the cache off. Unreadable files
    are replaced. If the folder is not writable, nothing is stored. Neither case raises an error.

    Args:
      key: everything that the arrays depend on: a name, the version of the code that computes them, options,
        and the sizes and times of the files they are read from.
      make: computes the arrays; none of them may hold objects.

    >>> cached("doctest of cached, version 1", lambda: {"x": np.arange(3)})["x"].tolist()
    [0, 1, 2]
    """
    path = _path(key)
    if path is None:
        return make()
    # np.load raises whatever its parts raise on damaged bytes (zlib, struct, zip, tokenizer errors).
    with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
    arrays = make()
    with contextlib.suppress(OSError):
        _store(path, arrays)
    return arrays


def cache_folder() -> pathlib.Path | None:
    """Returns the cache folder: METAJAX_CACHE, or `~/.cache/metajax` by default.

    The folder holds data; the launchers also store compiled programs there. The result is None if METAJAX_CACHE
    is empty, or if there is no home folder.

    >>> folder = cache_folder()
    >>> folder is None or isinstance(folder, pathlib.Path)
    True
    """
    folder = os.environ.get("METAJAX_CACHE")
    if folder == "":
        return None
    try:
        return pathlib.Path(folder) if folder else pathlib.Path.home() / ".cache" / "metajax"
    except RuntimeError:  # a user without a home folder
        return None


def _path(key: str) -> pathlib.Path | None:
    root = cache_folder()
    slug = re.sub(r"[^a-z0-9]+", "-", key.lower())[:32].strip("-")
    return root and root / f"{slug}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"


def _store(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(suffix=".tmp", prefix=path.stem, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, **dict[str, Any](arrays))
        os.replace(name, path)  # readers see the whole file or no file
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
