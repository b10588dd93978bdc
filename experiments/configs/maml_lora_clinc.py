"""First-order MAML over adapters of MiniLM and a head: intents (CLINC150) of domains that training does not see.

python -m experiments.train --config=experiments/configs/maml_lora_clinc.py --config.model.path=MINILM \
    --config.data.files=clinc150/data_full.json.gz --config.data.domain=clinc150/domains.json

Through the inner loop instead: --config.hypergrad.name=mixed_mode
"""

from typing import Any

from experiments.configs import proto_lora_clinc


def get_config() -> dict[str, Any]:
    """5-way 1-shot, five inner steps of the adapters and the head; MiniLM itself is the same for all tasks."""
    return {
        **proto_lora_clinc.get_config(),
        "wrap": [
            {"name": "hide_tokens", "share": 0.15}, {"name": "lora", "rank": 4, "where": "(query|value)/kernel"},
        ],
        "learner": {
            "name": "maml", "adapts": "lora|head", "inner": {"name": "sgd", "learning_rate": 0.1}, "num_steps": 5,
        },
        "hypergrad": {"name": "first_order"},
        "episode": {"ways": 5, "shots": 1, "queries": 5},
        "train_episode": {"ways": 5, "queries": 5},
        "optimizer": {
            "adam": {
                "learning_rate": {
                    "name": "linear_schedule", "init_value": 5e-4, "end_value": 0.0, "transition_steps": "@steps",
                },
            },
        },
        "training": {"steps": 1000, "meta_batch": 4, "trainable": "lora|head"},
    }  # fmt: skip
