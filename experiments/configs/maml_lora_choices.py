"""First-order MAML over adapters of a language model: kinds of questions with choices that training does not see.

A task is a kind of question, a file of a folder or what its lines say (see `metajax.data.multiple_choice`); 8 questions
of it are the support set. A decoder scores choices by their likelihood, an encoder by a new layer of one output.
64, 16 and 20 % of the kinds are for training, validation and test, unless all three are named:

python -m experiments.train --config=experiments/configs/maml_lora_choices.py --config.model.path=MODEL \
    --config.data.path=FOLDER --workdir=RUN

A decoder whose head is no transpose of its embedding: --config.learner.adapts=lora --config.outer.trainable=lora
"""

from ml_collections import ConfigDict

from experiments.configs._base import base


def get_config() -> ConfigDict:
    """8 support questions and 4 query questions of one kind."""
    config = base()
    config.data.update(name="multiple_choice", length=128, buckets=(16, 32, 64, 128), at_least=12)
    config.model.name = "pretrained"
    config.adapter.update(name="lora", rank=8, where="(query|value)/kernel")
    config.learner.update(name="maml", adapts="lora|head")
    config.hypergrad.name = "first_order"
    config.episode.update(ways=1, shots=8, queries=4)
    config.inner.update(optimizer="adam", rate=2e-3, steps=3, eval_steps=10)
    config.outer.update(rate=1e-3, schedule="linear", steps=200, meta_batch=4, trainable="lora|head")
    config.validation.update(every=100, episodes=20)
    config.evaluation.episodes = 100
    config.checkpoint.every = 50
    return config
