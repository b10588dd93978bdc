"""The supported architectures: the meaning of their configs and the names of their tensors.

A new architecture needs a function from a config to an `Architecture`, and a row in `ARCHITECTURES`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from metajax import models
from metajax.core import _tree, _validate
from metajax.core._types import Model

Config = Mapping[str, Any]
HEAD = "head/kernel"  # the head of the pretrained model; a head with other outputs is newly initialised


class Layout(NamedTuple):
    """How a leaf is stored. `stored` maps the leaf's shape to the file's; `read` maps the file's tensor to a leaf."""

    stored: Callable[[tuple[int, ...]], tuple[int, ...]]
    read: Callable[[np.ndarray], np.ndarray]


ENCODER = {"mean": "features", "cls": "features", "tokens": "each token", "span": "span"}
DECODER = {"tokens": "tokens", "features": "features"}
VISION = {"cls": "features", "mean": "features"}
PLAIN = Layout(lambda shape: shape, lambda tensor: tensor)
TRANSPOSED = Layout(lambda shape: shape[::-1], lambda tensor: tensor.T)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The architecture that a config describes.

    Attributes:
      model: `(head, outputs, dtype, remat) -> Model`.
      heads: the heads that `model` knows and the output of each: "features" `[n, d]`, logits of "tokens", a "span", or
        features of "each token". The first is the head of the pretrained model.
      names: tensor names by the path of their leaf. `{}` is the index of a block; tensors of all blocks are stacked.
      prefixes: possible prefixes of the names.
      kind: kind of the inputs, "text" or "image".
      positions: maximum number of tokens of a text.
      image: height, width and channels of an image.
      layouts: layouts by path, for leaves that are neither stored unchanged nor, for kernels, transposed.
    """

    model: Callable[..., Model]
    heads: Mapping[str, str]
    names: dict[str, str]
    prefixes: tuple[str, ...]
    kind: str
    positions: int | None = None
    image: tuple[int, int, int] | None = None
    layouts: dict[str, Layout] = dataclasses.field(default_factory=dict)

    def layout(self, path: str) -> Layout:
        """Returns how the leaf at a path is stored."""
        return self.layouts.get(path) or (TRANSPOSED if path.endswith("kernel") else PLAIN)


def example(image: tuple[int, int, int] | None) -> np.ndarray:
    """Returns one example input, which determines parameter shapes: an image, or a text of one token for None.

    >>> example(None).shape, example((28, 28, 1)).shape
    ((1, 1), (1, 28, 28, 1))
    """
    return np.zeros([1, 1], np.int32) if image is None else np.zeros([1, *image], np.uint8)


def bert(config: Config) -> Architecture:
    """BERT, MiniLM, E5; XLM-R, RoBERTa and multilingual MiniLM, whose positions start after that of padding."""
    family = config["model_type"]
    _require(config, "hidden_act", ("gelu",))
    _require(config, "position_embedding_type", ("absolute", None))
    sizes: dict[str, Any] = {
        "width": _number(config, "hidden_size"), "depth": _number(config, "num_hidden_layers"),
        "heads": _number(config, "num_attention_heads"), "hidden": _number(config, "intermediate_size"),
        "types": _number(config, "type_vocab_size", 2), "norm_epsilon": config.get("layer_norm_eps", 1e-12),
        "first_position": 0 if family == "bert" else _number(config, "pad_token_id", 1, minimum=0) + 1,
    }  # fmt: skip
    layer, attention = "encoder.layer.{}", "encoder.layer.{}.attention"
    places = {part: f"{attention}.self.{part}" for part in ("query", "key", "value")}
    places |= {"out": f"{attention}.output.dense", "up": f"{layer}.intermediate.dense"}
    places |= {"down": f"{layer}.output.dense"}
    names = {
        "type/embedding": "embeddings.token_type_embeddings.weight",
        **_norm("blocks/attention_norm", f"{attention}.output.LayerNorm"),
        **_norm("blocks/mlp_norm", f"{layer}.output.LayerNorm"),
    }
    return _encoder(config, sizes, places, names, ("", "bert.", "roberta."))


def distilbert(config: Config) -> Architecture:
    """DistilBERT, which has no token types."""
    _require(config, "activation", ("gelu",))
    sizes: dict[str, Any] = {
        "width": _number(config, "dim"), "depth": _number(config, "n_layers"), "heads": _number(config, "n_heads"),
        "hidden": _number(config, "hidden_dim"), "types": 0,
    }  # fmt: skip
    layer = "transformer.layer.{}"
    places = {part: f"{layer}.attention.{part[0]}_lin" for part in ("query", "key", "value")}
    places |= {"out": f"{layer}.attention.out_lin", "up": f"{layer}.ffn.lin1", "down": f"{layer}.ffn.lin2"}
    names = {
        **_norm("blocks/attention_norm", f"{layer}.sa_layer_norm"),
        **_norm("blocks/mlp_norm", f"{layer}.output_layer_norm"),
    }
    return _encoder(config, sizes, places, names, ("", "distilbert."))


def _encoder(
    config: Config, sizes: dict[str, Any], places: dict[str, str], names: dict[str, str], prefixes: tuple[str, ...]
) -> Architecture:
    """Builds any encoder. `sizes` are options of `models.encoder`, `places` the linear layers of a block."""
    vocab, rows = _number(config, "vocab_size"), _number(config, "max_position_embeddings")

    def model(head: Any, outputs: int | None, dtype: Any, remat: Any) -> Model:
        return models.encoder(vocab, outputs, head=head, positions=rows, dtype=dtype, remat=remat, **sizes)

    names = {
        "embed/embedding": "embeddings.word_embeddings.weight",
        "position/embedding": "embeddings.position_embeddings.weight",
        **_norm("embed_norm", "embeddings.LayerNorm"),
        **names,
    }
    for part, place in places.items():
        names |= _linear(f"blocks/{part}", place)
    positions = rows - sizes.get("first_position", 0)
    return Architecture(model, ENCODER, names, prefixes, "text", positions)


def llama(config: Config) -> Architecture:
    """Llama, Mistral; Qwen2, whose queries, keys and values have biases; Qwen3, whose queries and keys have norms."""
    family = config["model_type"]
    bias, qk_norm = family == "qwen2", family == "qwen3"
    _require(config, "hidden_act", ("silu",))
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        _require(config, name, (False,))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    width, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    _require(config, "tie_word_embeddings", (False, True))
    tied = config.get("tie_word_embeddings", False)
    sizes: dict[str, Any] = {
        "width": width, "depth": _number(config, "num_hidden_layers"), "heads": heads,
        "kv_heads": _number(config, "num_key_value_heads", heads), "hidden": _number(config, "intermediate_size"),
        "head_size": config.get("head_dim") or width // heads,
        "theta": rope.get("rope_theta", config.get("rope_theta", 1e4)), "rope_scaling": rope,
    }  # fmt: skip
    positions = _number(config, "max_position_embeddings")
    if family == "mistral" and config.get("sliding_window") is not None:
        # a token sees a window of earlier tokens: all of them in a text within the window; longer texts are refused
        positions = sizes["positions"] = min(positions, _number(config, "sliding_window"))

    def model(head: Any, outputs: int | None, dtype: Any, remat: Any) -> Model:
        return models.decoder(
            _number(config, "vocab_size"), dtype=dtype, remat=remat, norm_epsilon=config.get("rms_norm_eps", 1e-6),
            qkv_bias=bias, qk_norm=qk_norm, tied=tied and outputs is None, outputs=head if outputs is None else outputs,
            **sizes,
        )  # fmt: skip

    layer = "layers.{}"
    places = {part: f"{layer}.self_attn.{part[0]}_proj" for part in ("query", "key", "value", "out")}
    places |= {part: f"{layer}.mlp.{part}_proj" for part in ("gate", "up", "down")}
    names = {"embed/embedding": "embed_tokens.weight", **_norm("norm", "norm", bias=False)}
    for part, place in places.items():
        names |= _linear(f"blocks/{part}", place, bias=bias and part in ("query", "key", "value"))
    names |= _norm("blocks/attention_norm", f"{layer}.input_layernorm", bias=False)
    names |= _norm("blocks/mlp_norm", f"{layer}.post_attention_layernorm", bias=False)
    for part in ("query", "key") if qk_norm else ():
        names |= _norm(f"blocks/{part}_norm", f"{layer}.self_attn.{part[0]}_norm", bias=False)
    names[HEAD] = "lm_head.weight"
    return Architecture(model, DECODER, names, ("model.", ""), "text", positions)


def vit(config: Config) -> Architecture:
    """The Vision Transformer."""
    _require(config, "hidden_act", ("gelu",))
    _require(config, "qkv_bias", (True,))
    width, patch = _number(config, "hidden_size"), _number(config, "patch_size", 16)
    channels, size = _number(config, "num_channels", 3), _number(config, "image_size", 224)
    sizes: dict[str, Any] = {
        "patch": patch, "width": width, "depth": _number(config, "num_hidden_layers"),
        "heads": _number(config, "num_attention_heads"), "hidden": _number(config, "intermediate_size"),
    }  # fmt: skip

    def model(head: Any, outputs: int | None, dtype: Any, remat: Any) -> Model:
        epsilon = config.get("layer_norm_eps", 1e-12)
        return models.vit(outputs, pooling=head, dtype=dtype, remat=remat, norm_epsilon=epsilon, **sizes)

    layer, attention = "encoder.layer.{}", "encoder.layer.{}.attention.attention"
    places = {part: f"{attention}.{part}" for part in ("query", "key", "value")}
    places |= {"out": f"{layer}.attention.output.dense", "up": f"{layer}.intermediate.dense"}
    places |= {"down": f"{layer}.output.dense"}
    names = {
        "class_token": "embeddings.cls_token", "position": "embeddings.position_embeddings",
        **_linear("embed", "embeddings.patch_embeddings.projection"), **_norm("norm", "layernorm"),
        **_norm("blocks/attention_norm", f"{layer}.layernorm_before"),
        **_norm("blocks/mlp_norm", f"{layer}.layernorm_after"),
    }  # fmt: skip
    for part, place in places.items():
        names |= _linear(f"blocks/{part}", place)
    layouts = {
        "class_token": Layout(lambda shape: (1, 1, *shape), lambda tensor: tensor[0, 0]),
        "position": Layout(lambda shape: (1, *shape), lambda tensor: tensor[0]),
        "embed/kernel": Layout(
            lambda shape: (shape[1], channels, patch, patch),
            lambda tensor: tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0]),
        ),
    }
    image = (size, size, channels)
    return Architecture(model, VISION, names, ("", "vit."), "image", image=image, layouts=layouts)


# Factories of `metajax.models` that a config of model_type "metajax" may name, and the kind of their inputs.
FACTORIES: dict[str, tuple[Callable[..., Model], str]] = {
    "conv4": (models.conv4, "image"), "decoder": (models.decoder, "text"), "encoder": (models.encoder, "text"),
    "resnet12": (models.resnet12, "image"), "vit": (models.vit, "image"),
}  # fmt: skip
# The option that selects the outputs of a model, those of its values that share parameters, and the output of each.
_HEADS = {"encoder": ("head", ("mean", "cls", "tokens"), ENCODER), "vit": ("pooling", ("cls", "mean"), VISION)}
_GIVEN = ("outputs", "dtype", "remat")  # options that the loading call sets


def own(config: Config) -> Architecture:
    """A model saved by `save_pretrained_model`: a factory of `metajax.models` whose leaves are stored unchanged."""
    name, options = config.get("factory"), config.get("options", {})
    _validate.one_of("factory of config.json", name, sorted(FACTORIES))
    factory, kind = FACTORIES[str(name)]
    known = inspect.signature(factory).parameters
    accepted = [option for option in known if option not in _GIVEN]
    if not isinstance(options, dict) or not set(options) <= set(accepted):
        raise ValueError(f"options must be among {', '.join(accepted)} for {name}, got {options!r}")
    for option in accepted:
        if known[option].default is inspect.Parameter.empty and option not in options:
            raise ValueError(f"options must hold {option} for {name}, got {options!r}")
    if name == "decoder":
        keyword, order = "outputs", ["features"] if config.get("head") == "features" else [*DECODER]
        kinds = DECODER
    else:
        keyword, shared, kinds = _HEADS.get(str(name), ("", ("features",), {"features": "features"}))
        saved = options.get(keyword, known[keyword].default) if keyword else "features"
        order = [saved, *(head for head in shared if head != saved and saved in shared)]
    heads = {head: kinds[head] for head in order}

    def model(head: Any, outputs: int | None, dtype: Any, remat: Any) -> Model:
        given = {"dtype": dtype, "remat": remat, keyword: head}
        given |= {} if outputs is None else {"outputs": outputs}
        return factory(**{**options, **{key: given[key] for key in given if key in known}})

    image = positions = None
    if kind == "image":
        height, width, channels = (_number(config.get("input", {}), part) for part in ("height", "width", "channels"))
        image = (height, width, channels)
    elif name == "decoder":
        positions = _number(config, "max_length")
    else:
        positions = options.get("positions", known["positions"].default) - options.get("first_position", 0)
    made = jax.eval_shape(model(order[0], None, np.float32, False).init, jax.random.key(0), example(image))
    names = {path: path for path in _tree.paths(made)}
    return Architecture(model, heads, names, ("",), kind, positions, image, dict.fromkeys(names, PLAIN))


def _linear(path: str, name: str, *, bias: bool = True) -> dict[str, str]:
    return {f"{path}/kernel": f"{name}.weight"} | ({f"{path}/bias": f"{name}.bias"} if bias else {})


def _norm(path: str, name: str, *, bias: bool = True) -> dict[str, str]:
    return {f"{path}/scale": f"{name}.weight"} | ({f"{path}/bias": f"{name}.bias"} if bias else {})


def _number(config: Config, name: str, default: int | None = None, *, minimum: int = 1) -> int:
    value = default if config.get(name) is None else config[name]
    return _validate.int_at_least(f"{name} of config.json", value, minimum)


def _require(config: Config, name: str, accepted: tuple[Any, ...]) -> None:
    """Refuses a config that asks for an option that this implementation does not compute."""
    value = config.get(name, accepted[0])
    if value not in accepted:
        raise ValueError(f"{name} of config.json must be {' or '.join(map(repr, accepted))}, got {value!r}")


ARCHITECTURES: dict[str, Callable[[Config], Architecture]] = {
    "bert": bert, "distilbert": distilbert, "llama": llama, "metajax": own, "mistral": llama,
    "qwen2": llama, "qwen3": llama, "roberta": bert, "vit": vit, "xlm-roberta": bert,
}  # fmt: skip
