"""Models trained here, as folders that `load_pretrained_model` reads."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from metajax.core import _tree, _validate
from metajax.core._types import Params
from metajax.pretrained import _architectures, _tensors


def save_pretrained_model(
    path: str | os.PathLike[str],
    params: Params,
    *,
    factory: str,
    options: Mapping[str, Any] | None = None,
    image: tuple[int, int, int] | None = None,
    max_length: int | None = None,
    tokenizer: Any = None,
) -> None:
    """Saves a model of `metajax.models` as a folder that `load_pretrained_model` reads.

    The folder holds config.json, model.safetensors, whose tensors are named by the paths of the leaves, and the
    tokenizer. It is there whole or not at all; a folder of an earlier save is replaced.

    Args:
      path: the folder.
      params: parameters of the model; those of a head of the task it was trained on may be among them, and are not
        loaded into a model of features.
      factory: name of the function in `metajax.models`: "conv4", "decoder", "encoder", "resnet12" or "vit".
      options: its keywords that JSON can hold, but not `outputs`, `dtype` and `remat`, which the loading call decides.
      image: height, width and channels, for models of images.
      max_length: the most tokens of a text, for decoders, whose positions have no end.
      tokenizer: of the tokenizers library, for models of texts.

    Raises:
      ValueError: an unknown factory or option; `image` is missing, or of no three sizes; `max_length` is
        missing, or below 1; a parameter of the model is missing or has another shape; another folder is there.
      ImportError: the safetensors library is not installed.

    >>> import jax, jax.numpy as jnp, pathlib, tempfile, metajax
    >>> model = metajax.models.conv4(width=8, normalisation="layer")
    >>> params = model.init(jax.random.key(0), jnp.zeros([1, 28, 28, 1]))
    >>> folder = pathlib.Path(tempfile.mkdtemp()) / "glyphs"
    >>> options = {"width": 8, "normalisation": "layer"}
    >>> save_pretrained_model(folder, params, factory="conv4", options=options, image=(28, 28, 1))
    >>> metajax.load_pretrained_model(folder).image
    (28, 28, 1)
    """
    config: dict[str, Any] = {"model_type": "metajax", "factory": factory, "options": dict(options or {})}
    if _validate.one_of("factory", factory, sorted(_architectures.FACTORIES)) and _kind(factory) == "image":
        if not isinstance(image, tuple) or len(image) != 3:
            raise ValueError(f"image must be (height, width, channels) for {factory}, got {image!r}")
        config["input"] = {
            name: _validate.positive_int(f"{name} of image", size)
            for name, size in zip(("height", "width", "channels"), image, strict=True)
        }
    if factory == "decoder":
        config["max_length"] = _validate.positive_int("max_length", max_length)
    architecture = _architectures.own(json.loads(json.dumps(config)))
    tensors = named(params)
    model = architecture.model(architecture.heads[0], None, np.float32, False)
    example = _architectures.example(architecture.image)
    wanted = named(jax.eval_shape(model.init, jax.random.key(0), example), np.shape)
    for name, shape in wanted.items():
        if name not in tensors or tensors[name].shape != shape:
            found = f"shape {tensors[name].shape}" if name in tensors else f"only {', '.join(tensors)}"
            raise ValueError(
                f"params must hold {name} of shape {shape} for {factory} of {config['options']}, got {found}"
            )
    with whole_folder(path, "config.json") as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _tensors.write(folder / _tensors.WEIGHTS, tensors)
        if tokenizer is not None:
            (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")


def _kind(factory: str) -> str:
    return _architectures.FACTORIES[factory][1]


def named(tree: Any, of: Any = np.asarray) -> dict[str, Any]:
    """The leaves of a tree by path.

    >>> named({"head": {"bias": [1, 2]}})
    {'head/bias/0': array(1), 'head/bias/1': array(2)}
    """
    return dict(zip(_tree.paths(tree), map(of, jax.tree.leaves(tree)), strict=True))


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str], marker: str) -> Iterator[pathlib.Path]:
    """A temporary folder beside `path` that takes its place in the end, or is removed where writing fails.

    Raises:
      ValueError: at `path` is a file, or a folder with files but without `marker`, which no earlier save wrote.
    """
    target = pathlib.Path(path)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / marker).is_file())):
        raise ValueError(f"path must be a new folder or one with a {marker} to replace, got {str(target)!r}")
    target.parent.mkdir(parents=True, exist_ok=True)
    around = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        (around / "new").mkdir()
        yield around / "new"
        if target.exists():
            target.rename(around / "old")  # no call swaps two folders: between these lines a reader finds none
        (around / "new").rename(target)
    finally:
        shutil.rmtree(around)
