"""Prototypical networks on CIFAR-FS, from scratch or from a run of `moco_cifar_fs.py`.

python -m experiments.train --config=experiments/configs/prototypical_cifar_fs.py --config.data.path=PATH \
    --config.init=RUN
"""

from ml_collections import ConfigDict

from experiments.configs._base import base


def get_config() -> ConfigDict:
    """5-way 1-shot, trained 10-way; inductive."""
    config = base()
    config.data.name = "cifar_fs"
    config.model.normalisation = "group"
    config.train_episode.update(ways=10, shots=1, queries=10)
    config.outer.update(rate=1e-3, steps=2000, meta_batch=4)
    config.validation.update(every=250, episodes=200)
    return config
