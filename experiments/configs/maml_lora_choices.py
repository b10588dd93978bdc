"""First-order MAML over adapters of a language model: kinds of questions with choices that training does not see.

A task is a kind of question, a file of a folder or what its lines say (see `metajax.data.multiple_choice`); 8 questions
of it are the support set. A decoder scores choices by their likelihood, an encoder by a new layer of one output.
64, 16 and 20 % of the kinds are for training, validation and test, unless all three are named:

python -m experiments.train --config=experiments/configs/maml_lora_choices.py --config.model.path=MODEL \
    --config.data.files=FOLDER --workdir=RUN

A decoder whose head is no transpose of its embedding: --config.learner.adapts=lora --config.training.trainable=lora
"""

from typing import Any


def get_config() -> dict[str, Any]:
    """8 support questions and 4 query questions of one kind."""
    return {
        "data": {"name": "multiple_choice", "max_length": 128, "length_buckets": (16, 32, 64, 128)},
        "min_examples": 12,
        "model": {"name": "pretrained_model"},
        "wrap": [{"name": "lora", "rank": 8, "where": "(query|value)/kernel"}],
        "learner": {
            "name": "maml", "adapts": "lora|head", "inner": {"name": "adam", "rate": 2e-3, "b1": 0.0}, "num_steps": 3,
        },
        "hypergrad": {"name": "first_order"},
        "episode": {"ways": 1, "shots": 8, "queries": 4},
        "optimizer": {
            "adam": {
                "learning_rate": {
                    "name": "linear_schedule", "init_value": 1e-3, "end_value": 0.0, "transition_steps": "@steps",
                },
            },
        },
        "training": {"steps": 200, "trainable": "lora|head"},
        "validation": {"every": 100, "episodes": 20},
        "evaluation": {"episodes": 100, "num_steps": 10},
        "checkpoint": {"every": 50},
    }  # fmt: skip
