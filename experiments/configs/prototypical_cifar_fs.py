"""Prototypical networks on CIFAR-FS, from scratch or from a run of `moco_cifar_fs.py`.

python -m experiments.train --config=experiments/configs/prototypical_cifar_fs.py --config.data.path=PATH \
    --config.init=RUN
"""

from typing import Any


def get_config() -> dict[str, Any]:
    """5-way 1-shot, trained 10-way; inductive."""
    return {
        "data": {"name": "cifar_fs"},
        "model": {"normalisation": "group"},
        "train_episode": {"ways": 10, "queries": 10},
        "training": {"steps": 2000},
        "validation": {"every": 250, "episodes": 200},
    }
