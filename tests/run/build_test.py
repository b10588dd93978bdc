"""From a config to the models and learners that it names."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax import hypergrad, run

IMAGES = jnp.zeros([1, 28, 28, 1])
FACTS = run.Facts(metajax.tasks.classification, 5, 7, (28, 28, 1))
MLP = {"model": {"name": "mlp", "hidden": (4,)}}
SGD = {"name": "sgd", "learning_rate": 0.4}


def build(given, facts=FACTS):
    return run.build(run.complete(given), facts)


def shapes(given):
    """The shapes of the parameters of the learner that a config describes."""
    return jax.tree.map(jnp.shape, jax.eval_shape(build(given).learner.init, jax.random.key(0), IMAGES))


def support():
    return metajax.Examples(jax.random.normal(jax.random.key(0), [5, 3]), jnp.arange(5), jnp.ones(5, bool))


def test_resnet12_has_the_published_widths_at_the_default_size():
    params = shapes({"model": {"name": "resnet12"}})
    assert [params[f"block_{i}"]["conv_2"]["kernel"][-1] for i in range(4)] == [64, 160, 320, 640]


def test_a_vit_and_its_adapter():
    vit = {"name": "vit", "width": 16, "depth": 2, "heads": 4, "patch": 7}
    params = shapes({"model": vit, "wrap": [{"name": "lora", "rank": 3}]})
    assert params["position"] == (17, 16)
    assert "head" not in params
    assert params["blocks"]["query"]["lora_a"] == (2, 16, 3)
    assert shapes({"model": vit, "learner": {"name": "maml", "inner": SGD}})["head"]["kernel"] == (16, 5)


@pytest.mark.parametrize("name", ["maml", "reptile", "bayesian"])
def test_another_rate_where_the_learner_is_deployed(name):
    given = {**MLP, "learner": {"name": name, "inner": SGD}}
    experiment = build({**given, "deployed": {"inner": {"learning_rate": 0.1}}})
    params = experiment.trained.init(jax.random.key(1), support().inputs)
    far, near = (
        learner.predict(learner.adapt(params, support()), support().inputs)
        for learner in (experiment.trained, experiment.learner)
    )
    assert not np.allclose(far, near)
    assert build(given).trained is build(given).trained or build(given).learner.problem is not None
    with pytest.raises(ValueError, match=r"deployed.inner has no field 'rate'"):
        build({**given, "deployed": {"inner": {"rate": 0.1}}})


def test_the_pair_of_pretraining_and_fine_tuning():
    experiment = build(
        {"sampler": "batches", "learner": {"name": "pretrain"}, "deployed": {"name": "finetune", "inner": SGD}}
    )
    params = jax.eval_shape(experiment.trained.init, jax.random.key(0), IMAGES)
    assert params["head"]["bias"].shape == (7,), "the classes of the training source"
    assert experiment.batches
    assert experiment.learner is not experiment.trained


def test_every_part_gets_its_arguments():
    experiment = build(
        {
            **MLP,
            "learner": {"name": "meta_sgd", "num_steps": 3, "per": "array", "each_step": True},
            "hypergrad": {"name": "truncated", "k": 2},
            "optimizer": [
                {"name": "clip", "max_delta": 0.5},
                {
                    "name": "adamw",
                    "learning_rate": {"name": "linear_schedule", "init_value": 1.0, "end_value": 0.0,
                                      "transition_steps": "@steps"},
                },
            ],
            "training": {"steps": 10},
        }
    )  # fmt: skip
    rates = jax.eval_shape(experiment.learner.init, jax.random.key(0), jnp.zeros([2, 3]))["rates"]
    assert rates["layer_0"]["kernel"].shape == (3,)
    params = {"w": jnp.ones(2)}
    known = optax.chain(optax.clip(0.5), optax.adamw(optax.linear_schedule(1.0, 0.0, 10)))
    for rule in (experiment.optimizer, known):
        state = rule.init(params)
        updates, state = rule.update({"w": jnp.array([3.0, -0.1])}, state, params)
        updates, _ = rule.update({"w": jnp.array([3.0, -0.1])}, state, params)
        last = updates["w"] if rule is experiment.optimizer else last  # noqa: F821
    np.testing.assert_allclose(updates["w"], last, rtol=1e-6)


def test_every_estimator_and_its_arguments_are_reached():
    required = {"evolution": {"sigma": 0.1, "pairs": 2}, "truncated": {"k": 1}, "persistent_truncation": {"k": 1},
                "persistent_evolution": {"sigma": 0.1, "pairs": 2, "steps": 1}}  # fmt: skip
    for name in ("displacement", "finite_difference", "first_order", "forward_mode", "implicit", "mixed_mode", "sama",
                 "unrolled", *required):  # fmt: skip
        section = {"name": name, **required.get(name, {})}
        assert isinstance(build({"hypergrad": section}).hypergrad, metajax.Hypergrad)
    with pytest.raises(ValueError, match=r"hypergrad\.k must be given for truncated"):
        build({"hypergrad": {"name": "truncated"}})


def test_an_inner_rule_that_can_be_differentiated_twice_comes_first():
    given = {**MLP, "learner": {"name": "maml", "inner": {"name": "adam", "rate": 1e-2}}}
    learner = build(given).learner
    gradient = hypergrad.value_and_grad(learner, hypergrad.unrolled())
    params = learner.init(jax.random.key(0), support().inputs)
    _, grads = gradient(params, metajax.Episode(support(), support()))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(("name", "policy"), [("conv4", "batch"), ("resnet12", "batch"), ("vit", "none")])
def test_the_normalisation_that_is_stated(name, policy):
    assert run.normalisation(run.complete({"model": {"name": name}})) == policy


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": {"name": "resnet"}}, "model.name must be one of conv4, decoder, .* got 'resnet'; did you mean"),
        ({"model": {"name": "resnet12", "widths": (0,)}}, "model.widths must be"),
        ({"model": {"name": "vit", "width": 16, "heads": 5}}, "model.heads must divide width, 16, got 5"),
        ({"model": {"name": "vit", "dtype": "int7"}}, "model.dtype must be the name of a dtype, got 'int7'"),
        ({"data": {"name": "sinusoids"}}, "data and learner must be of one task type, got regression of data"),
        ({"augment": {"name": "random_flip"}}, "augment must be None but for images, got a transform"),
        ({"learner": {"name": "maml", "inner": SGD, "num_steps": 0}}, "learner.num_steps must be an integer of at"),
        ({"learner": {"name": "reptile", "inner": SGD, "proximal": 1.0}}, "learner.proximal is no argument of reptile"),
        ({"learner": {"name": "prototypical", "adapts": "head"}}, "learner.adapts is no argument of prototypical"),
        ({"model": {"name": "mlp", "width": 9}}, "model.width is no argument of mlp, which takes hidden, outputs"),
        ({"training": {"steps": -1}}, "training.steps must be an integer of at least 1, got -1"),
        ({"training": {"stepz": 9}}, "training has no field 'stepz'; did you mean 'steps'?"),
        ({"learner": {"name": "prototypical", "distance": "far"}}, "learner.distance must be one of 'euclidean',"),
        ({"optimizer": {"name": "sgd", "learning_rate": "@steqs"}}, "learning_rate must be a value or one of"),
        ({"lerner": {"name": "maml"}}, "config has no section 'lerner'; did you mean 'learner'?"),
        ({"config_version": 0}, "config_version must be 1, the version of this metajax, got 0"),
    ],
)
def test_refusals(given, message):
    facts = FACTS if "augment" not in given and "data" not in given else run.Facts(metajax.tasks.regression, 1)
    facts = facts._replace(task=metajax.tasks.classification) if "augment" in given else facts
    with pytest.raises(ValueError, match=message):
        build(given, facts)
