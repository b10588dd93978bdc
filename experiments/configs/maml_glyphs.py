"""MAML on characters of scripts that were never trained on.

python -m experiments.train --config=experiments/configs/maml_glyphs.py
"""

from ml_collections import ConfigDict

from experiments.configs._base import base


def get_config() -> ConfigDict:
    """5-way 1-shot; `--config.hypergrad.name=first_order` is FOMAML, `--config.learner.adapts=head` is ANIL."""
    config = base()
    config.learner.name = "maml"
    config.train_episode.update(ways=5, shots=1, queries=5)
    config.inner.update(rate=0.4, steps=1, eval_steps=3)
    config.outer.update(rate=2e-3, steps=3000, meta_batch=4)
    return config
