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
    """30-way episodes in training, 15-way 1-shot of two other domains in evaluation."""
    config = base()
    config.data.update(name="text", divides="domain", length=24, buckets=(12, 16, 20, 24))
    config.data.names.update(DOMAINS)
    config.model.update(name="pretrained", remat=False)  # short texts: activations are small
    config.adapter.update(name="lora", rank=8, where="kernel")
    config.learner.update(name="prototypical", distance="cosine")
    config.train_episode.update(ways=30, queries=2)
    config.episode.update(ways=15, shots=1, queries=5)
    config.outer.update(rate=5e-4, steps=1000, meta_batch=1, trainable="lora")
    config.validation.update(every=250, episodes=50)
    config.checkpoint.every = 250
    return config
