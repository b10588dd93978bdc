"""Reptile on characters of scripts that were never trained on (Nichol et al. 2018).

python -m experiments.train --config=experiments/configs/reptile_glyphs.py
"""

from typing import Any


def get_config() -> dict[str, Any]:
    """Trained on 10 shots with minibatches of 10, evaluated on 1 shot with more inner steps."""
    return {
        "learner": {
            "name": "reptile", "inner": {"name": "adam", "rate": 1e-3, "b1": 0.0}, "num_steps": 5, "batch_size": 10,
        },
        "hypergrad": {"name": "displacement"},
        "train_episode": {"shots": 10, "queries": 5},
        "optimizer": {
            "name": "sgd",
            "learning_rate": {
                "name": "linear_schedule", "init_value": 1.0, "end_value": 0.0, "transition_steps": "@steps",
            },
        },
        "training": {"steps": 3000},
        "evaluation": {"num_steps": 50},
    }  # fmt: skip
