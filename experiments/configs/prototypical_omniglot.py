"""Prototypical networks on Omniglot, Vinyals split, trained 60-way; one run for 5-way and 20-way (Snell et al. 2017).

python -m experiments.train --config=experiments/configs/prototypical_omniglot.py --config.data.path=PATH --workdir=RUN
python -m experiments.evaluate --workdir=RUN --ways=20

accuracy 98.64 +- 0.20 % at 5 ways, 94.57 +- 0.24 % at 20 on 600 test episodes.
"""

from ml_collections import ConfigDict

from experiments.configs._base import base


def get_config() -> ConfigDict:
    """5-way 1-shot evaluation of a 60-way training."""
    config = base()
    config.data.update(name="omniglot", mirrored=True)
    config.augment.update(rotation=12.0, scale=0.15, shear=0.2, shift=0.07)
    config.train_episode.update(ways=60, shots=1, queries=5)
    config.outer.update(rate=2e-3, steps=28000, meta_batch=1)
    config.log.every = 100
    config.validation.update(every=1000, episodes=200)
    config.checkpoint.every = 1000
    return config
