"""The transfer-learning baseline: all base classes at once, then a head for each task (Chen et al. 2019).

python -m experiments.train --config=experiments/configs/finetune_glyphs.py
"""

from typing import Any


def get_config() -> dict[str, Any]:
    """Baseline; `--config.learner.head=cosine` is Baseline++. training.meta_batch counts examples."""
    return {
        "sampler": "batches",
        "learner": {"name": "pretrain"},
        "deployed": {"name": "finetune", "inner": {"name": "sgd", "learning_rate": 0.1}},
        "training": {"steps": 3000, "meta_batch": 128},
    }
