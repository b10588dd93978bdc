"""Prototypical networks over low-rank adapters of MiniLM: intents (CLINC150) of domains that training does not see.

python -m experiments.train --config=experiments/configs/proto_lora_clinc.py --config.model.path=MINILM \
    --config.data.path=clinc150/data_full.json.gz --config.data.domain=clinc150/domains.json
"""

from ml_collections import ConfigDict

from experiments.configs._base import base

DOMAINS = {
    "train": ("auto_and_commute", "banking", "home", "kitchen_and_dining", "meta"),
    "val": ("small_talk",),
    "test": ("utility", "work"),
}


def get_config() -> ConfigDict:
    """30-way 1-shot episodes of training, 30-way 1-shot on two domains in evaluation."""
    config = base()
    config.data.update(name="text", divides="domain", length=32)
    config.data.names.update(DOMAINS)
    config.model.name = "pretrained"
    config.adapter.update(name="lora", rank=8, where="(query|value|up|down|out|key)/kernel")
    config.learner.update(name="prototypical", distance="cosine")
    config.episode.update(ways=15, shots=1, queries=5)
    config.outer.update(rate=1e-3, steps=600, meta_batch=2, trainable="lora")
    config.validation.update(every=100, episodes=100)
    config.checkpoint.every = 100
    return config
