"""Pretrained models from folders in the layout of Hugging Face: config.json, safetensors, tokenizer.json."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metajax.core import _tree, _validate
from metajax.core._types import Model, Params, TaskType
from metajax.data.readers import _tokens
from metajax.models._blocks import Remat
from metajax.models._wrap import as_floats
from metajax.pretrained import _architectures
from metajax.pretrained._tensors import Tensors
from metajax.tasks._lookup import ALL

_PREPROCESSOR = "preprocessor_config.json"
_MEANS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
# Of sentence-transformers: modes of pooling and the heads that they are, and modules that change no head.
_MODULES = ("Transformer", "Pooling", "Normalize")
_POOLING = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "features"}
_BUFFERS = ("position_ids", "rotary_emb.inv_freq")  # stored by some, computed by all


@dataclasses.dataclass(frozen=True)
class Report:
    """Which tensors of a folder went where.

    Attributes:
      used: names of the tensors that became leaves.
      missing: paths of the leaves that no tensor was for, which were made anew: those of a new head.
      unexpected: names of the tensors that no leaf needs, such as a head that was not asked for.

    >>> print(Report(("a", "b"), ("head/kernel",), ("pooler.dense.weight",)))
    2 tensors used
    made anew: head/kernel
    not used: pooler.dense.weight
    """

    used: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.used)} tensors used"]
        for title, names in (("made anew", self.missing), ("not used", self.unexpected)):
            lines += [f"{title}: {', '.join(names)}"] if names else []
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class PretrainedModel:
    """A model with the weights of a folder.

    Attributes:
      model: a pure `Model`; learners, adapters and estimators take it as they take any other.
      params: its parameters, arrays on the host until something computes with them.
      config: what config.json holds.
      kind: "text" or "image", of its inputs.
      tokenizer: of the tokenizers library, or None where the folder has none.
      max_length: the most tokens of a text, None for images.
      image: height, width and channels of an image, None for texts.
      report: which tensors of the folder went where.
      options: what else the model is made of, to open it again: `head`, `outputs`, `dtype`, `remat`, and what
        preprocessor_config.json holds.
      tasks: the task types that what comes out of the model serves, which its head decides.

    >>> PretrainedModel.__name__
    'PretrainedModel'
    """

    model: Model
    params: Params = dataclasses.field(repr=False)
    config: dict[str, Any] = dataclasses.field(repr=False)
    kind: str
    tokenizer: Any = dataclasses.field(repr=False)
    max_length: int | None
    image: tuple[int, int, int] | None
    report: Report = dataclasses.field(repr=False)
    options: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    tasks: tuple[TaskType, ...] = ()


def load_pretrained_model(
    path: str | os.PathLike[str],
    *,
    head: str | None = None,
    outputs: int | None = None,
    dtype: Any = jnp.float32,
    remat: Remat = True,
    key: jax.Array | None = None,
) -> PretrainedModel:
    """Loads a pretrained model from a folder in the layout of Hugging Face.

    The folder holds config.json, model.safetensors (or model.safetensors.index.json and the files that it names) and,
    for texts, tokenizer.json. Pickled weights are never read. Architectures (`model_type`): bert (BERT, MiniLM, E5),
    distilbert, roberta, xlm-roberta, llama (with the rotary positions of Llama 3.1 too), mistral, qwen2, qwen3, vit,
    and metajax, which `save_pretrained_model` writes. Images are normalised with the means of preprocessor_config.json,
    where it is there.

    Args:
      path: the folder.
      head: what comes out; the architecture's own by default, or what 1_Pooling/config.json says in a folder of
        sentence-transformers. Encoders: "mean" (of a text's tokens), "cls", "tokens" or "span", as `models.encoder`
        describes them. Decoders: logits of "tokens", or "features" of a text. Vision Transformers: "cls" or "mean".
        What `save_pretrained_model` wrote has by default that of its options.
      outputs: of a new linear layer on top, such as the ways of a task; None is features as they are.
      dtype: of the parameters, a floating-point type; bfloat16 halves a frozen base (float16 too, but CPUs do not
        compute attention in it).
      remat: whether the backward pass computes blocks once more instead of keeping their activations; "example":
        those of one example at a time, which takes less memory still.
      key: PRNG key of a new head; None is key 0.

    Returns:
      A `PretrainedModel`. Its `report` says which tensors were used, made anew and not used.

    Raises:
      ValueError: the folder has no config or no weights, or pickled ones alone; its architecture is not supported; a
        tensor is missing or has another shape or no floating-point type; a file is truncated or outside of the folder;
        the tokenizer has more tokens than the table of embeddings; an argument is out of range.
      ImportError: the safetensors or tokenizers library is not installed.

    >>> load_pretrained_model("no/such/folder")
    Traceback (most recent call last):
      ...
    ValueError: path must be a folder with a config.json, got 'no/such/folder'
    """
    folder = pathlib.Path(path)
    config, architecture = read_architecture(folder)
    head = default_head(folder, architecture, outputs) if head is None else head
    model = _made(folder, architecture, head, outputs, dtype, remat)
    tensors = Tensors(folder)
    params, report = _read(
        architecture, model, tensors, jax.random.key(0) if key is None else key, own_head=outputs is None
    )
    tokenizer = None
    if architecture.kind == "text" and (folder / "tokenizer.json").is_file():
        tokenizer = read_tokenizer(folder, architecture, params, user="load_pretrained_model")
    options = {
        "head": head, "outputs": outputs, "dtype": jnp.dtype(dtype).name, "remat": remat,
        "preprocessor": read_preprocessor(folder),
    }  # fmt: skip
    return PretrainedModel(
        model, params, config, architecture.kind, tokenizer, architecture.positions, architecture.image, report,
        options, tasks_of(architecture, head, outputs),
    )  # fmt: skip


def tasks_of(architecture: _architectures.Architecture, head: str, outputs: int | None) -> tuple[TaskType, ...]:
    """The task types that a head serves.

    A head that gives a vector of an example is one of features; with a single output on top it scores texts.
    """
    kind = architecture.heads[head]
    if kind == "features" and outputs == 1 and architecture.kind == "text":
        kind = "score"
    return tuple(task for task in ALL if kind in task.heads)


def read_tokenizer(
    folder: pathlib.Path, architecture: _architectures.Architecture, params: Params, *, user: str
) -> Any:
    """The tokenizer of a folder, which must be of its model.

    Raises:
      ValueError: as `load_tokenizer`, or it has more tokens than the table of embeddings has rows.
      ImportError: the tokenizers library is not installed.
    """
    assert architecture.positions is not None
    tokenizer = _tokens.load_tokenizer(folder, architecture.positions, user=user)
    size, rows = tokenizer.get_vocab_size(), params["embed"]["embedding"].shape[0]
    if size > rows:
        raise ValueError(
            f"tokenizer must have at most {rows} tokens, the rows of the table of embeddings, got {size}: it is of "
            "another model"
        )
    return tokenizer


def open_model(
    folder: pathlib.Path,
    *,
    head: str | None = None,
    outputs: int | None = None,
    dtype: Any = jnp.float32,
    remat: Remat = True,
) -> tuple[dict[str, Any], _architectures.Architecture, Model]:
    """What the config of a folder describes, whose weights are not read: `(config, architecture, model)`.

    Raises:
      ValueError: there is no config, or it describes no model, or its architecture or `head` is not supported, or
        `outputs` is below 1.

    >>> open_model(pathlib.Path("no/such/folder"))
    Traceback (most recent call last):
      ...
    ValueError: path must be a folder with a config.json, got 'no/such/folder'
    """
    config, architecture = read_architecture(folder)
    head = default_head(folder, architecture, outputs) if head is None else head
    return config, architecture, _made(folder, architecture, head, outputs, dtype, remat)


def read_architecture(folder: pathlib.Path) -> tuple[dict[str, Any], _architectures.Architecture]:
    """The config of a folder, and the architecture that it describes.

    Raises:
      ValueError: there is no config, or it describes no model, or its architecture is not supported.

    >>> read_architecture(pathlib.Path("no/such/folder"))
    Traceback (most recent call last):
      ...
    ValueError: path must be a folder with a config.json, got 'no/such/folder'
    """
    config = read_config(folder)
    names = _architectures.ARCHITECTURES
    if not isinstance(config.get("model_type"), str) or config["model_type"] not in names:
        raise ValueError(
            f"model_type of {str(folder / 'config.json')!r} must be one of {', '.join(sorted(names))}, got "
            f"{config.get('model_type')!r} ({', '.join(map(str, config.get('architectures') or ['no architectures']))})"
        )
    try:
        return config, names[config["model_type"]](config)
    except (AttributeError, TypeError, ZeroDivisionError) as error:  # of what JSON can hold instead of a size or a dict
        raise ValueError(f"{str(folder / 'config.json')!r} describes no {config['model_type']} ({error})") from error


def _made(
    folder: pathlib.Path, architecture: _architectures.Architecture, head: str, outputs: int | None, dtype: Any,
    remat: Remat,
) -> Model:  # fmt: skip
    if outputs is not None:
        _validate.positive_int("outputs", outputs)
    _validate.one_of("head", head, tuple(architecture.heads))
    if head == "tokens" and outputs is not None and "features" in architecture.heads:
        raise ValueError(f"outputs must be None for the logits of tokens of a decoder, got {outputs}")
    model = architecture.model(head, outputs, dtype, remat)
    preprocessor = read_preprocessor(folder) if architecture.kind == "image" else None
    return model if preprocessor is None else _normalised(model, preprocessor)


def default_head(folder: pathlib.Path, architecture: _architectures.Architecture, outputs: int | None = None) -> str:
    """The architecture's own head, or that of the pooling in a folder of sentence-transformers.

    `outputs` of a decoder are of the features of a text.

    Raises:
      ValueError: the pooling is none of the architecture's heads, or another module stands on top.
    """
    path = folder / "modules.json"
    for module in _read_json(path, list) if path.is_file() else ():
        kind = str(module.get("type") if isinstance(module, dict) else module).rsplit(".", 1)[-1]
        if kind not in _MODULES:
            raise ValueError(
                f"head must be given, one of {', '.join(architecture.heads)}: {str(path)!r} asks for {kind} on top, "
                "which is not computed"
            )
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return (
            "features" if outputs is not None and "features" in architecture.heads else next(iter(architecture.heads))
        )
    modes = [name.removeprefix("pooling_mode_") for name, chosen in _read_json(path).items() if chosen is True]
    head = _POOLING.get(modes[0]) if len(modes) == 1 else None
    if head is None or head not in architecture.heads:
        raise ValueError(
            f"head must be given, one of {', '.join(architecture.heads)}: {str(path)!r} asks for "
            f"{', '.join(modes) or 'none'}"
        )
    return head


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """The config.json of a folder.

    Raises:
      ValueError: it is not there, or no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"path must be a folder with a config.json, got {str(folder)!r}")
    return _read_json(path)


def read_preprocessor(folder: pathlib.Path) -> dict[str, Any] | None:
    """The preprocessor_config.json of a folder, None where it has none.

    Raises:
      ValueError: it is no JSON object.
    """
    path = folder / _PREPROCESSOR
    return _read_json(path) if path.is_file() else None


def _normalised(model: Model, config: dict[str, Any]) -> Model:
    """A model of images as a preprocessor_config.json wants them."""
    mean, std = (np.asarray(config.get(name, default), np.float32) for name, default in _MEANS.items())
    if not (mean.ndim == std.ndim == 1 and (std > 0).all()):
        raise ValueError(f"{_PREPROCESSOR} must hold means and positive deviations of channels, got {mean} and {std}")

    def apply(params: Params, images: Any, **needed: Any) -> Any:
        return model.apply(params, (as_floats(images) - mean) / std, **needed)

    return Model(model.init, apply, model.needs)


def _read_json(path: pathlib.Path, kind: type = dict) -> Any:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON ({error})") from error
    if not isinstance(config, kind):
        what = "object" if kind is dict else "list"
        raise ValueError(f"{str(path)!r} must hold a JSON {what}, got a {type(config).__name__}")
    return config


def _read(
    architecture: _architectures.Architecture, model: Model, tensors: Tensors, key: jax.Array, *, own_head: bool
) -> tuple[Params, Report]:
    """Parameters of `model`; its head is that of the folder where it has its `own_head`, and else made anew."""
    example = _architectures.example(architecture.image)
    wanted = jax.eval_shape(model.init, key, example)
    prefix = _prefix(architecture, tensors)
    used: list[str] = []
    missing: list[str] = []

    def read(path: str, leaf: Any) -> Any:
        if path not in architecture.names or (path == _architectures.HEAD and not own_head):
            missing.append(path)
            return None
        name = architecture.names[path]
        name = name if name in tensors else prefix + name
        blocks = leaf.shape[0] if "{}" in name else None
        shape = leaf.shape if blocks is None else leaf.shape[1:]
        layout = architecture.layout(path)
        parts = [name.format(block) for block in range(blocks or 1)]
        for part in parts:
            _check(part, tensors, path, layout.stored(shape))
        used.extend(parts)
        # block after block into the leaf: what is held twice is one tensor
        whole = np.empty((len(parts), *shape), leaf.dtype)
        for row, part in zip(whole, parts, strict=True):
            row[...] = layout.read(tensors.read(part, leaf.dtype))
        return whole[0] if blocks is None else whole

    params = _tree.map_with_path(read, wanted)
    if missing:
        # under jit, what is made and not returned is never made
        made = jax.jit(lambda key: _tree.split(model.init(key, example), missing.__contains__)[0])(key)
        params = _tree.fill(params, made)
    expected = {*used}
    unexpected = [name for name in tensors if name not in expected and not name.endswith(_BUFFERS)]
    return params, Report(tuple(used), tuple(missing), tuple(sorted(unexpected)))


def _prefix(architecture: _architectures.Architecture, tensors: Tensors) -> str:
    """What stands in front of the names in this folder; the base of a model with a head has one."""
    first = next(iter(architecture.names.values()))
    return next((prefix for prefix in architecture.prefixes if prefix + first in tensors), architecture.prefixes[0])


def _check(name: str, tensors: Tensors, path: str, shape: Sequence[int]) -> None:
    if name not in tensors:
        raise ValueError(f"the weights must hold the tensor {name!r}, for {path} of shape {tuple(shape)}, and do not")
    if tensors.shape(name) != tuple(shape):
        raise ValueError(
            f"tensor {name!r} must have shape {tuple(shape)}, which config.json says, got {tensors.shape(name)}"
        )
