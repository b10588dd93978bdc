"""Reads labelled images."""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np

from metajax.data._source import ClassSource
from metajax.data.readers import _images
from metajax.data.readers._folders import read_image_folder
from metajax.data.readers._reading import Form, Reader, Reading, classes_of, places_in
from metajax.data.readers._texts import FORMS
from metajax.tasks import classification


def encode(form: Form, inputs: Any, name: str = "inputs") -> Reading:
    """Reads unlabelled images, arrays of bytes `[n, height, width, channels]`.

    Raises:
      ValueError: the inputs are something else, or have another size than the model accepts.
    """
    images = np.asarray(inputs)
    fits = images.shape[1:] == form.image if form.image is not None else images.ndim == 4
    if images.dtype != np.uint8 or not fits or not len(images):
        size = ", ".join(map(str, form.image)) if form.image else "height, width, channels"
        raise ValueError(
            f"{name} must be uint8 images [n, {size}], which the model takes, got {images.dtype} of shape "
            f"{images.shape}"
        )
    return Reading(images, None, (), name)


def read(
    form: Form, task: Any, *, classes: tuple[Any, ...] | None = None, labelled: bool = True, name: str = "task"
) -> Reading:
    """Reads labelled images: a folder or zip of CLASS/NAME.png, a pair of arrays and labels, or a source of images.

    With `labelled=False` a folder may also hold the images directly.

    Raises:
      ValueError: the task is something else, or holds texts, images of another size, or a class outside `classes`.
    """
    if isinstance(task, str | os.PathLike):
        return _from_folder(form, os.fspath(task), classes, labelled, name)
    if isinstance(task, tuple) and len(task) == 2:
        inputs, labels = task
        found = encode(form, inputs)
        known, places = classes_of(labels, len(inputs))
        return found._replace(targets=places, classes=known, name=f"the {name}")
    if isinstance(task, ClassSource):
        if isinstance(task.inputs, dict) or task.task is not classification:
            raise ValueError(f"{name} must be of images with a class each, which the model takes, got {task!r}")
        kept = np.flatnonzero(task.labels >= 0)
        images = jax.tree.map(lambda leaf: leaf.take(kept, axis=0), task.inputs)
        families = task.families if len(kept) == len(task.labels) else None
        found = encode(form, images, f"inputs of {task!r}")
        return found._replace(targets=task.labels[kept], classes=task.class_names, name=repr(task), families=families)
    raise ValueError(f"{name} must be {FORMS}, got {task!r}")


def _from_folder(form: Form, path: str, classes: tuple[Any, ...] | None, labelled: bool, name: str) -> Reading:
    height, width, channels = form.image or (None, None, form.channels)
    size = (height if height == width else None) if form.image else form.size
    options: dict[str, Any] = {"size": size, "channels": channels}
    if labelled and form.image:
        if not os.path.exists(path):
            raise ValueError(f"{name} must be {FORMS}, got {path!r}, which does not exist")
        if not os.path.isdir(path) and not path.lower().endswith(".zip"):
            raise ValueError(f"{name} must be of images, which the model takes, got {path!r}")
    if not labelled:
        with _images.open_files(path) as files:
            if not files.names:
                raise ValueError(f"must be a folder of images, got {path!r}, which holds no files")
            if not any("/" in file for file in files.names):
                several = [_images.decode(files.read(file), file, **options) for file in files.names]
                stacked = _images.stack(several, list(files.names), repr(path))
                inverted = _images.invert_images(stacked, form.invert)
                return Reading(inverted, None, classes or (), repr(path), tuple(files.names))
    found = read_image_folder(path, invert=form.invert, **options)
    images = found.images
    if form.image is not None:
        images = encode(form, images, f"{name} {path!r}").inputs
    if classes is None:
        return Reading(images, found.labels, found.class_names, repr(path), found.file_names)
    places = places_in(classes, found.class_names)
    return Reading(images, places[found.labels], classes, repr(path), found.file_names)


reader = Reader(classification, "image", FORMS, read, encode)
