"""MAML on sinusoids (Finn et al. 2017): regression from 10 points.

python -m experiments.train --config=experiments/configs/maml_sinusoids.py
"""

from typing import Any


def get_config() -> dict[str, Any]:
    """One inner step at rate 0.01, as in the paper."""
    return {
        "data": {"name": "sinusoids"},
        "model": {"name": "mlp", "hidden": (40, 40)},
        "learner": {"name": "maml", "inner": {"name": "sgd", "learning_rate": 0.01}},
        "episode": {"ways": 1, "shots": 10, "queries": 100},
        "train_episode": {"queries": 10},
        "optimizer": {"name": "adam", "learning_rate": 1e-3},
        "training": {"steps": 20000, "meta_batch": 25},
        "log": {"every": 200},
        "validation": {"every": 2000},
        "checkpoint": {"every": 5000},
    }
