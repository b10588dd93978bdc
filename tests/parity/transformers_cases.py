"""Folders of small random models in the layout of Hugging Face, and inputs; what both sides of the comparison read.

Names and shapes of tensors are spelled out here, from the documentation of `transformers` and not from metajax.
"""

import json
import pathlib

import numpy as np
import safetensors.numpy

_TEXT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
_BERT = {**_TEXT, "max_position_embeddings": 12, "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
_LLAMA = {
    **_TEXT, "max_position_embeddings": 32, "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5,
}  # fmt: skip
CONFIGS = {
    "bert": {"model_type": "bert", "architectures": ["BertModel"], "pad_token_id": 0, **_BERT},
    "xlm-roberta": {
        "model_type": "xlm-roberta", "architectures": ["XLMRobertaModel"], "pad_token_id": 1, "bos_token_id": 0,
        "eos_token_id": 2, **_BERT, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
    },
    "llama": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 500.0, "tie_word_embeddings": False,
        **_LLAMA,
    },
    "qwen2": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1000.0, "tie_word_embeddings": True,
        **_LLAMA,
    },
    "vit": {
        "model_type": "vit", "architectures": ["ViTModel"], "image_size": 12, "patch_size": 4, "num_channels": 3,
        "hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": True,
        **{name: value for name, value in _TEXT.items() if name != "vocab_size"},
    },
    # the four pairs of coordinates of a head turn 5.1, 1.9, 0.7 and 0.3 times in 32 positions: one frequency is kept,
    # two are divided in part, and one is divided
    "llama3": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 50.0, "tie_word_embeddings": False,
        "head_dim": 8,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0.5, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        **_LLAMA,
    },
    "linear": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 50.0, "tie_word_embeddings": False,
        "rope_scaling": {"type": "linear", "factor": 4.0}, **_LLAMA,
    },
    "mistral": {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "rope_theta": 500.0, "head_dim": None,
        "sliding_window": 16, "tie_word_embeddings": False, **_LLAMA,
    },
    "qwen3": {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "rope_theta": 1000.0, "head_dim": 6,
        "tie_word_embeddings": True, **_LLAMA,
    },
    "distilbert": {
        "model_type": "distilbert", "architectures": ["DistilBertModel"], "pad_token_id": 0, "vocab_size": 50,
        "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 12, "activation": "gelu",
    },
}  # fmt: skip


def tensors(family: str) -> dict[str, np.ndarray]:
    """Random tensors by name; a seed for each family."""
    config = CONFIGS[family]
    width, hidden = 16, 24
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, outputs: int, inputs: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        shapes.update({f"{name}.bias": (outputs,)} if bias else {})

    def norm(name: str, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (width,)
        shapes.update({f"{name}.bias": (width,)} if bias else {})

    if family in ("bert", "xlm-roberta"):
        for table, rows in (("word", 50), ("position", 12), ("token_type", config["type_vocab_size"])):
            shapes[f"embeddings.{table}_embeddings.weight"] = (rows, width)
        norm("embeddings.LayerNorm")
        for layer in ("encoder.layer.0", "encoder.layer.1"):
            for part in ("query", "key", "value"):
                linear(f"{layer}.attention.self.{part}", width, width)
            linear(f"{layer}.attention.output.dense", width, width)
            norm(f"{layer}.attention.output.LayerNorm")
            linear(f"{layer}.intermediate.dense", hidden, width)
            linear(f"{layer}.output.dense", width, hidden)
            norm(f"{layer}.output.LayerNorm")
    elif family == "distilbert":
        for table, rows in (("word", 50), ("position", 12)):
            shapes[f"embeddings.{table}_embeddings.weight"] = (rows, width)
        norm("embeddings.LayerNorm")
        for layer in ("transformer.layer.0", "transformer.layer.1"):
            for part in ("q_lin", "k_lin", "v_lin", "out_lin"):
                linear(f"{layer}.attention.{part}", width, width)
            norm(f"{layer}.sa_layer_norm")
            linear(f"{layer}.ffn.lin1", hidden, width)
            linear(f"{layer}.ffn.lin2", width, hidden)
            norm(f"{layer}.output_layer_norm")
    elif family == "vit":
        shapes["embeddings.cls_token"] = (1, 1, width)
        shapes["embeddings.position_embeddings"] = (1, 10, width)
        shapes["embeddings.patch_embeddings.projection.weight"] = (width, 3, 4, 4)
        shapes["embeddings.patch_embeddings.projection.bias"] = (width,)
        for layer in ("encoder.layer.0", "encoder.layer.1"):
            for part in ("query", "key", "value"):
                linear(f"{layer}.attention.attention.{part}", width, width)
            linear(f"{layer}.attention.output.dense", width, width)
            linear(f"{layer}.intermediate.dense", hidden, width)
            linear(f"{layer}.output.dense", width, hidden)
            norm(f"{layer}.layernorm_before")
            norm(f"{layer}.layernorm_after")
        norm("layernorm")
    else:
        bias, heads = family == "qwen2", 4 * (config.get("head_dim") or 4)
        shapes["model.embed_tokens.weight"] = (50, width)
        for layer in ("model.layers.0", "model.layers.1"):
            linear(f"{layer}.self_attn.q_proj", heads, width, bias)
            linear(f"{layer}.self_attn.k_proj", heads // 2, width, bias)
            linear(f"{layer}.self_attn.v_proj", heads // 2, width, bias)
            linear(f"{layer}.self_attn.o_proj", width, heads, False)
            if family == "qwen3":
                shapes |= dict.fromkeys((f"{layer}.self_attn.q_norm.weight", f"{layer}.self_attn.k_norm.weight"), (6,))
            linear(f"{layer}.mlp.gate_proj", hidden, width, False)
            linear(f"{layer}.mlp.up_proj", hidden, width, False)
            linear(f"{layer}.mlp.down_proj", width, hidden, False)
            norm(f"{layer}.input_layernorm", False)
            norm(f"{layer}.post_attention_layernorm", False)
        norm("model.norm", False)
        if not config["tie_word_embeddings"]:
            shapes["lm_head.weight"] = (50, width)
    rng = np.random.default_rng(list(CONFIGS).index(family))
    return {name: rng.normal(size=shape).astype(np.float32) * 0.4 for name, shape in shapes.items()}


def write(folder: pathlib.Path, family: str) -> pathlib.Path:
    """Writes the folder of a family."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[family]))
    safetensors.numpy.save_file(tensors(family), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def inputs(family: str) -> dict[str, np.ndarray]:
    """Two texts, one of them with padding behind; or two images."""
    rng = np.random.default_rng(100)
    if family == "vit":
        return {"images": rng.random((2, 12, 12, 3), np.float32)}
    tokens = rng.integers(3, 50, (2, 9)).astype(np.int32)
    mask = np.arange(9) < np.array([9, 6])[:, None]
    return {"tokens": np.where(mask, tokens, CONFIGS[family].get("pad_token_id", 0)), "mask": mask}
