"""MAML on characters of scripts that were never trained on.

python -m experiments.train --config=experiments/configs/maml_glyphs.py
"""

from typing import Any


def get_config() -> dict[str, Any]:
    """5-way 1-shot; `--config.hypergrad.name=first_order` is FOMAML, `--config.learner.adapts=head` is ANIL."""
    return {
        "learner": {"name": "maml", "inner": {"name": "sgd", "learning_rate": 0.4}},
        "train_episode": {"queries": 5},
        "optimizer": {"adam": {"learning_rate": {"init_value": 2e-3}}},
        "training": {"steps": 3000},
        "evaluation": {"num_steps": 3},
    }
