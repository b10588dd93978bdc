"""Few-shot classification on a folder of images."""

from __future__ import annotations

import contextlib
import os

from metajax.core import _validate
from metajax.data._source import SPLITS, ClassSource, nodes_of_groups
from metajax.data.readers import _folders, _image_store, _images
from metajax.data.sources._class_splits import Splits, divide


def image_folder(
    path: str | os.PathLike[str],
    *,
    split: str = "train",
    size: int | None = None,
    channels: int | None = None,
    invert: _images.Invert = False,
    splits: Splits | None = None,
    cache_bytes: int | None = None,
) -> ClassSource:
    """Loads classes from a folder or zip of `CLASS/NAME.png` (also .jpg and .bmp), grey or RGB.

    `GROUP/CLASS/NAME.png` gives classes named `GROUP/CLASS`, with the groups as nodes for hierarchical episodes.

    If `path` holds `train`, `val` and `test` (folders of classes, or `train.zip`, `val.zip`, `test.zip`),
    these are the splits, unless `splits` divides their classes again. Otherwise `splits` divides the classes, by
    default 64 % train, 16 % val and 20 % test, in an order that is the same on every machine.

    Zips are read in place, and unsafe zips are refused: nothing is ever unpacked to disk.

    Args:
      path: a folder or a zip file.
      split: "train", "val" or "test".
      size: height and width to resize to, or None if all images have the same size.
      channels: 1 (grey) or 3 (RGB), or None if all images agree.
      invert: True, False, or "auto": images with a bright border are inverted. Models then get characters written
        dark on white as ink 255 on 0.
      splits: class names by split, such as `{"train": ["cat", "dog"], "test": ["owl", "elk"]}` or
        `metajax.data.class_lists("fc100")`, or shares, such as `{"train": 0.8, "test": 0.2}`. Classes that are not in
        the lists are not used.
      cache_bytes: None decodes all images now and keeps them in memory. A number decodes images when episodes need
        them and keeps at most this many bytes, for sets that are larger than memory. Errors in an image are then found
        when it is read.

    Returns:
      A source with uint8 inputs `[n, height, width, channels]`.

    Raises:
      ValueError: `path` does not exist; the split has no classes; a class is in two splits; a file is not an image or
        is outside a class; sizes or channels differ and `size` or `channels` is None; a zip is unsafe; `splits`
        names a class that does not exist or names one twice, or its shares do not sum to 1.

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
    with contextlib.ExitStack() as opened:
        parts, where = _folders.parts_of(opened, path), f"path {os.fspath(path)!r}"
        if splits is None and parts[0].split is not None:
            _folders.check_disjoint(parts, where)
            classes = next((part.classes for part in parts if part.split == split), None)
            if classes is None:
                raise ValueError(f"split {split!r} is not in {where}, which holds other splits")
        else:
            together: _folders.Members = {}
            for part in parts:
                for name, members in part.classes.items():
                    together.setdefault(name, []).extend(members)
            classes = {name: together[name] for name in divide(together, split, splits, where)}
        images, labels = _folders.read_members(classes, repr(str(path)), size, channels, invert, cache_bytes)
        if isinstance(images, _image_store.StoredImages):
            images.owner = opened.pop_all()  # zips stay open as long as they may be read
        return ClassSource(os.fspath(path), split, images, labels, tuple(classes), nodes=nodes_of_groups(classes))
