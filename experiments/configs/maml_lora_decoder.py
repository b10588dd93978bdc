"""MAML over low-rank adapters of a decoder, on texts that repeat a secret word: a task is a word.

python -m experiments.train --config=experiments/configs/maml_lora_decoder.py

The same config at the size of a language model, planned and not trained:

python -m experiments.plan --config=experiments/configs/maml_lora_decoder.py:large --topology=v5p-512
"""

from typing import Any


def get_config(size: str = "small") -> dict[str, Any]:
    """Rank 16 beside queries and values, four inner steps: "small", or "large", 1.3 billion numbers in bfloat16."""
    if size not in ("small", "large"):
        raise ValueError(f"size must be 'small' or 'large', got {size!r}")
    config: dict[str, Any] = {
        "data": {"name": "cycles"},
        "model": {"name": "decoder", "vocab": 256, "width": 64, "depth": 2, "heads": 4},
        "wrap": [{"name": "lora", "rank": 16}],
        "learner": {
            "name": "maml", "adapts": "lora", "inner": {"name": "sgd", "learning_rate": 0.1}, "num_steps": 4,
        },
        "episode": {"ways": 1, "shots": 2, "queries": 2},
        "optimizer": {"adam": {"learning_rate": {"init_value": 3e-3}}},  # no weights are given: all are meta-trained
    }  # fmt: skip
    if size == "large":
        config["data"] |= {"vocab": 32000, "length": 2048}
        config["model"] |= {"vocab": 32000, "width": 2048, "depth": 24, "heads": 16, "dtype": "bfloat16"}
        config["mesh"] = {"task": 1, "fsdp": -1}
        config["training"] = {"meta_batch": 256, "task_batching": "vmap", "trainable": "lora"}
    return config
