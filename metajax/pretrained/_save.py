"""Saves models trained here as folders that `load_pretrained_model` reads."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from metajax.core import _tree, _validate
from metajax.core._types import Params
from metajax.pretrained import _architectures, _load
from metajax.pretrained.tensors import WEIGHTS, write

_CONFIG, _TOKENIZER = "config.json", "tokenizer.json"
FILES = (_CONFIG, _TOKENIZER, WEIGHTS)


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

    The folder holds config.json, model.safetensors, whose tensors are named by leaf paths, and the tokenizer. It is
    written completely or not at all; a folder of an earlier save is replaced.

    Args:
      path: the folder.
      params: parameters of the model, with adapters merged. They may include the head of a training task, which is not
        loaded into a model of features. A decoder without a token head is loaded with features.
      factory: name of the function in `metajax.models`: "conv4", "decoder", "encoder", "resnet12" or "vit".
      options: its keywords, as JSON values, except `outputs`, `dtype` and `remat`, which the loading call sets. Shapes
        do not show all of them: a decoder with other `heads` or `theta` is another model.
      image: height, width and channels, for image models.
      max_length: maximum number of tokens of a text, for decoders, whose positions are unlimited.
      tokenizer: a tokenizer of the tokenizers library, for text models.

    Raises:
      ValueError: the factory or an option is unknown; `image` is missing or not three sizes; `max_length` is missing or
        below 1; an argument is for other factories; a parameter of the model is missing, has another shape or belongs
        to no model; the tokenizer has more tokens than the table has rows; there is another folder at `path`.
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
    _validate.one_of("factory", factory, sorted(_architectures.FACTORIES))
    kind = _architectures.FACTORIES[factory][1]
    needed = {"image": kind == "image", "max_length": factory == "decoder", "tokenizer": kind == "text"}
    for name, value in {"image": image, "max_length": max_length, "tokenizer": tokenizer}.items():
        if value is not None and not needed[name]:
            raise ValueError(f"{name} must not be given for {factory}, got {value!r}")
    if tokenizer is not None and not hasattr(tokenizer, "to_str"):
        raise ValueError(f"tokenizer must be one of the tokenizers library, got {tokenizer!r}")
    if kind == "image":
        if not isinstance(image, tuple) or len(image) != 3:
            raise ValueError(f"image must be (height, width, channels) for {factory}, got {image!r}")
        config["input"] = {
            name: _validate.positive_int(f"{name} of image", size)
            for name, size in zip(("height", "width", "channels"), image, strict=True)
        }
    tensors = named(params)
    if factory == "decoder":
        config["max_length"] = _validate.positive_int("max_length", max_length)
        if not _gives_tokens(tensors, tied=config["options"].get("tied", False)):
            config["head"] = "features"
    try:
        stored = json.dumps(config, indent=2)
    except TypeError as error:
        raise ValueError(f"options must be what JSON can hold, got {options!r} ({error})") from error
    architecture = _architectures.own(json.loads(stored))
    _check(tensors, architecture, f"{factory} of {config['options']}")
    with whole_folder(path, FILES, _is_own) as folder:
        (folder / _CONFIG).write_text(stored + "\n", encoding="utf-8")
        if tokenizer is not None:
            (folder / _TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
            _load.read_tokenizer(folder, architecture, params, user="save_pretrained_model")
        write(folder / WEIGHTS, tensors)


def _gives_tokens(tensors: Mapping[str, np.ndarray], *, tied: bool) -> bool:
    """Whether decoder parameters give token logits: a tied table, or a head with one output for each token."""
    head, table = tensors.get(_architectures.HEAD), tensors.get("embed/embedding")
    of_tokens = head is not None and table is not None and head.shape == table.shape[::-1]
    if tied is True and of_tokens:
        raise ValueError(f"params must not hold {_architectures.HEAD} of all tokens where options say tied, got both")
    return tied or of_tokens


def _check(tensors: Mapping[str, np.ndarray], architecture: _architectures.Architecture, told: str) -> None:
    """Refuses parameters that could not be loaded into the model."""
    model = architecture.model(next(iter(architecture.heads)), None, np.float32, False)
    example = _architectures.example(architecture.image)
    wanted = named(jax.eval_shape(model.init, jax.random.key(0), example), np.shape)
    for name, shape in wanted.items():
        if name not in tensors or tensors[name].shape != shape:
            found = f"shape {tensors[name].shape}" if name in tensors else f"only {', '.join(tensors)}"
            raise ValueError(f"params must hold {name} of shape {shape} for {told}, got {found}")
    surplus = [name for name in tensors if name not in wanted and not name.startswith("head/")]
    if surplus:
        raise ValueError(
            f"params must hold no leaves but those of {told} and of a head, got {', '.join(surplus)} too: merge "
            "adapters first (metajax.adapters.merge)"
        )


def _is_own(folder: pathlib.Path) -> bool:
    return _load.read_config(folder).get("model_type") == "metajax"


def named(tree: Any, of: Any = np.asarray) -> dict[str, Any]:
    """Returns the leaves of a tree by path.

    >>> named({"head": {"bias": [1, 2]}})
    {'head/bias/0': array(1), 'head/bias/1': array(2)}
    """
    return dict(zip(_tree.paths(tree), map(of, jax.tree.leaves(tree)), strict=True))


@contextlib.contextmanager
def whole_folder(
    path: str | os.PathLike[str], files: Collection[str], is_earlier: Callable[[pathlib.Path], bool]
) -> Iterator[pathlib.Path]:
    """Makes a temporary folder that replaces `path` at the end, or is removed if writing fails.

    Args:
      path: the target folder.
      files: names of all files that a save writes. A folder with any other file is never removed.
      is_earlier: whether a folder with such files comes from an earlier save.

    Raises:
      ValueError: `path` is a file, or a folder that no earlier save wrote.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as home:
    ...     with whole_folder(f"{home}/saved", ["a.txt"], lambda folder: True) as folder:
    ...         _ = (folder / "a.txt").write_text("a")
    ...     sorted(file.name for file in pathlib.Path(home, "saved").iterdir())
    ['a.txt']
    """
    target = pathlib.Path(path)
    there = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
    if (target.exists() and not target.is_dir()) or (there and not (there <= set(files) and is_earlier(target))):
        raise ValueError(
            f"path must be a new folder or that of an earlier save, with no files but {', '.join(files)}, got "
            f"{str(target)!r}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    around = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        (around / "new").mkdir()
        yield around / "new"
        try:
            if target.exists():
                target.rename(around / "old")  # folders cannot be swapped in one call: for a moment there is none
            (around / "new").rename(target)
        except BaseException:  # also an interrupt
            if (around / "old").exists() and not target.exists():
                (around / "old").rename(target)
            raise
    finally:
        shutil.rmtree(around)
