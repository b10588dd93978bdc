"""From a config to the models that it names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metajax
from experiments.configs import prototypical_glyphs
from metajax import training

IMAGES = jnp.zeros([1, 28, 28, 1])


def build(changes):
    config = prototypical_glyphs.get_config()
    config.update_from_flattened_dict(changes)
    return config, training.build(config)


def shapes(changes):
    """The shapes of the parameters of the learner that a config describes."""
    _, experiment = build(changes)
    return jax.tree.map(jnp.shape, jax.eval_shape(experiment.learner.init, jax.random.key(0), IMAGES))


def test_resnet12_has_the_published_widths_at_the_default_size():
    params = shapes({"model.name": "resnet12"})
    assert [params[f"block_{i}"]["conv_2"]["kernel"][-1] for i in range(4)] == [64, 160, 320, 640]
    params = shapes({"model.name": "resnet12", "model.width": 8, "model.depth": 2})
    assert params["block_1"]["conv_0"]["kernel"] == (3, 3, 8, 20)
    assert "block_2" not in params


def test_a_vit_and_its_adapter():
    changes = {"model.name": "vit", "model.width": 16, "model.depth": 2, "model.heads": 4, "model.patch": 7}
    params = shapes({**changes, "adapter.name": "lora", "adapter.rank": 3})
    assert params["position"] == (17, 16)
    assert "head" not in params
    assert params["blocks"]["query"] == {
        "kernel": (2, 16, 16),
        "bias": (2, 16),
        "lora_a": (2, 16, 3),
        "lora_b": (2, 3, 16),
    }
    assert shapes({**changes, "learner.name": "maml"})["head"]["kernel"] == (16, 5)


def test_another_rate_where_the_learner_is_evaluated():
    changes = {"learner.name": "maml", "model.name": "mlp", "model.hidden": (4,), "inner.rate": 0.4}
    _, experiment = build({**changes, "inner.eval_rate": 0.1})
    support = metajax.Examples(jax.random.normal(jax.random.key(0), [5, 3]), jnp.arange(5), jnp.ones(5, bool))
    params = experiment.trained.init(jax.random.key(1), support.inputs)
    moved = [
        jax.tree.map(jnp.subtract, learner.adapt(params, support).params, params)
        for learner in (experiment.trained, experiment.learner)
    ]
    for long, short in zip(*map(jax.tree.leaves, moved), strict=True):
        np.testing.assert_allclose(long, 4 * short, rtol=1e-4, atol=1e-6)
    assert not experiment.batches
    _, experiment = build(changes)
    assert experiment.trained is experiment.learner
    for name in ("meta_sgd", "prototypical"):
        with pytest.raises(ValueError, match=rf"inner.eval_rate must be 0 but for maml, .* got 0.1 for {name}"):
            build({**changes, "learner.name": name, "inner.eval_rate": 0.1})
    with pytest.raises(ValueError, match=r"inner.eval_rate must be a finite number of at least 0, got -1.0"):
        build({**changes, "inner.eval_rate": -1.0})


@pytest.mark.parametrize("name", ["reptile", "bayesian", "finetune"])
def test_the_other_rate_is_that_of_each_learner_with_an_inner_loop(name):
    changes = {"learner.name": name, "model.name": "mlp", "model.hidden": (4,), "inner.rate": 0.4}
    support = metajax.Examples(jax.random.normal(jax.random.key(0), [5, 3]), jnp.arange(5), jnp.ones(5, bool))
    learners = [build({**changes, "inner.eval_rate": rate})[1].learner for rate in (0.0, 0.1)]
    params = learners[0].init(jax.random.key(1), support.inputs)
    far, near = (learner.predict(learner.adapt(params, support), support.inputs) for learner in learners)
    assert not np.allclose(far, near)


def test_learned_rates_of_a_config():
    changes = {"learner.name": "meta_sgd", "model.name": "mlp", "model.hidden": (4,), "inner.steps": 3}
    assert shapes({**changes, "learner.adapts": "head"})["rates"]["head"]["kernel"] == (4, 5)
    each = shapes({**changes, "learner.rates": "array", "learner.each_step": True})["rates"]
    assert each["layer_0"]["kernel"] == (3,)
    with pytest.raises(ValueError, match=r"learner.rates must be one of 'weight', 'array', got 'layer'"):
        build({**changes, "learner.rates": "layer"})
    with pytest.raises(
        ValueError, match=r"hypergrad.name must be one that trains the rates of meta_sgd, got 'implicit'"
    ):
        build({**changes, "hypergrad.name": "implicit"})


@pytest.mark.parametrize(
    ("name", "policy"), [("conv4", "batch"), ("resnet12", "batch"), ("vit", "none"), ("mlp", "none")]
)
def test_the_normalisation_that_is_stated(name, policy):
    config, _ = build({"model.name": name})
    assert training.normalisation(config) == policy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.name": "resnet"},
            "model.name must be one of 'conv4', 'resnet12', 'vit', 'mlp', 'decoder', 'pretrained', got 'resnet'",
        ),
        ({"model.name": "resnet12", "model.depth": 5}, "model.depth must be at most 4 for resnet12, got 5"),
        ({"model.name": "resnet12", "model.width": 0}, "model.width must be an integer of at least 1, got 0"),
        ({"model.name": "resnet12", "adapter.name": "lora"}, "adapter.name must be empty for resnet12"),
        ({"model.name": "vit", "model.heads": 5}, "heads must divide width, 64, got 5"),
        ({"model.name": "vit", "model.dtype": "int8"}, "model.dtype must be one of 'float32', 'bfloat16', got 'int8'"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        build(changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment.words": 0.1}, "augment.words must be 0 but for texts and a model that is not frozen, got 0.1"),
        (
            {"data.name": "sinusoids", "augment.shift": 0.1, "learner.name": "maml"},
            "augment must be all 0 but for images",
        ),
    ],
)
def test_augmentation_that_does_not_fit_the_data(changes, message):
    with pytest.raises(ValueError, match=message):
        build(changes)
