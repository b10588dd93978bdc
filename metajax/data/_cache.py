"""Decoded data sets, kept on disk between runs. Whatever goes wrong with the cache, the data is made anew."""

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
    """Returns the arrays that are stored under `key`, or those that `make` returns, which are then stored.

    The files are `.npz` without pickled objects, in the folder that the environment variable METAJAX_CACHE
    names, or else in `~/.cache/metajax`. An empty METAJAX_CACHE turns the cache off. Files that cannot be
    read are replaced, and a folder that cannot be written is left alone; neither is an error.

    Args:
      key: everything that the arrays depend on: a name, a version of the code that makes them, options, and
        sizes and times of the files that they are read from.
      make: gives the arrays; none of them may hold objects.

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
    """Where data (and by the launchers, compiled programs) are kept: METAJAX_CACHE, or `~/.cache/metajax`.

    None where METAJAX_CACHE is empty, or where there is no home folder.

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
        os.replace(name, path)  # readers see the whole file or none
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
