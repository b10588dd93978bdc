"""Reads images from untrusted folders and zip files."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import re
import stat
import zipfile
from collections.abc import Callable, Collection, Iterator
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from metajax.core import _validate

Invert = bool | Literal["auto"]

MAX_FILE_BYTES = 64 * 2**20  # of one file, unpacked
MAX_ZIP_BYTES = 16 * 2**30  # of all files of one zip, unpacked
MAX_PIXELS = 2**24  # of one image
_FORMATS = ("PNG", "JPEG", "BMP")
_HIDDEN = ("__MACOSX", "Thumbs.db", "desktop.ini")
_DEPTH = 5  # most levels of folders below the one that is read


class Files(NamedTuple):
    """The visible files of a folder or zip.

    Attributes:
      path: the folder or zip.
      names: file names, sorted, relative to `path`, with `/` between the parts.
      read: `(name) -> bytes`.
    """

    path: pathlib.Path
    names: tuple[str, ...]
    read: Callable[[str], bytes]


@contextlib.contextmanager
def open_files(path: str | os.PathLike[str]) -> Iterator[Files]:
    """Lists a folder or a zip file. Hidden files (`.DS_Store`, `__MACOSX`, `Thumbs.db`) are left out.

    The whole list of contents of a zip is checked before anything is unpacked, and nothing is ever written to disk.

    Raises:
      ValueError: there is no such folder or zip; or an entry of the zip points outside (`../`, an absolute
        path, a symbolic link), is encrypted, occurs twice, or is larger than `MAX_FILE_BYTES`.

    >>> import tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "note.txt").write_text("hello"), (folder / ".hidden").write_text("")
    >>> with open_files(folder) as files:
    ...     print(files.names, files.read("note.txt"))
    ('note.txt',) b'hello'
    """
    path = folder_or_zip(path)
    if path.is_dir():
        yield Files(path, tuple(sorted(_walk(path, path))), lambda name: _read_limited(path, name))
        return
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"path must be a folder or a zip file, got {str(path)!r} ({error})") from error
    with archive:
        entries = _entries(path, archive)
        yield Files(path, tuple(sorted(entries)), lambda name: _unpack(path, archive, entries[name]))


def folder_or_zip(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns `path` if it exists.

    Raises:
      ValueError: `path` is empty (which would mean the current folder), or there is no such folder or file.

    >>> folder_or_zip(".").is_dir()
    True
    """
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise ValueError(f"path must be a folder or a zip file, got {path!r}")
    found = pathlib.Path(path)
    if not found.is_dir() and not found.is_file():
        raise ValueError(f"path must be a folder or a zip file, got {str(path)!r}, which does not exist")
    return found


def _walk(root: pathlib.Path, folder: pathlib.Path, depth: int = 0) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            name = pathlib.Path(entry.path).relative_to(root).as_posix()
            if not entry.is_dir():
                yield name
            elif depth == _DEPTH:  # also ends a loop of symbolic links
                raise ValueError(f"path {str(root)!r} must not hold folders in folders so deep, got {name!r}")
            else:
                yield from _walk(root, pathlib.Path(entry.path), depth + 1)


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part in _HIDDEN


def _read_limited(folder: pathlib.Path, name: str) -> bytes:
    file = folder / name
    if not file.is_file():  # a broken link, a pipe, a device
        raise ValueError(f"{name!r} in {str(folder)!r} is not a regular file")
    with open(file, "rb") as opened:
        content = opened.read(MAX_FILE_BYTES + 1)
    return _limited(folder, name, content)


def _limited(path: pathlib.Path, name: str, content: bytes) -> bytes:
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{name!r} in {str(path)!r} has more than {MAX_FILE_BYTES} bytes, which is the limit")
    return content


def _entries(path: pathlib.Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name, where = info.orig_filename, f"entry {info.orig_filename!r} of {str(path)!r}"
        parts = name.replace("\\", "/").split("/")
        if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "\0" in name:
            raise ValueError(f"{where} points outside the zip; paths must be relative, without '..'")
        mode = info.external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"{where} is a link or a special file; a zip must hold plain files")
        if info.flag_bits & 0x1:
            raise ValueError(f"{where} is encrypted; a zip must be readable without a password")
        if info.file_size > MAX_FILE_BYTES:
            raise ValueError(f"{where} unpacks to {info.file_size} bytes, the limit is {MAX_FILE_BYTES}")
        parts = [part for part in parts if part not in ("", ".")]
        if info.is_dir() or any(_is_hidden(part) for part in parts):
            continue
        name = "/".join(parts)
        if name in entries:
            raise ValueError(f"{where} stands there twice")
        entries[name] = info
    total = sum(info.file_size for info in entries.values())
    if total > MAX_ZIP_BYTES:
        raise ValueError(f"{str(path)!r} unpacks to {total} bytes, the limit is {MAX_ZIP_BYTES}")
    return entries


def _unpack(path: pathlib.Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        with archive.open(info) as file:
            content = file.read(MAX_FILE_BYTES + 1)  # the size that the zip declares may be wrong
    except Exception as error:  # zipfile, zlib, lzma and bz2 have their own error types
        raise ValueError(f"entry {info.filename!r} of {str(path)!r} cannot be unpacked ({error})") from error
    return _limited(path, info.filename, content)


def decode(
    content: bytes, name: str, *, size: int | None = None, channels: int | None = None, resample: int | None = None
) -> np.ndarray:
    """Decodes one PNG, JPEG or BMP image.

    Transparent pixels become white, 16-bit grey becomes 8-bit, and a JPEG image is rotated according to its EXIF data.

    Args:
      content: the bytes of the file.
      name: the name of the file in error messages.
      size: height and width to resize to (proportions are not kept), or None to keep the size.
      channels: 1 (grey) or 3 (RGB), or None to keep the channels.
      resample: one of `PIL.Image.Resampling`; by default `BOX` (the mean over the area) if the image shrinks
        and `BICUBIC` if it grows.

    Returns:
      uint8 `[height, width, channels]`.

    Raises:
      ValueError: the file is not an image, is damaged, or has more than `MAX_PIXELS` pixels.

    >>> file = io.BytesIO()
    >>> Image.new("1", (105, 105), 1).save(file, "PNG")
    >>> image = decode(file.getvalue(), "white.png", size=28)
    >>> image.shape, int(image.min())
    ((28, 28, 1), 255)
    """
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"it has {width} x {height} pixels, the limit is {MAX_PIXELS}")
            return _to_array(image, size, channels, resample)
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and others on damaged files
        reason = re.sub(r" <_io.*>", "", str(error))  # removes the address of the buffer
        raise ValueError(f"{name!r} is not a readable PNG, JPEG or BMP image ({reason})") from error


def _to_array(image: Image.Image, size: int | None, channels: int | None, resample: int | None) -> np.ndarray:
    if image.format == "JPEG":
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips instead of scaling
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    grey = image.mode in ("1", "L", "LA", "La")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 or (channels is None and grey) else "RGB")
    if size is not None and image.size != (size, size):
        if resample is None:
            resample = Image.Resampling.BOX if min(image.size) >= size else Image.Resampling.BICUBIC
        image = image.resize((size, size), resample)
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


def stack(images: list[np.ndarray], names: list[str], where: str) -> np.ndarray:
    """Stacks decoded images, which must have the same shape.

    Raises:
      ValueError: sizes or channels differ; the message names two files and both shapes.

    >>> stack([np.zeros([2, 2, 1], np.uint8)], ["a.png"], "folder").shape
    (1, 2, 2, 1)
    """
    for image, name in zip(images, names, strict=True):
        check_form(image, name, images[0], names[0], where)
    return np.stack(images)


def check_form(image: np.ndarray, name: str, first: np.ndarray, first_name: str, where: str) -> None:
    """Raises a ValueError if two images differ in size or channels.

    >>> check_form(np.zeros([2, 2, 1]), "b.png", np.zeros([2, 2, 1]), "a.png", "folder")
    """
    if image.shape[:2] != first.shape[:2]:
        raise ValueError(
            f"images in {where} have different sizes: {first_name!r} is {_size(first)} and {name!r} is "
            f"{_size(image)} (height x width); give size= to resize them"
        )
    if image.shape[2] != first.shape[2]:
        raise ValueError(
            f"images in {where} have different channels: {first_name!r} has {first.shape[2]} and {name!r} has "
            f"{image.shape[2]}; give channels=1 (grey) or channels=3 (RGB) to convert them"
        )


def _size(image: np.ndarray) -> str:
    return f"{image.shape[0]} x {image.shape[1]}"


def invert_images(images: np.ndarray, invert: Invert) -> np.ndarray:
    """Inverts uint8 images `[n, height, width, channels]`: all (True), none (False), or those with a bright border.

    "auto" inverts an image if the median over its border is above 127: characters written dark on white
    become ink 255 on 0, and characters that are already bright do not change.

    >>> white = np.full([1, 4, 4, 1], 255, np.uint8)
    >>> int(invert_images(white, "auto").max()), int(invert_images(255 - white, "auto").max())
    (0, 0)
    """
    if invert != "auto":
        return 255 - images if invert else images
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
    return np.where(np.median(border, axis=(1, 2))[:, None, None, None] > 127, 255 - images, images)


def check_options(size: int | None, channels: int | None, invert: Invert) -> None:
    """Raises a ValueError if `read_image_folder` does not accept one of the options.

    >>> check_options(28, 1, "auto")
    """
    if size is not None:
        _validate.positive_int("size", size)
    _validate.one_of("channels", channels, (None, 1, 3))
    if not isinstance(invert, bool) and invert != "auto":
        raise ValueError(f"invert must be True, False or 'auto', got {invert!r}")


def fingerprint(path: pathlib.Path) -> str:
    """Returns a text that identifies the state of a folder or zip without reading it: names, sizes and times.

    >>> import tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> empty = fingerprint(folder)
    >>> _ = (folder / "a").write_text("a")
    >>> fingerprint(folder) == empty
    False
    """
    names: Collection[str] = [""] if path.is_file() else sorted(_walk(path, path))
    states = [(name, (path / name).stat()) for name in names]
    return repr([(name, state.st_size, state.st_mtime_ns) for name, state in states])
