"""Computation in bfloat16 over parameters in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

import metajax

MODEL = metajax.models.mlp(worlds.WAYS, hidden=(32,))
NARROW = metajax.models.mixed_precision(MODEL)


def gradients(model, estimator):
    learner = metajax.learners.maml(model, metajax.inner.adam(1e-2), 4)
    episode = metajax.Episode(*(worlds.examples(seed, 20, 0, dtype=np.float32) for seed in (0, 1)))
    params = learner.init(jax.random.key(0), episode.support.inputs)
    function = metajax.hypergrad.value_and_grad(learner, estimator)
    return function, jax.jit(function)(params, episode)[1], (params, episode)


@pytest.mark.parametrize("name", worlds.few_by_default(worlds.EXACT, lambda name: name == "mixed_mode"))
def test_masters_stay_wide_and_the_hypergradient_is_near(name):
    estimator = worlds.ESTIMATORS[name]
    function, found, arguments = gradients(NARROW, estimator)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))
    products = [line for line in str(jax.make_jaxpr(function)(*arguments)).split("\n") if "dot_general" in line]
    assert products
    assert all("bf16[" in line for line in products)
    expected = gradients(MODEL, estimator)[1]
    distance = optax.tree.norm(optax.tree.sub(found, expected)) / optax.tree.norm(expected)
    assert 1e-5 < distance < 0.05  # rounded to 8 bits, and not more than that


def test_images_of_eight_bits_are_computed_in_the_narrow_type():
    model = metajax.models.mixed_precision(metajax.models.conv4(5, width=8, normalisation="support"))
    images = np.full([2, 16, 16, 1], 200, np.uint8)
    params = model.init(jax.random.key(0), images)
    outputs, stats = jax.eval_shape(lambda p: model.apply(p, images, mask=None, stats=None), params)
    assert outputs.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {jnp.dtype(jnp.bfloat16)}


def test_refusals():
    with pytest.raises(ValueError, match="dtype must be a floating-point type, got <class"):
        metajax.models.mixed_precision(MODEL, jnp.int32)
    with pytest.raises(ValueError, match="model must be of type Model"):
        metajax.models.mixed_precision(lambda x: x)
