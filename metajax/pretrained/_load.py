"""Loads pretrained models in the layout of Hugging Face: config.json, safetensors, tokenizer.json."""

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
from metajax.data.readers import load_tokenizer
from metajax.models import Remat, as_floats
from metajax.pretrained import _architectures
from metajax.pretrained.tensors import Tensors
from metajax.tasks import ALL

_PREPROCESSOR = "preprocessor_config.json"
_MEANS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
# For sentence-transformers: pooling modes and the matching heads, and modules that do not change the head.
_MODULES = ("Transformer", "Pooling", "Normalize")
_POOLING = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "features"}
_BUFFERS = ("position_ids", "rotary_emb.inv_freq")  # stored in some files, but always computed here


@dataclasses.dataclass(frozen=True)
class Report:
    """Reports how the tensors of a folder were used.

    Attributes:
      used: names of the tensors that became leaves.
      missing: paths of the leaves without a tensor, which were newly initialised: those of a new head.
      unexpected: names of the tensors that no leaf needs, such as an unused head.

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
      model: a pure `Model`; learners, adapters and estimators take it like any other.
      params: its parameters, arrays on the host until a computation uses them.
      config: the contents of config.json.
      kind: kind of the inputs, "text" or "image".
      tokenizer: a tokenizer of the tokenizers library, or None if the folder has none.
      max_length: maximum number of tokens of a text, None for images.
      image: height, width and channels of an image, None for texts.
      report: how the tensors of the folder were used.
      options: other values needed to open the model again: `head`, `outputs`, `dtype`, `remat`, and the contents of
        preprocessor_config.json.
      tasks: the task types that the output of the model serves; its head determines them.

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
    distilbert, roberta, xlm-roberta, llama (including the rotary positions of Llama 3.1), mistral, qwen2, qwen3, vit,
    and metajax, which `save_pretrained_model` writes. Images are normalised with the means of preprocessor_config.json
    if the file exists.

    Args:
      path: the folder.
      head: the kind of output. The default is the architecture's own head, or the one that 1_Pooling/config.json names
        in a folder of sentence-transformers. Encoders: "mean" (of the tokens of a text), "cls", "tokens" or "span", as
        in `models.encoder`. Decoders: logits of "tokens", or "features" of a text. Vision Transformers: "cls" or
        "mean". For models of `save_pretrained_model`, the default is the head in their options.
      outputs: outputs of a new linear layer on top, such as the ways of a task; None returns the features unchanged.
      dtype: type of the parameters, a floating-point type; bfloat16 halves the memory of a frozen base (float16 too,
        but CPUs do not compute attention in it).
      remat: whether the backward pass recomputes blocks instead of keeping their activations; "example" does so for one
        example at a time, which takes even less memory.
      key: PRNG key of a new head; None means key 0.

    Returns:
      A `PretrainedModel`. Its `report` says which tensors were used, newly initialised and not used.

    Raises:
      ValueError: the folder has no config or no weights, or only pickled ones; its architecture is not supported; a
        tensor is missing, or has another shape or no floating-point type; a file is truncated or outside the folder;
        the tokenizer has more tokens than the embedding table; an argument is out of range.
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
    """Returns the task types that a head serves.

    A head that returns one vector for an example counts as "features"; with a single output on top it scores texts.

    >>> bert = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> bert |= {"intermediate_size": 8, "vocab_size": 9, "max_position_embeddings": 4, "hidden_act": "gelu"}
    >>> [task.name for task in tasks_of(_architectures.bert(bert), "mean", 1)]
    ['multiple choice']
    """
    kind = architecture.heads[head]
    if kind == "features" and outputs == 1 and architecture.kind == "text":
        kind = "score"
    return tuple(task for task in ALL if kind in task.heads)


def read_tokenizer(
    folder: pathlib.Path, architecture: _architectures.Architecture, params: Params, *, user: str
) -> Any:
    """Loads the tokenizer of a folder and checks that it fits the model.

    Raises:
      ValueError: as `load_tokenizer`, or it has more tokens than the embedding table has rows.
      ImportError: the tokenizers library is not installed.

    >>> read_tokenizer.__name__
    'read_tokenizer'
    """
    assert architecture.positions is not None
    tokenizer = load_tokenizer(folder, architecture.positions, user=user)
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
    """Returns `(config, architecture, model)` as the config of a folder describes them, without reading weights.

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
    """Returns the config of a folder, and the architecture that it describes.

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
    except (AttributeError, TypeError, ZeroDivisionError) as error:  # if JSON holds another value than a size or dict
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
    """Returns the architecture's own head, or the one of the pooling in a folder of sentence-transformers.

    With `outputs`, a decoder uses the features of a text.

    Raises:
      ValueError: the pooling is not a head of the architecture, or there is another module on top.
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
    """Reads the config.json of a folder.

    Raises:
      ValueError: the file is missing, or is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"path must be a folder with a config.json, got {str(folder)!r}")
    return _read_json(path)


def read_preprocessor(folder: pathlib.Path) -> dict[str, Any] | None:
    """Reads the preprocessor_config.json of a folder; None if there is no such file.

    Raises:
      ValueError: the file is not a JSON object.

    >>> read_preprocessor(pathlib.Path("no/such/folder"))
    """
    path = folder / _PREPROCESSOR
    return _read_json(path) if path.is_file() else None


def _normalised(model: Model, config: dict[str, Any]) -> Model:
    """Returns an image model that normalises its inputs as a preprocessor_config.json says."""
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
    """Reads the parameters of `model`. The head comes from the folder if `own_head`; otherwise it is a new one."""
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
        # copied block by block into the leaf, so that only one tensor is held twice
        whole = np.empty((len(parts), *shape), leaf.dtype)
        for row, part in zip(whole, parts, strict=True):
            row[...] = layout.read(tensors.read(part, leaf.dtype))
        return whole[0] if blocks is None else whole

    params = _tree.map_with_path(read, wanted)
    if missing:
        # under jit, values that are not returned are never computed
        made = jax.jit(lambda key: _tree.split(model.init(key, example), missing.__contains__)[0])(key)
        params = _tree.fill(params, made)
    expected = {*used}
    unexpected = [name for name in tensors if name not in expected and not name.endswith(_BUFFERS)]
    return params, Report(tuple(used), tuple(missing), tuple(sorted(unexpected)))


def _prefix(architecture: _architectures.Architecture, tensors: Tensors) -> str:
    """Returns the prefix of the names in this folder; the base of a model with a head has one."""
    first = next(iter(architecture.names.values()))
    return next((prefix for prefix in architecture.prefixes if prefix + first in tensors), architecture.prefixes[0])


def _check(name: str, tensors: Tensors, path: str, shape: Sequence[int]) -> None:
    if name not in tensors:
        raise ValueError(f"the weights must hold the tensor {name!r}, for {path} of shape {tuple(shape)}, and do not")
    if tensors.shape(name) != tuple(shape):
        raise ValueError(
            f"tensor {name!r} must have shape {tuple(shape)}, which config.json says, got {tensors.shape(name)}"
        )
