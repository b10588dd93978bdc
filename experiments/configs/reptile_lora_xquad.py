"""Reptile over low-rank adapters of multilingual E5: answers to questions (XQuAD) about articles not trained on.

A task is a language and an article; 8 questions of it are the support set. The articles of test are seen in no
language, and two of its languages are not trained on:

python -m experiments.train --config=experiments/configs/reptile_lora_xquad.py --config.model.path=MULTILINGUAL_E5 \
    '--config.data.files=xquad/xquad.{}.json.gz'
"""

from typing import Any

LANGUAGES = {
    "train": ("ar", "de", "en", "es"),
    "val": ("en",),
    "test": ("en", "ru", "zh"),
}


def get_config() -> dict[str, Any]:
    """8 support questions and 8 query questions of one article; few episodes, as each takes 20 s on 2 cores."""
    return {
        "data": {
            "name": "question_answering", "languages": LANGUAGES, "max_length": 256, "length_buckets": (128, 192, 256),
            "overlap": 64,
        },
        "min_examples": 17,
        "model": {"name": "pretrained_model", "remat": False},
        "wrap": [{"name": "lora", "rank": 8, "where": "blocks/.*kernel"}],
        "learner": {
            "name": "reptile", "adapts": "lora|head", "inner": {"name": "adam", "rate": 1e-3, "b1": 0.0},
            "num_steps": 6, "batch_size": 4,
        },
        "deployed": {"inner": {"rate": 3e-4}},
        "hypergrad": {"name": "displacement"},
        "episode": {"ways": 1, "shots": 8, "queries": 8, "hierarchical": True},
        "train_episode": {"shots": 16, "queries": 1},
        "optimizer": {
            "name": "sgd",
            "learning_rate": {
                "name": "linear_schedule", "init_value": 1.0, "end_value": 0.0, "transition_steps": "@steps",
            },
        },
        "training": {"steps": 140, "meta_batch": 1, "trainable": "lora|head"},
        "validation": {"every": 140, "episodes": 2},
        "evaluation": {"episodes": 40, "num_steps": 1},
        "checkpoint": {"every": 35},
    }  # fmt: skip
