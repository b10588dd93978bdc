"""Few-shot classification on anybody's folder of images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence

from metajax.core import _validate
from metajax.data import _images
from metajax.data._sources import SPLITS, ClassSource

_VAL, _TEST = 0.16, 0.20  # of the classes, as in miniImageNet and CIFAR-FS (64, 16 and 20 of 100)


def image_folder(
    path: str | os.PathLike[str],
    *,
    split: str = "train",
    size: int | None = None,
    channels: int | None = None,
    invert: _images.Invert = False,
    splits: Mapping[str, Sequence[str]] | None = None,
) -> ClassSource:
    """Classes from a folder or zip of `CLASS/NAME.png` (also .jpg and .bmp), grey or RGB.

    Where `path` holds `train`, `val` and `test` (folders of classes, or `train.zip`, `val.zip`, `test.zip`),
    these are the splits. Otherwise the classes are divided by `splits`, or else 64 % train, 16 % val and 20 %
    test: in the order of the SHA-256 of their names, so that neighbours in the alphabet are not kept together
    and every machine gets the same; val and test have at least one class each.

    Zips are read in place, and unsafe ones are refused: nothing is ever unpacked to disk.

    Args:
      path: a folder or a zip file.
      split: "train", "val" or "test".
      size: height and width to resize to, or None where all images have one size.
      channels: 1 (grey) or 3 (RGB), or None where all images agree.
      invert: True, False, or "auto": images with a bright border are inverted. Characters written dark on
        white are given to models as ink 255 on 0.
      splits: class names by split, such as `{"train": ["cat", "dog"], "test": ["owl", "elk"]}`. Classes that
        it leaves out are not used.

    Returns:
      A source with uint8 inputs `[n, height, width, channels]`, held in memory.

    Raises:
      ValueError: nothing is there; the split has no classes; a class has one image; a file is not an image or
        stands outside a class; sizes or channels differ and `size` or `channels` is None; a zip is unsafe;
        `splits` names a class that is not there or names one twice.

    >>> import pathlib, tempfile
    >>> from PIL import Image
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for name in ("ant", "bee", "cow"):
    ...     (folder / name).mkdir()
    ...     for k in range(4):
    ...         Image.new("L", (8, 8), k).save(folder / name / f"{k}.png")
    >>> image_folder(folder, splits={"train": ["ant", "cow"], "test": ["bee"]}).inputs.shape
    (8, 8, 8, 1)
    """
    _validate.one_of("split", split, SPLITS)
    _images.check_options(size, channels, invert)
    if splits is not None:
        _check_splits(splits)
    with _images.open_files(path) as files:
        if any(f"{name}.zip" in files.names for name in SPLITS):
            folder = _unsplit(files, split, splits)
            with _images.open_files(folder) as inner:
                return _source(path, split, inner, _images.classes_of(inner), size, channels, invert)
        below = _split_folder(files.names, split)
        if below is not None:
            _unsplit(files, split, splits, below)
            return _source(path, split, files, _images.classes_of(files, below), size, channels, invert)
        classes = _images.classes_of(files)
        chosen = _hashed(classes, split, str(path)) if splits is None else _named(classes, split, splits, str(path))
        return _source(path, split, files, {name: classes[name] for name in sorted(chosen)}, size, channels, invert)


def _source(
    path: str | os.PathLike[str],
    split: str,
    files: _images.Files,
    classes: dict[str, list[str]],
    size: int | None,
    channels: int | None,
    invert: _images.Invert,
) -> ClassSource:
    read = _images.read_classes(files, classes, size=size, channels=channels, invert=invert)
    return ClassSource(os.fspath(path), split, read.images, read.labels, read.class_names)


def _split_folder(names: Sequence[str], split: str) -> str | None:
    """`split/`, where there are folders of classes named after splits, maybe with one folder around them."""
    parts = [name.split("/") for name in names]
    around = 1 if all(len(part) == 4 for part in parts) and len({part[0] for part in parts}) == 1 else 0
    if any(len(part) == around + 3 and part[around] in SPLITS for part in parts):
        return "/".join([*parts[0][:around], split, ""])
    return None


def _unsplit(
    files: _images.Files, split: str, splits: Mapping[str, Sequence[str]] | None, below: str | None = None
) -> os.PathLike[str]:
    """Checks that the split is there, and that no other division is asked for; returns its zip."""
    if splits is not None:
        raise ValueError(f"splits must be None, because {str(files.path)!r} is divided already; got {splits!r}")
    there = f"{split}.zip" in files.names if below is None else any(name.startswith(below) for name in files.names)
    if not there:
        raise ValueError(f"split {split!r} is not in path {str(files.path)!r}, which holds other splits")
    return files.path / f"{split}.zip"


def _check_splits(splits: Mapping[str, Sequence[str]]) -> None:
    seen: dict[str, str] = {}
    for key, names in splits.items():
        _validate.one_of("a key of splits", key, SPLITS)
        if isinstance(names, str):
            raise ValueError(f"splits[{key!r}] must be a list of class names, got {names!r}")
        for name in names:
            if name in seen:
                raise ValueError(f"splits names class {name!r} twice ({seen[name]}, {key}); splits must be disjoint")
            seen[name] = key


def _named(classes: Mapping[str, object], split: str, splits: Mapping[str, Sequence[str]], path: str) -> list[str]:
    for key, names in splits.items():
        for name in names:
            if name not in classes:
                raise ValueError(f"splits[{key!r}] names class {name!r}, which is not in path {path!r}")
    if not splits.get(split):
        raise ValueError(f"splits must name classes for split {split!r}, got {dict(splits)!r}")
    return list(splits[split])


def _hashed(classes: Mapping[str, object], split: str, path: str) -> list[str]:
    if len(classes) < len(SPLITS):
        raise ValueError(
            f"path {path!r} has {len(classes)} class(es); dividing them into {', '.join(SPLITS)} takes at least "
            f"{len(SPLITS)}: give splits={{{split!r}: [class names]}}"
        )
    order = sorted(classes, key=lambda name: hashlib.sha256(name.encode()).digest())
    val, test = (max(1, round(share * len(order))) for share in (_VAL, _TEST))
    train = len(order) - val - test
    return {"train": order[:train], "val": order[train : train + val], "test": order[train + val :]}[split]
