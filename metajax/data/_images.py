"""Reading images from folders and zip files that nobody has vouched for."""

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
_DEPTH = 5  # folders below the one that is read


class Files(NamedTuple):
    """The visible files of a folder or zip.

    Attributes:
      path: the folder or zip.
      names: sorted, relative to it, with `/` between the parts.
      read: `(name) -> bytes`.
    """

    path: pathlib.Path
    names: tuple[str, ...]
    read: Callable[[str], bytes]


class ImageFolder(NamedTuple):
    """Labelled images.

    Attributes:
      images: uint8 `[n, height, width, channels]`.
      labels: int32 `[n]`, positions in `class_names`.
      class_names: sorted.
      file_names: `CLASS/NAME.png`, one for each image.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    file_names: tuple[str, ...]


@contextlib.contextmanager
def open_files(path: str | os.PathLike[str]) -> Iterator[Files]:
    """Lists a folder or a zip file. Hidden files (`.DS_Store`, `__MACOSX`, `Thumbs.db`) are left out.

    Everything that can be wrong with a zip's list of contents is refused before any of it is unpacked, and
    nothing is ever written to disk.

    Raises:
      ValueError: there is no such folder or zip; or an entry of the zip points outside (`../`, an absolute
        path, a symbolic link), is encrypted, stands there twice, or is larger than `MAX_FILE_BYTES`.

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
    """Returns `path` if something is there.

    Raises:
      ValueError: it is empty (which would be the current folder), or there is no such folder or file.

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
            content = file.read(MAX_FILE_BYTES + 1)  # the size that the zip declares may be a lie
    except Exception as error:  # zipfile, zlib, lzma and bz2 each have their own
        raise ValueError(f"entry {info.filename!r} of {str(path)!r} cannot be unpacked ({error})") from error
    return _limited(path, info.filename, content)


def decode(
    content: bytes, name: str, *, size: int | None = None, channels: int | None = None, resample: int | None = None
) -> np.ndarray:
    """Decodes one PNG, JPEG or BMP image.

    Transparent pixels become white, 16-bit grey becomes 8-bit, and a photograph is turned as its EXIF data say.

    Args:
      content: the file.
      name: what errors call it.
      size: height and width to resize to (sides are not kept in proportion), or None for those it has.
      channels: 1 (grey) or 3 (RGB), or None for what it has.
      resample: one of `PIL.Image.Resampling`; by default `BOX` (the mean over the area) where the image shrinks
        and `BICUBIC` where it grows.

    Returns:
      uint8 `[height, width, channels]`.

    Raises:
      ValueError: it is not an image, or is damaged, or has more than `MAX_PIXELS` pixels.

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
        reason = re.sub(r" <_io.*>", "", str(error))  # the address of a buffer tells nobody anything
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
    """Stacks decoded images, which must have one shape.

    Raises:
      ValueError: sizes or channels differ; names two files and both shapes.

    >>> stack([np.zeros([2, 2, 1], np.uint8)], ["a.png"], "folder").shape
    (1, 2, 2, 1)
    """
    for image, name in zip(images, names, strict=True):
        if image.shape[:2] != images[0].shape[:2]:
            raise ValueError(
                f"images in {where} have different sizes: {names[0]!r} is {_size(images[0])} and {name!r} is "
                f"{_size(image)} (height x width); give size= to resize them"
            )
        if image.shape[2] != images[0].shape[2]:
            raise ValueError(
                f"images in {where} have different channels: {names[0]!r} has {images[0].shape[2]} and {name!r} has "
                f"{image.shape[2]}; give channels=1 (grey) or channels=3 (RGB) to convert them"
            )
    return np.stack(images)


def _size(image: np.ndarray) -> str:
    return f"{image.shape[0]} x {image.shape[1]}"


def invert_images(images: np.ndarray, invert: Invert) -> np.ndarray:
    """Inverts uint8 images `[n, height, width, channels]`: all (True), none (False), or those with a bright border.

    "auto" inverts an image where the median over its border is above 127: characters written dark on white
    become ink 255 on 0, and characters that are bright already stay.

    >>> white = np.full([1, 4, 4, 1], 255, np.uint8)
    >>> int(invert_images(white, "auto").max()), int(invert_images(255 - white, "auto").max())
    (0, 0)
    """
    if invert != "auto":
        return 255 - images if invert else images
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
    return np.where(np.median(border, axis=(1, 2))[:, None, None, None] > 127, 255 - images, images)


def read_image_folder(
    path: str | os.PathLike[str],
    *,
    size: int | None = None,
    channels: int | None = None,
    invert: Invert = False,
) -> ImageFolder:
    """Reads all images of a folder or zip of `CLASS/NAME.png` (or .jpg, .bmp).

    One folder around all classes, as many zips have it, is looked through. Hidden files are ignored; every
    other file must be an image in a class.

    Args:
      path: a folder or a zip file.
      size: height and width to resize to, or None where all images have one size.
      channels: 1 (grey) or 3 (RGB), or None where all images agree.
      invert: True, False, or "auto" (images with a bright border are inverted).

    Raises:
      ValueError: nothing is there, a file is not an image or not in a class, images have different sizes or
        channels, or a zip is unsafe (see `open_files`).

    >>> import tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for name in ("cat", "dog"):
    ...     (folder / name).mkdir()
    ...     Image.new("RGB", (8, 8)).save(folder / name / "1.png")
    >>> found = read_image_folder(folder)
    >>> found.images.shape, found.labels.tolist(), found.class_names
    ((2, 8, 8, 3), [0, 1], ('cat', 'dog'))
    """
    check_options(size, channels, invert)
    with open_files(path) as files:
        return read_classes(files, classes_of(files), size=size, channels=channels, invert=invert)


def check_options(size: int | None, channels: int | None, invert: Invert) -> None:
    """Raises a ValueError where one of the options is not what `read_image_folder` takes.

    >>> check_options(28, 1, "auto")
    """
    if size is not None:
        _validate.positive_int("size", size)
    _validate.one_of("channels", channels, (None, 1, 3))
    if not isinstance(invert, bool) and invert != "auto":
        raise ValueError(f"invert must be True, False or 'auto', got {invert!r}")


def classes_of(files: Files, below: str = "") -> dict[str, list[str]]:
    """The files of each class, `{CLASS: [names]}`, sorted; only those below the folder `below`, if named.

    Raises:
      ValueError: there are no files, or one is not in a class folder.

    >>> classes_of(Files(pathlib.Path("x"), ("a/1.png", "b/1.png"), bytes))
    {'a': ['a/1.png'], 'b': ['b/1.png']}
    """
    names = [name for name in files.names if name.startswith(below)]
    where = str(files.path / below)
    if not names:
        raise ValueError(f"path must hold images as CLASS/NAME.png, got {where!r}, which holds no files")
    depth = below.count("/")
    parts = [name.split("/") for name in names]
    if all(len(part) == depth + 3 for part in parts) and len({part[depth] for part in parts}) == 1:
        depth += 1  # one folder around all classes
    classes: dict[str, list[str]] = {}
    for name, part in zip(names, parts, strict=True):
        if len(part) != depth + 2:
            raise ValueError(f"path must hold images as CLASS/NAME.png and nothing else, got {name!r} in {where!r}")
        classes.setdefault(part[depth], []).append(name)
    return dict(sorted(classes.items()))


def read_classes(
    files: Files, classes: dict[str, list[str]], *, size: int | None, channels: int | None, invert: Invert
) -> ImageFolder:
    """Reads the images that `classes` lists.

    >>> file = io.BytesIO()
    >>> Image.new("L", (8, 8)).save(file, "PNG")
    >>> files = Files(pathlib.Path("x"), ("a/1.png",), lambda name: file.getvalue())
    >>> read_classes(files, classes_of(files), size=None, channels=None, invert=False).images.shape
    (1, 8, 8, 1)
    """
    names = [name for members in classes.values() for name in members]
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(members) for members in classes.values()])
    images = [decode(files.read(name), str(files.path / name), size=size, channels=channels) for name in names]
    short = tuple("/".join(name.split("/")[-2:]) for name in names)
    return ImageFolder(
        invert_images(stack(images, names, repr(str(files.path))), invert), labels, tuple(classes), short
    )


def fingerprint(path: pathlib.Path) -> str:
    """What tells one state of a folder or zip from another without reading it: names, sizes and times.

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
