"""Reptile over low-rank adapters of multilingual E5: answers to questions (XQuAD) about articles not trained on.

A task is a language and an article; 8 questions of it are the support set. The articles of test are seen in no
language, and two of its languages are not trained on:

python -m experiments.train --config=experiments/configs/reptile_lora_xquad.py --config.model.path=MULTILINGUAL_E5 \
    '--config.data.path=xquad/xquad.{}.json.gz'
"""

from ml_collections import ConfigDict

from experiments.configs._base import base

LANGUAGES = {
    "train": ("ar", "de", "en", "es"),
    "val": ("en",),
    "test": ("en", "ru", "zh"),
}


def get_config() -> ConfigDict:
    """8 support questions and 8 query questions of one article; few episodes, as each takes 20 s on 2 cores."""
    config = base()
    config.data.update(name="squad", length=256, buckets=(128, 192, 256), overlap=64, at_least=17)
    config.data.languages.update(LANGUAGES)
    config.model.update(name="pretrained", head="span", remat="none")
    config.adapter.update(name="lora", rank=8, where="blocks/.*kernel")
    config.learner.update(name="reptile", adapts="lora|head", batch_size=4)
    config.hypergrad.name = "displacement"
    config.episode.update(ways=1, shots=8, queries=8, hierarchical=True)
    config.train_episode.update(ways=1, shots=16, queries=1, hierarchical=True)
    config.inner.update(optimizer="adam", rate=1e-3, steps=6, eval_rate=3e-4, eval_steps=1)
    config.outer.update(optimizer="sgd", rate=1.0, schedule="linear", clip=0.0, steps=140, meta_batch=1)
    config.outer.trainable = "lora|head"
    config.validation.update(every=140, episodes=2)
    config.evaluation.episodes = 40
    config.checkpoint.every = 35
    return config
