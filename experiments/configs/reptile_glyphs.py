"""Reptile on characters of scripts that were never trained on (Nichol et al. 2018).

python -m experiments.train --config=experiments/configs/reptile_glyphs.py
"""

from ml_collections import ConfigDict

from experiments.configs._base import base


def get_config() -> ConfigDict:
    """Trained on 10 shots with minibatches of 10, evaluated on 1 shot with more inner steps."""
    config = base()
    config.learner.update(name="reptile", batch_size=10)
    config.hypergrad.name = "displacement"
    config.train_episode.update(ways=5, shots=10, queries=5)
    config.inner.update(optimizer="adam", rate=1e-3, steps=5, eval_steps=50)
    config.outer.update(optimizer="sgd", rate=1.0, schedule="linear", clip=0.0, steps=3000, meta_batch=4)
    return config
