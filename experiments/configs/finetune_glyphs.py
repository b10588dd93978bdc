"""The transfer-learning baseline: all base classes at once, then a head for each task (Chen et al. 2019).

python -m experiments.train --config=experiments/configs/finetune_glyphs.py
"""

from ml_collections import ConfigDict

from experiments.configs._base import base


def get_config() -> ConfigDict:
    """Baseline; `--config.learner.head=cosine` is Baseline++. outer.meta_batch counts examples."""
    config = base()
    config.learner.name = "finetune"
    config.inner.update(rate=0.1, steps=100)
    config.outer.update(steps=3000, meta_batch=128)
    return config
