"""MAML on a small Conv4 against what PyTorch's autograd found (`record_torch_maml.py`), in float64."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

import metajax
from metajax import hypergrad, learners, models

RECORD = json.loads(pathlib.Path(__file__).with_name("torch_maml.json").read_text(encoding="utf-8"))


def nested(flat):
    tree = {}
    for path, values in flat.items():
        *parents, name = path.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = jnp.array(values)
    return tree


def part(name):
    images, labels = RECORD[name]
    return metajax.Examples(jnp.array(images), jnp.array(labels, jnp.int32), jnp.ones(len(labels), bool))


BOTH = [(case, form) for case in RECORD["cases"] for form in ("patches", "lax")]


# the default run: every case, whose convolutions take one form, and one case in the other
@pytest.mark.parametrize(
    ("case", "form"),
    worlds.few_by_default(BOTH, lambda case, form: form == "lax" or case == "pool, no normalisation, 2 steps"),
)
def test_hypergradient_is_that_of_pytorch(case, form, x64):
    known = RECORD["cases"][case]
    options = known["options"]
    model = models.conv4(
        RECORD["ways"], width=RECORD["width"], depth=RECORD["depth"], pool=options["pool"],
        normalisation="batch" if options["norm"] else "none", form=form,
    )  # fmt: skip
    adapts = None if options["adapts"] == "all" else options["adapts"]
    learner = learners.maml(model, optax.sgd(RECORD["rate"]), options["steps"], adapts=adapts)
    estimator = hypergrad.mixed_mode() if options["exact"] else hypergrad.first_order()
    fn = jax.jit(hypergrad.value_and_grad(learner, estimator))
    (loss, aux), grads = fn(nested(known["start"]), metajax.Episode(part("support"), part("query")))
    np.testing.assert_allclose(loss, known["loss"], rtol=1e-10)
    np.testing.assert_allclose(aux.metrics["inner_loss"], known["inner_losses"], rtol=1e-10)
    np.testing.assert_allclose(aux.outputs, known["logits"], rtol=1e-8, atol=1e-10)
    assert worlds.relative_distance(grads, nested(known["grads"])) < 1e-9
