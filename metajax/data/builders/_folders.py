"""Builders that read folders and zips of images."""

from __future__ import annotations

import abc
import contextlib
import io
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

from metajax.core import _validate
from metajax.data.readers import _folders, _images

_Classes = Mapping[str, list[tuple[_images.Files, str]]]  # class -> its files, and where to read them
_Examples = Iterator[tuple[str, dict[str, Any]]]


class _Folders(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """The base class of the builders: classes of images, with the name of each file."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # where TFDS would look for checksums of downloads

    def __init__(self, path: str | os.PathLike[str], **options: Any) -> None:
        self._path = path
        super().__init__(**options)
        self._original_state = {"path": path, **options}  # what pickle passes to __init__

    @abc.abstractmethod
    def _open(self, opened: contextlib.ExitStack) -> dict[str, _Classes]:
        """Returns the classes of each TFDS split, sorted."""

    @abc.abstractmethod
    def _stored(self, content: bytes, name: str) -> bytes:
        """Checks an image file and returns the bytes to store."""

    def _described(self, shape: tuple[int | None, int | None, int], **about: str) -> tfds.core.DatasetInfo:
        with contextlib.ExitStack() as opened:
            names = sorted({name for classes in self._open(opened).values() for name in classes})
        for name in names:
            if name != name.strip() or "\n" in name:  # TFDS stores them in a text file
                raise ValueError(
                    f"path must hold classes whose names fit on a line, got {name!r} in {str(self._path)!r}"
                )
        features = {
            "file_name": tfds.features.Text(),
            "image": tfds.features.Image(shape=shape),
            "label": tfds.features.ClassLabel(names=names),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), **about)

    def _split_generators(self, dl_manager: Any) -> dict[str, _Examples]:
        with contextlib.ExitStack() as opened:
            return {split: self._generate_examples(split) for split in self._open(opened)}

    def _generate_examples(self, split: str) -> _Examples:
        with contextlib.ExitStack() as opened:
            for label, members in self._open(opened)[split].items():
                for files, name in members:
                    content = self._stored(files.read(name), str(files.path / name))
                    yield name, {"file_name": name, "image": content, "label": label}


class Omniglot(_Folders, skip_registration=True):  # type: ignore[call-arg]
    """Omniglot as a TFDS set, `metajax_omniglot`, from the published zips.

    Classes are `ALPHABET/characterNN`, in the TFDS splits "background" (964 classes) and "evaluation" (659 others).
    Images are PNG of 105 x 105 x 1 with ink 0 on 255, as published: `tfds_source(..., invert=True)` gives ink 255 on 0.
    The name differs from the "omniglot" of TFDS, which has RGB images and labels without names.

    Source: Lake, Salakhutdinov & Tenenbaum 2015, "Human-level concept learning through probabilistic program
    induction", Science 350.

    Args:
      path: a folder that holds `images_background` and `images_evaluation`, as folders or as the published zips.
      options: options of `tfds.core.GeneratorBasedBuilder`: `data_dir`, the folder for the prepared set (by default
        the folder in TFDS_DATA_DIR, or ~/tensorflow_datasets), and `file_format`, "tfrecord" or "array_record".

    Raises:
      ValueError: the folder does not have this layout; or, when the set is prepared, a file is not such an image.

    >>> Omniglot("no/such/folder")
    Traceback (most recent call last):
      ...
    ValueError: path must be a folder or a zip file, got 'no/such/folder', which does not exist
    """

    name = "metajax_omniglot"

    def _info(self) -> tfds.core.DatasetInfo:
        return self._described(
            (105, 105, 1),
            description="Handwritten characters of 50 alphabets, drawn by 20 people each.",
            homepage="https://github.com/brendenlake/omniglot",
            citation="""@article{lake2015human,
  title={Human-level concept learning through probabilistic program induction},
  author={Lake, Brenden M. and Salakhutdinov, Ruslan and Tenenbaum, Joshua B.},
  journal={Science},
  volume={350},
  number={6266},
  pages={1332--1338},
  year={2015}
}""",
        )

    def _open(self, opened: contextlib.ExitStack) -> dict[str, _Classes]:
        folder, found = _images.folder_or_zip(self._path), dict[str, _Classes]()
        for split in ("background", "evaluation"):
            path = next((p for p in (folder / f"images_{split}.zip", folder / f"images_{split}") if p.exists()), None)
            if path is None:
                raise ValueError(
                    f"path must hold images_background and images_evaluation (folders or .zip), got {str(folder)!r} "
                    f"without images_{split}"
                )
            found[split] = _folders.classes_of(opened.enter_context(_images.open_files(path)))
        return found

    def _stored(self, content: bytes, name: str) -> bytes:
        image = _images.decode(content, name, channels=1)
        if image.shape != (105, 105, 1):
            raise ValueError(f"{name!r} must be an image of 105 x 105 pixels, got {image.shape[0]} x {image.shape[1]}")
        file = io.BytesIO()
        Image.fromarray(image[..., 0]).save(file, "PNG")  # published with one bit, which some decoders return as 1
        return file.getvalue()


class ImageFolder(_Folders, skip_registration=True):  # type: ignore[call-arg]
    """User images as a TFDS set: `CLASS/NAME.png` or `GROUP/CLASS/NAME.png` (also .jpg, .bmp), as for `image_folder`.

    The files are stored unchanged; each is decoded once to check it. If `path` holds `train`, `val` and `test`, the
    TFDS splits have these names; otherwise there is one split, "train". If the splits divide the classes,
    `tfds_source(name, "val", parts=("val",), splits={"val": 1.0})` reads one of them unchanged.

    Args:
      path: a folder or a zip file.
      name: name of the set: lower-case letters, digits and underscores.
      channels: 1 (grey) or 3 (RGB) converts images when they are read; None requires that all images agree.
      options: options of `tfds.core.GeneratorBasedBuilder`: `data_dir`, the folder for the prepared set (by default
        the folder in TFDS_DATA_DIR, or ~/tensorflow_datasets), and `file_format`, "tfrecord" or "array_record".

    Raises:
      ValueError: the name or the folder does not have this form; or, when the set is prepared, a file is not an image,
        or channels differ and `channels` is None.

    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for label in ("crow", "owl"):
    ...     (folder / label).mkdir()
    ...     Image.new("L", (8, 8)).save(folder / label / "1.png")
    >>> builder = ImageFolder(folder, name="birds", data_dir=folder / "prepared", file_format="array_record")
    >>> builder.info.full_name, builder.info.features["label"].names
    ('birds/1.0.0', ['crow', 'owl'])
    """

    def __init__(self, path: str | os.PathLike[str], *, name: str, channels: int | None = None, **options: Any) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"name must be of lower-case letters, digits and underscores, got {name!r}")
        _validate.one_of("channels", channels, (None, 1, 3))
        self.name, self._channels = name, channels
        super().__init__(path, **options)
        self._original_state.update(name=name, channels=channels)

    def _info(self) -> tfds.core.DatasetInfo:
        with contextlib.ExitStack() as opened:
            files, name = next(iter(next(iter(self._open(opened).values())).values()))[0]
            first = _images.decode(files.read(name), str(files.path / name), channels=self._channels)
        self._first = (first[:1, :1], name)
        return self._described((None, None, first.shape[2]), description="Images in folders of classes.")

    def _open(self, opened: contextlib.ExitStack) -> dict[str, _Classes]:
        return {part.split or "train": part.classes for part in _folders.parts_of(opened, self._path)}

    def _stored(self, content: bytes, name: str) -> bytes:
        image = _images.decode(content, name, channels=self._channels)
        one = image[:1, :1]  # sizes may differ until they are read
        _images.check_form(one, name, *self._first, repr(str(self._path)))
        return content
