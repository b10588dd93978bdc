"""The default job: prototypical networks on characters of scripts that were never trained on.

python -m experiments.train

accuracy 97.34 +- 0.40 % on 600 test episodes.
"""

from typing import Any


def get_config() -> dict[str, Any]:
    """5-way 1-shot, trained 20-way."""
    return {
        "train_episode": {"ways": 20, "queries": 5},
        "optimizer": {"adam": {"learning_rate": {"init_value": 2e-3}}},
        "validation": {"every": 250},
        "checkpoint": {"every": 250},
    }
