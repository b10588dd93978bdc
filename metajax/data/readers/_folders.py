"""Reads folders and zips of images with one folder for each class."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from metajax.data._source import SPLITS
from metajax.data.readers import _image_store, _images

Members = dict[str, list[tuple[_images.Files, str]]]  # class -> its files, and where to read them


class ImageFolder(NamedTuple):
    """Labelled images.

    Attributes:
      images: uint8 `[n, height, width, channels]`.
      labels: int32 `[n]`, positions in `class_names`.
      class_names: the names of the classes, sorted.
      file_names: `CLASS/NAME.png`, one for each image.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    file_names: tuple[str, ...]


def read_image_folder(
    path: str | os.PathLike[str],
    *,
    size: int | None = None,
    channels: int | None = None,
    invert: _images.Invert = False,
) -> ImageFolder:
    """Reads all images of a folder or zip of `CLASS/NAME.png` (or .jpg, .bmp), without splitting them.

    All classes may be inside one outer folder, as in many zips. Hidden files are ignored; every other file must be
    an image in a class.

    Args:
      path: a folder or a zip file.
      size: height and width to resize to, or None if all images have the same size.
      channels: 1 (grey) or 3 (RGB), or None if all images agree.
      invert: True, False, or "auto" (images with a bright border are inverted).

    Raises:
      ValueError: `path` does not exist, a file is not an image or not in a class, images have different sizes or
        channels, or a zip is unsafe (see `open_files`).

    >>> import pathlib, tempfile
    >>> from PIL import Image
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for name in ("cat", "dog"):
    ...     (folder / name).mkdir()
    ...     Image.new("RGB", (8, 8)).save(folder / name / "1.png")
    >>> found = read_image_folder(folder)
    >>> found.images.shape, found.labels.tolist(), found.class_names
    ((2, 8, 8, 3), [0, 1], ('cat', 'dog'))
    """
    _images.check_options(size, channels, invert)
    with _images.open_files(path) as files:
        classes = classes_of(files)
        images, labels = read_members(classes, repr(str(path)), size, channels, invert, None)
    names = tuple("/".join(name.split("/")[-2:]) for members in classes.values() for _, name in members)
    return ImageFolder(np.asarray(images), labels, tuple(classes), names)


class Part(NamedTuple):
    """The classes of a split."""

    split: str | None  # None: the data is not split
    classes: Members


def parts_of(opened: contextlib.ExitStack, path: str | os.PathLike[str]) -> list[Part]:
    """Returns the classes of a folder or zip in its own splits; `opened` closes the opened files."""
    files = opened.enter_context(_images.open_files(path))
    zips = [split for split in SPLITS if f"{split}.zip" in files.names]
    if zips:
        archives = [opened.enter_context(_images.open_files(files.path / f"{split}.zip")) for split in zips]
        return [Part(split, classes_of(archive)) for split, archive in zip(zips, archives, strict=True)]
    below = _split_folders(files.names)
    if below:
        return [Part(split, classes_of(files, folder)) for split, folder in below.items()]
    return [Part(None, classes_of(files))]


def _split_folders(names: Sequence[str]) -> dict[str, str]:
    """Returns `{split: folder}` for folders of classes that are named after splits, possibly in one outer folder."""
    parts = [name.split("/") for name in names]
    for around in (0, 1) if len({part[0] for part in parts}) == 1 else (0,):
        depths = (around + 3, around + 4)
        found = {part[around] for part in parts if len(part) in depths and part[around] in SPLITS}
        if found:
            return {split: "/".join([*parts[0][:around], split, ""]) for split in SPLITS if split in found}
    return {}


def classes_of(files: _images.Files, below: str = "") -> Members:
    """Returns the files of each class, sorted; only those below the folder `below`, if it is given."""
    names = [name for name in files.names if name.startswith(below)]
    where = str(files.path / below)
    if not names:
        raise ValueError(f"path must hold images as CLASS/NAME.png, got {where!r}, which holds no files")
    depth = below.count("/")
    parts = [name.split("/")[depth:] for name in names]
    lengths = {len(part) for part in parts}
    if min(lengths) > 2 and len({part[0] for part in parts}) == 1:  # one folder around all classes
        parts, lengths = [part[1:] for part in parts], {length - 1 for length in lengths}
    if lengths not in ({2}, {3}):
        name = next(name for name, part in zip(names, parts, strict=True) if len(part) != 2)
        raise ValueError(
            f"path must hold images as CLASS/NAME.png and nothing else, or all as GROUP/CLASS/NAME.png, got {name!r} "
            f"in {where!r}"
        )
    classes: Members = {}
    for name, part in zip(names, parts, strict=True):
        classes.setdefault("/".join(part[:-1]), []).append((files, name))
    return dict(sorted(classes.items()))


def check_disjoint(parts: list[Part], where: str) -> None:
    """Raises a ValueError if a class is in two splits."""
    seen: dict[str, str | None] = {}
    for part in parts:
        for name in part.classes:
            if name in seen:
                raise ValueError(
                    f"class {name!r} stands in two splits of {where} ({seen[name]}, {part.split}); few-shot splits "
                    "have different classes: divide them with splits="
                )
            seen[name] = part.split


def read_members(
    classes: Members, where: str, size: int | None, channels: int | None, invert: _images.Invert,
    cache_bytes: int | None,
) -> tuple[np.ndarray | _image_store.StoredImages, np.ndarray]:  # fmt: skip
    """Returns the images of classes, and the class number of each image."""
    entries = [entry for members in classes.values() for entry in members]
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(members) for members in classes.values()])

    def load(row: int) -> np.ndarray:
        files, name = entries[row]
        image = _images.decode(files.read(name), str(files.path / name), size=size, channels=channels)
        return _images.invert_images(image[None], invert)[0]

    def name(row: int) -> str:
        return entries[row][1]

    return _image_store.read_images(load, name, len(entries), where=where, cache_bytes=cache_bytes), labels
