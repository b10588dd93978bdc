"""MAML on sinusoids (Finn et al. 2017): regression from 10 points.

python -m experiments.train --config=experiments/configs/maml_sinusoids.py
"""

from ml_collections import ConfigDict

from experiments.configs._base import base


def get_config() -> ConfigDict:
    """One inner step at rate 0.01, as in the paper."""
    config = base()
    config.data.name = "sinusoids"
    config.model.update(name="mlp", hidden=(40, 40))
    config.learner.name = "maml"
    config.episode.update(ways=1, shots=10, queries=100)
    config.train_episode.update(ways=1, shots=10, queries=10)
    config.inner.update(rate=0.01, steps=1)
    config.outer.update(rate=1e-3, schedule="constant", clip=0.0, steps=20000, meta_batch=25)
    config.log.every = 200
    config.validation.update(every=2000, episodes=100)
    config.checkpoint.every = 5000
    return config
