"""Reads the tensors of a folder from safetensors files, one file or several with an index. Nothing is unpickled."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


class Tensors:
    """The tensors of a folder by name. A tensor is read only when it is requested.

    Args:
      folder: holds model.safetensors, or model.safetensors.index.json and the files that it names.

    Raises:
      ValueError: neither file exists; the index or a file is damaged, or the index names a file outside the folder.
      ImportError: the safetensors library is not installed.
    """

    def __init__(self, folder: pathlib.Path):
        self._files: dict[str, Any] = {}
        self._where: dict[str, pathlib.Path] = {}
        if (folder / INDEX).is_file():
            files = _indexed(folder)
        elif (folder / WEIGHTS).is_file():
            files = {None: folder / WEIGHTS}
        else:
            raise ValueError(_no_weights(folder))
        for path in dict.fromkeys(files.values()):
            self._files[str(path)] = _open(path)
            for name in self._files[str(path)].keys():  # noqa: SIM118 it is not a dict
                self._where[name] = path
        for name, path in files.items():
            if name is not None and self._where.get(name) != path:
                raise ValueError(f"{str(path)!r} has no tensor {name!r}, which {INDEX} says that it has")

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor as stated in its file."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, dtype: Any) -> np.ndarray:
        """Reads a floating-point tensor and converts it to `dtype`.

        Raises:
          ValueError: it does not hold floating-point numbers.
        """
        told = self._slice(name).get_dtype()
        if told not in _FLOATS:
            raise ValueError(f"tensor {name!r} must be of one of {', '.join(_FLOATS)}, got {told}")
        return np.asarray(self._files[str(self._where[name])].get_tensor(name)).astype(dtype)

    def _slice(self, name: str) -> Any:
        return self._files[str(self._where[name])].get_slice(name)


def write(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes tensors to a safetensors file."""
    _library()
    import safetensors.numpy

    safetensors.numpy.save_file({name: np.ascontiguousarray(leaf) for name, leaf in tensors.items()}, path)
    os.chmod(path, 0o644)  # the library makes files that only the owner can read


def _library() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError("pretrained weights need the safetensors library: pip install 'metajax[text]'") from error
    return safetensors


def _open(path: pathlib.Path) -> Any:
    library = _library()
    try:
        return library.safe_open(path, framework="np")
    except (library.SafetensorError, OSError) as error:
        raise ValueError(f"{str(path)!r} is no whole safetensors file ({error})") from error


def _indexed(folder: pathlib.Path) -> dict[str | None, pathlib.Path]:
    """Returns the file of each tensor according to the index."""
    try:
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].items()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(folder / INDEX)!r} must hold a weight_map of tensors to files ({error})") from error
    files: dict[str | None, pathlib.Path] = {}
    for name, file in names:
        path = folder / str(file)
        if not isinstance(file, str) or pathlib.PurePath(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{INDEX} must name safetensors files of its folder, got {file!r} for {name!r}")
        if not path.is_file():
            raise ValueError(f"{INDEX} names {file!r}, which is not in {str(folder)!r}")
        files[name] = path
    return files


def _no_weights(folder: pathlib.Path) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    said = f"path must hold {WEIGHTS} or {INDEX}, got {str(folder)!r}"
    if pickles:
        said += f" with {', '.join(pickles)}, which is not read: such a file can run code. Convert it to safetensors"
    return said
