"""Momentum contrast on the training images of CIFAR-FS, without labels; what follows begins with `--config.init=RUN`.

python -m experiments.train --config=experiments/configs/moco_cifar_fs.py --config.data.path=PATH --workdir=RUN
"""

from ml_collections import ConfigDict

from experiments.configs._base import base


def get_config() -> ConfigDict:
    """Validated as the nearest class mean in its features, 5-way 1-shot."""
    config = base()
    config.data.name = "cifar_fs"
    config.model.normalisation = "group"
    config.learner.name = "moco"
    config.contrast.update(momentum=0.99, queue=2048, temperature=0.2)
    config.outer.update(rate=2e-3, steps=2000, meta_batch=256)
    config.validation.update(every=500, episodes=200)
    return config
