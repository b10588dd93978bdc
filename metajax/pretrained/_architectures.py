"""The architectures that weights can be loaded for: what a config means, and what tensors are called.

A new one is a function from a config to an `Architecture`, and a row in `ARCHITECTURES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from metajax import models
from metajax.core._types import Model

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a config describes.

    Attributes:
      model: `(head, outputs, dtype, remat) -> Model`.
      heads: the heads that `model` knows; the first is the one of the pretrained model.
      names: names of tensors by the path of the leaf that they become; `{}` is the number of a block, whose tensors are
        stacked. The kernel of a linear layer is stored transposed.
      prefixes: what may stand in front of all names.
      kind: "text" or "image", of the inputs.
      positions: the most tokens of a text.
    """

    model: Callable[..., Model]
    heads: tuple[str, ...]
    names: dict[str, str]
    prefixes: tuple[str, ...]
    kind: str
    positions: int | None = None


def bert(config: Config) -> Architecture:
    """BERT, MiniLM, E5; XLM-R, RoBERTa and multilingual MiniLM, whose positions begin behind that of padding."""
    family = config["model_type"]
    _require(config, "hidden_act", ("gelu",))
    _require(config, "position_embedding_type", ("absolute", None))
    first = 0 if family == "bert" else _number(config, "pad_token_id", 1) + 1
    sizes: dict[str, Any] = {
        "width": _number(config, "hidden_size"), "depth": _number(config, "num_hidden_layers"),
        "heads": _number(config, "num_attention_heads"), "hidden": _number(config, "intermediate_size"),
        "positions": _number(config, "max_position_embeddings"), "types": _number(config, "type_vocab_size", 2),
    }  # fmt: skip

    def model(head: str, outputs: int | None, dtype: Any, remat: bool) -> Model:
        return models.encoder(
            _number(config, "vocab_size"), outputs, head=head, dtype=dtype, remat=remat, first_position=first,  # type: ignore[arg-type]
            norm_epsilon=config.get("layer_norm_eps", 1e-12), **sizes,
        )  # fmt: skip

    layer, attention = "encoder.layer.{}", "encoder.layer.{}.attention"
    names = {
        "embed/embedding": "embeddings.word_embeddings.weight",
        "position/embedding": "embeddings.position_embeddings.weight",
        "type/embedding": "embeddings.token_type_embeddings.weight",
        **_norm("embed_norm", "embeddings.LayerNorm"),
        **{
            path: name
            for part, place in {
                "query": f"{attention}.self.query", "key": f"{attention}.self.key", "value": f"{attention}.self.value",
                "out": f"{attention}.output.dense", "up": f"{layer}.intermediate.dense",
                "down": f"{layer}.output.dense",
            }.items()
            for path, name in _linear(f"blocks/{part}", place).items()
        },
        **_norm("blocks/attention_norm", f"{attention}.output.LayerNorm"),
        **_norm("blocks/mlp_norm", f"{layer}.output.LayerNorm"),
    }  # fmt: skip
    positions = sizes["positions"] - first
    return Architecture(model, ("mean", "cls", "tokens", "span"), names, ("", "bert.", "roberta."), "text", positions)


def _linear(path: str, name: str, *, bias: bool = True) -> dict[str, str]:
    return {f"{path}/kernel": f"{name}.weight"} | ({f"{path}/bias": f"{name}.bias"} if bias else {})


def _norm(path: str, name: str, *, bias: bool = True) -> dict[str, str]:
    return {f"{path}/scale": f"{name}.weight"} | ({f"{path}/bias": f"{name}.bias"} if bias else {})


def _number(config: Config, name: str, default: int | None = None) -> int:
    value = config.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"config.json must hold an integer {name}, got {value!r}")
    return value


def _require(config: Config, name: str, accepted: tuple[Any, ...]) -> None:
    """Refuses a config that asks for what the model here does not compute."""
    value = config.get(name, accepted[0])
    if value not in accepted:
        raise ValueError(f"{name} of config.json must be {' or '.join(map(repr, accepted))}, got {value!r}")


ARCHITECTURES: dict[str, Callable[[Config], Architecture]] = {"bert": bert, "roberta": bert, "xlm-roberta": bert}
