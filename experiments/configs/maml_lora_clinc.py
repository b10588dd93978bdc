"""First-order MAML over adapters of MiniLM and a head: intents (CLINC150) of domains that training does not see.

python -m experiments.train --config=experiments/configs/maml_lora_clinc.py --config.model.path=MINILM \
    --config.data.path=clinc150/data_full.json.gz --config.data.domain=clinc150/domains.json

Through the inner loop instead: --config.hypergrad.name=mixed_mode
"""

from ml_collections import ConfigDict

from experiments.configs import proto_lora_clinc


def get_config() -> ConfigDict:
    """5-way 1-shot, five inner steps of the adapters and the head; MiniLM itself is the same for all tasks."""
    config = proto_lora_clinc.get_config()
    config.adapter.update(rank=4, where="(query|value)/kernel")
    config.learner.update(name="maml", adapts="lora|head")
    config.hypergrad.name = "first_order"
    config.inner.update(optimizer="sgd", rate=0.1, steps=5)
    config.train_episode.update(ways=5, queries=5)
    config.episode.update(ways=5, shots=1, queries=5)
    config.outer.update(rate=5e-4, steps=1000, meta_batch=4, trainable="lora|head")
    return config
