"""Learned inner rates: against hand-worked steps, and what `rate`, `per` and `each_step` do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax import hypergrad, learners, models

MEAN = metajax.Model(lambda key, x: jnp.array([1.0, 2.0]), lambda w, x: x * w)
HALF = lambda outputs, targets: 0.5 * jnp.sum(jnp.square(outputs - targets), axis=-1)  # noqa: E731
TASK = metajax.Examples(jnp.ones([1, 2]), jnp.array([[0.0, 0.0]]), jnp.ones(1, bool))


def test_a_rate_for_each_weight():
    learner = learners.meta_sgd(MEAN, 0.5, 2, loss=HALF)
    params = learner.init(jax.random.key(0), TASK.inputs)
    np.testing.assert_allclose(learner.adapt(params, TASK).params, [0.25, 0.5])
    params["rates"] = jnp.array([1.0, -1.0])  # the gradient is the weight itself
    np.testing.assert_allclose(learner.adapt(params, TASK).params, [0.0, 8.0])


def test_rates_of_each_step_and_the_last_ones_for_later_steps():
    learner = learners.meta_sgd(MEAN, 0.5, 2, per="array", each_step=True, loss=HALF)
    params = learner.init(jax.random.key(0), TASK.inputs)
    assert params["rates"].shape == (2,)
    params["rates"] = jnp.array([0.5, 0.25])
    adapted = [learner.adapt(params, TASK, num_steps=steps).params for steps in (1, 2, 3)]
    np.testing.assert_allclose(adapted, [[0.5, 1.0], [0.375, 0.75], [0.28125, 0.5625]])


def test_rates_multiply_the_updates_of_another_rule():
    learner = learners.meta_sgd(MEAN, 0.5, 1, inner=optax.sign_sgd(1.0), loss=HALF)
    params = learner.init(jax.random.key(0), TASK.inputs)
    params["rates"] = jnp.array([0.5, 0.25])
    np.testing.assert_allclose(learner.adapt(params, TASK).params, [0.5, 1.75])


def test_only_what_adapts_has_rates_and_moves():
    learner = learners.meta_sgd(models.mlp(2), 0.1, adapts="head", per="array")
    params = learner.init(jax.random.key(0), jnp.eye(4))
    assert [leaf.shape for leaf in jax.tree.leaves(params["rates"])] == [(), ()]
    assert params["rates"]["layer_0"] == {"bias": None, "kernel": None}


def test_a_rate_learns_to_be_one_over_the_curvature():
    # the query asks for the support's solution, which one step of rate 1 reaches
    learner = learners.meta_sgd(MEAN, 0.1, loss=HALF)
    outer = metajax.outer_update(learner, optax.sgd(0.1), hypergrad=hypergrad.first_order(), trainable="rates")
    episode = metajax.Episode(TASK, TASK)
    state, update = outer.init(jax.random.key(0), episode), jax.jit(outer.update)
    for _ in range(200):
        state, _ = update(state, jax.tree.map(lambda leaf: leaf[None], episode))
    np.testing.assert_allclose(state.params["rates"], 1.0, atol=1e-4)
    np.testing.assert_array_equal(state.params["backbone"], [1.0, 2.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "rate must be a finite number above 0, got 0.0"),
        ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        ({"per": "layer"}, "per must be one of 'weight', 'array', got 'layer'"),
        ({"inner": 0.1}, "inner must be of type GradientTransformation, got 0.1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        learners.meta_sgd(MEAN, **options)


def test_what_adapts_must_be_there():
    learner = learners.meta_sgd(MEAN, adapts="lora")
    with pytest.raises(ValueError, match="adapts"):
        learner.init(jax.random.key(0), TASK.inputs)
