"""Omniglot: 1623 handwritten characters of 50 alphabets, 20 drawings each."""

from __future__ import annotations

import functools
import importlib.resources
import json
import os
import pathlib

import numpy as np
from PIL import Image

from metajax.core import _validate
from metajax.data import _cache
from metajax.data._source import SPLITS, ClassSource, nodes_of_groups
from metajax.data.readers import _images

_VERSION = 1  # of the cached arrays
_PARTS = {"images_background": 964, "images_evaluation": 659}  # and their numbers of classes
PROTOCOLS = ("vinyals", "lake")


def omniglot(
    path: str | os.PathLike[str],
    *,
    split: str = "train",
    protocol: str = "vinyals",
    rotations: bool | None = None,
    mirrored: bool = False,
    size: int = 28,
) -> ClassSource:
    """Loads Omniglot in its published layout, with ink 255 on 0.

    `path` is a folder that holds `images_background` and `images_evaluation`, as folders or as the published
    zips: `images_background/ALPHABET/characterNN/XXXX_YY.png`.

    Protocols:

    - "vinyals": the class split of Vinyals et al. 2016 that few-shot papers use: 1028 train, 172 val and 423
      test classes, drawn across background and evaluation set. The alphabet Gurmukhi has classes in train and
      in test.
    - "lake": test is the whole evaluation set (659 classes of 20 alphabets); val is the five whole alphabets of the
      background set that are also val in "vinyals" (172 classes); train is the other 25 alphabets (792 classes).

    With rotations, each character rotated by 90, 180 and 270 degrees is another class, so there are four times as
    many classes. The rotated versions of one character may occur in the same episode, as in the published protocol.
    By default training uses rotations; val and test use them only with `rotations=True`. `mirrored` also adds the
    mirror image of each class, which doubles their number; the published protocol does not do this.

    Images are resized from 105 x 105 with an antialiased triangle filter (of Pillow's six filters, the one that
    preserves most for nearest neighbours on pixels). They are decoded once and cached in the folder METAJAX_CACHE,
    by default ~/.cache/metajax.

    Source: Lake, Salakhutdinov & Tenenbaum 2015, "Human-level concept learning through probabilistic program
    induction", Science 350; Vinyals et al. 2016, "Matching networks for one shot learning"
    (arXiv:1606.04080).

    Args:
      path: the folder.
      split: "train", "val" or "test".
      protocol: "vinyals" or "lake".
      rotations: whether rotated characters are additional classes; None is True for train and False otherwise.
      mirrored: whether mirror images are additional classes, in training only.
      size: height and width of the images.

    Returns:
      A source with uint8 inputs `[n, size, size, 1]` and classes named `ALPHABET/characterNN`, and
      `ALPHABET/characterNN/rot90` and so on, then `ALPHABET/characterNN/mirrored` and so on. Its nodes are the
      alphabets.

    Raises:
      ValueError: an argument is invalid; files or classes are missing; a file is not an image.

    >>> omniglot("no/such/folder")
    Traceback (most recent call last):
      ...
    ValueError: path must be a folder or a zip file, got 'no/such/folder', which does not exist
    """
    _validate.one_of("split", split, SPLITS)
    _validate.one_of("protocol", protocol, PROTOCOLS)
    _validate.positive_int("size", size)
    if rotations is not None and not isinstance(rotations, bool):
        raise ValueError(f"rotations must be True, False or None, got {rotations!r}")
    if not isinstance(mirrored, bool):
        raise ValueError(f"mirrored must be True or False, got {mirrored!r}")
    folder = _images.folder_or_zip(path)
    images, names = _select(folder, split, protocol, size)
    labels = np.unique(names, return_inverse=True)[1].astype(np.int32)
    class_names = tuple(np.unique(names).tolist())
    if rotations is None:
        rotations = split == "train"
    if rotations:
        turned = [np.rot90(images, turns, axes=(1, 2)) for turns in range(4)]
        images = np.concatenate(turned)
        labels = np.concatenate([labels + turns * len(class_names) for turns in range(4)])
        class_names += tuple(f"{name}/rot{90 * turns}" for turns in (1, 2, 3) for name in class_names)
    if mirrored:
        images = np.concatenate([images, images[:, :, ::-1]])
        labels = np.concatenate([labels, labels + len(class_names)])
        class_names += tuple(f"{name}/mirrored" for name in class_names)
    name = f"omniglot-{protocol}{'-rotated' if rotations else ''}{'-mirrored' if mirrored else ''}"
    return ClassSource(name, split, images, labels, class_names, nodes=nodes_of_groups(class_names))


def _select(folder: pathlib.Path, split: str, protocol: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images `[n, size, size, 1]` and class names `[n]` of a split."""
    classes = _classes()
    if protocol == "lake" and split != "val":
        part = "images_evaluation" if split == "test" else "images_background"
        images, names = _read(folder, part, size)
        found = len(np.unique(names))
        if found != _PARTS[part]:
            raise ValueError(f"path {str(folder)!r} has {found} of the {_PARTS[part]} classes of {part}")
        keep = ~np.isin(names, sorted(classes["val"]))  # whole alphabets of the background set
        return images[keep], names[keep]
    wanted = classes[split]
    images, names = _read(folder, "images_evaluation" if split == "test" else "images_background", size)
    if split == "train":
        more, more_names = _read(folder, "images_evaluation", size)
        images, names = np.concatenate([images, more]), np.concatenate([names, more_names])
    missing = wanted.difference(names.tolist())
    if missing:
        raise ValueError(
            f"path {str(folder)!r} lacks {len(missing)} of the {len(wanted)} {split} classes, "
            f"the first is {min(missing)!r}"
        )
    keep = np.isin(names, sorted(wanted))
    return images[keep], names[keep]


@functools.cache
def _classes() -> dict[str, frozenset[str]]:
    """Returns the split of Vinyals et al.; the file lists the first and last character of each alphabet."""
    file = importlib.resources.files("metajax.data.sources") / "_splits" / "omniglot_vinyals.json"
    return {
        split: frozenset(
            f"{alphabet}/character{number:02d}"
            for alphabet, (first, last) in alphabets.items()
            for number in range(first, last + 1)
        )
        for split, alphabets in json.loads(file.read_text()).items()
    }


def _read(folder: pathlib.Path, part: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    path = next((p for p in (folder / f"{part}.zip", folder / part) if p.exists()), None)
    if path is None:
        raise ValueError(f"path must hold {' and '.join(_PARTS)} (folders or .zip), got {str(folder)!r} without {part}")
    key = f"omniglot version {_VERSION} size {size} of {path.resolve()} {_images.fingerprint(path)}"
    arrays = _cache.cached(key, functools.partial(_decode, path, part, size))
    return arrays["images"], arrays["names"]


def _decode(path: pathlib.Path, part: str, size: int) -> dict[str, np.ndarray]:
    images, names = [], []
    with _images.open_files(path) as files:
        for name in files.names:
            parts = name.removeprefix(f"{part}/").split("/")
            if len(parts) != 3:
                raise ValueError(f"path must hold {part}/ALPHABET/characterNN/NAME.png, got {name!r} in {str(path)!r}")
            image = _images.decode(
                files.read(name), str(path / name), size=size, channels=1, resample=Image.Resampling.BILINEAR
            )
            images.append(255 - image)
            names.append("/".join(parts[:2]))
    if not images:
        raise ValueError(f"path must hold {part}/ALPHABET/characterNN/NAME.png, got {str(path)!r}, which is empty")
    return {"images": np.stack(images), "names": np.array(names)}
