"""MAML over low-rank adapters of a decoder, on texts that repeat a secret word: a task is a word.

python -m experiments.train --config=experiments/configs/maml_lora_decoder.py

The same config at the size of a language model, planned and not trained:

python -m experiments.plan --config=experiments/configs/maml_lora_decoder.py:large --topology=v5p-512
"""

from ml_collections import ConfigDict

from experiments.configs._base import base


def get_config(size: str = "small") -> ConfigDict:
    """Rank 16 beside queries and values, four inner steps: "small", or "large", 1.3 billion numbers in bfloat16."""
    config = base()
    config.data.name = "cycles"
    config.model.name = "decoder"
    config.adapter.update(name="lora", rank=16)
    config.learner.update(name="maml", adapts="lora")
    config.inner.update(optimizer="sgd", rate=0.1, steps=4)
    config.episode.update(ways=1, shots=2, queries=2)
    config.outer.update(rate=3e-3, steps=1000, meta_batch=4)  # no weights are given: all are meta-trained
    config.validation.update(every=500, episodes=100)
    config.model.update(width=64, depth=2, heads=4)
    if size == "large":
        config.data.update(vocab=32000, length=2048)
        config.model.update(width=2048, depth=24, heads=16, dtype="bfloat16")
        config.mesh.update(task=1, fsdp=-1)
        config.outer.update(meta_batch=256, task_batching="vmap", trainable="lora")
    elif size != "small":
        raise ValueError(f"size must be 'small' or 'large', got {size!r}")
    return config
