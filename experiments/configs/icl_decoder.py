"""In-context learning: a decoder reads the support set as text, and names the class of a query. No weight changes.

Training is MetaICL over low-rank adapters; the pretrained decoder alone is the checkpoint that training begins with:

python -m experiments.train --config=experiments/configs/icl_decoder.py --config.model.path=DECODER \
    --config.data.files=clinc150/data_full.json.gz --config.data.domain=clinc150/domains.json --workdir=RUN
python -m experiments.evaluate --workdir=RUN --checkpoint=start
"""

from typing import Any

from experiments.configs.proto_lora_clinc import DOMAINS


def get_config() -> dict[str, Any]:
    """5-way 1-shot: a prompt of five demonstrations, whose classes are called by letters."""
    return {
        "data": {
            "name": "text", "split_by": "domain", "splits": DOMAINS, "domain": None, "max_length": 32,
            "length_buckets": (16, 24, 32),
        },
        "model": {"name": "pretrained_model", "head": "tokens"},
        "wrap": [{"name": "lora", "rank": 8, "where": "query|value"}],
        "learner": {
            "name": "in_context", "labels": ("A", "B", "C", "D", "E"), "separator": " =>", "end": "\n",
            "content_free": "N/A",
        },
        "episode": {"ways": 5, "shots": 1, "queries": 3},
        "optimizer": {
            "adam": {
                "learning_rate": {
                    "name": "linear_schedule", "init_value": 1e-3, "end_value": 0.0, "transition_steps": "@steps",
                },
            },
        },
        "training": {"steps": 120, "meta_batch": 2, "trainable": "lora"},
        "validation": {"every": 120, "episodes": 20},
        "checkpoint": {"every": 20},
    }  # fmt: skip
