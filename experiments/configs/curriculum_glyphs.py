"""The default job from small images to large ones: half of the steps on a quarter of the pixels.

python -m experiments.train --config=experiments/configs/curriculum_glyphs.py
"""

from ml_collections import ConfigDict

from experiments.configs import prototypical_glyphs


def get_config() -> ConfigDict:
    """14 pixels until step 500, and then the 28 that validation and test have."""
    config = prototypical_glyphs.get_config()
    config.curriculum.update(until=(500,), size=(14,))
    return config
