"""Momentum contrast on the training images of CIFAR-FS, without labels; what follows begins with `--config.init=RUN`.

python -m experiments.train --config=experiments/configs/moco_cifar_fs.py --config.data.path=PATH --workdir=RUN
"""

from typing import Any


def get_config() -> dict[str, Any]:
    """Validated as the nearest class mean in its features, 5-way 1-shot."""
    return {
        "data": {"name": "cifar_fs"},
        "sampler": "batches",
        "model": {"normalisation": "group"},
        "learner": {"name": "contrastive", "momentum": 0.99, "queue": 2048},
        "hypergrad": {"name": "unrolled"},
        "optimizer": {"adam": {"learning_rate": {"init_value": 2e-3}}},
        "training": {"steps": 2000, "meta_batch": 256},
        "validation": {"episodes": 200},
    }
