"""Prototypical networks on Omniglot, Vinyals split, trained 60-way; one run for 5-way and 20-way (Snell et al. 2017).

python -m experiments.train --config=experiments/configs/prototypical_omniglot.py --config.data.path=PATH --workdir=RUN
python -m experiments.evaluate --workdir=RUN --ways=20

accuracy 98.64 +- 0.20 % at 5 ways, 94.57 +- 0.24 % at 20 on 600 test episodes.
"""

from typing import Any


def get_config() -> dict[str, Any]:
    """5-way 1-shot evaluation of a 60-way training."""
    return {
        "data": {"name": "omniglot", "mirrored": True},
        "val_data": {"mirrored": False},
        "test_data": {"mirrored": False},
        "augment": {"name": "random_affine", "rotation": 12.0, "scale": 0.15, "shear": 0.2, "shift": 0.07},
        "train_episode": {"ways": 60, "queries": 5},
        "optimizer": {"adam": {"learning_rate": {"init_value": 2e-3}}},
        "training": {"steps": 28000, "meta_batch": 1},
        "log": {"every": 100},
        "validation": {"every": 1000, "episodes": 200},
        "checkpoint": {"every": 1000},
    }
