"""Conv4 against NumPy, in all forms and under all normalisations; padding, 8-bit images, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from parity import numpy_reference as reference

from metajax.models import conv4

POLICIES = ["batch", "support", "layer", "group", "none"]


def generic(model, images, seed=0):
    """Parameters with no zero bias and no unit scale."""
    rng = np.random.default_rng(seed)
    params = model.init(jax.random.key(seed), images)
    return jax.tree.map(lambda leaf: leaf + jnp.array(0.3 * rng.normal(size=leaf.shape)), params)


def call(model, params, images, mask=None, **rest):
    needed = {"mask": mask} if "mask" in model.needs else {}
    outputs = jax.jit(model.apply)(
        params, images, **needed, **({"stats": None, **rest} if "stats" in model.needs else {})
    )
    return outputs if "stats" in model.needs else (outputs, None)


@pytest.mark.parametrize("outputs", [None, 3])
@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_is_the_numpy_network(policy, pool, outputs, x64):
    images = np.random.default_rng(1).normal(size=(4, 9, 8, 2))
    model = conv4(outputs, width=8, depth=2, pool=pool, normalisation=policy)
    params = generic(model, jnp.array(images))
    found, stats = call(model, params, jnp.array(images))
    expected, expected_stats = reference.conv4(jax.tree.map(np.asarray, params), images, policy=policy, pool=pool)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    if policy == "support":
        np.testing.assert_allclose(np.array(stats), np.array(expected_stats), rtol=1e-10, atol=1e-12)
        others = np.random.default_rng(2).normal(size=(3, 9, 8, 2))
        found, used = call(model, params, jnp.array(others), stats=stats)
        expected, _ = reference.conv4(
            jax.tree.map(np.asarray, params), others, policy=policy, pool=pool, stats=expected_stats
        )
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
        np.testing.assert_array_equal(np.array(used), np.array(stats))


# with pooling it is slow: tests/models/conv_ops_test.py compares the forms too
@pytest.mark.parametrize("pool", worlds.few_by_default([True, False], lambda pool: not pool))
def test_forms_agree(pool, x64):
    images = jnp.array(np.random.default_rng(1).normal(size=(4, 12, 12, 1)))
    models = [conv4(3, width=4, depth=3, pool=pool, form=form) for form in ("lax", "patches")]
    params = generic(models[0], images)

    def loss(model):
        return lambda params: jnp.sum(jnp.sin(model.apply(params, images, mask=None)))

    values, slopes = zip(*(jax.jit(jax.value_and_grad(loss(model)))(params) for model in models), strict=True)
    np.testing.assert_allclose(*values, rtol=1e-12)
    assert worlds.relative_distance(*slopes) < 1e-10


@pytest.mark.parametrize("policy", POLICIES)
def test_who_sees_whom(policy, x64):
    """Only batch statistics make one image's prediction depend on another image: that is what transductive means."""
    images = jnp.array(np.random.default_rng(1).normal(size=(4, 8, 8, 1)))
    model = conv4(3, width=8, depth=1, normalisation=policy)
    params = generic(model, images)
    stats = call(model, params, images)[1]
    other = images.at[3].add(1.0)
    moved = call(model, params, other, stats=stats)[0][0] - call(model, params, images, stats=stats)[0][0]
    assert (float(jnp.max(jnp.abs(moved))) > 1e-6) == (policy == "batch")


@pytest.mark.parametrize("policy", ["batch", "support"])
def test_padding_has_no_part_in_statistics(policy, x64):
    images = jnp.array(np.random.default_rng(1).normal(size=(5, 8, 8, 1)))
    model = conv4(3, width=4, depth=2, normalisation=policy)
    params = generic(model, images)
    whole, stats = call(model, params, images[:3])
    padded, padded_stats = call(model, params, images.at[3:].set(1e6), jnp.arange(5) < 3)
    np.testing.assert_allclose(padded[:3], whole, rtol=1e-10, atol=1e-12)
    for a, b in zip(*map(jax.tree.leaves, (stats, padded_stats)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("policy", POLICIES)
def test_one_image_and_no_image(policy):
    images = jnp.ones([2, 8, 8, 1])
    model = conv4(3, width=8, depth=2, normalisation=policy)
    params = model.init(jax.random.key(0), images)
    for mask in ([True, False], [False, False]):
        assert np.all(np.isfinite(call(model, params, images, jnp.array(mask))[0]))


def test_images_of_eight_bits_are_scaled():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1)).astype(np.uint8)
    model = conv4(3, width=4, depth=1)
    params = model.init(jax.random.key(0), pixels)
    scaled = model.apply(params, jnp.asarray(pixels, jnp.float32) / 255, mask=None)
    np.testing.assert_allclose(model.apply(params, pixels, mask=None), scaled, rtol=1e-6)


def test_the_published_sizes():
    model = conv4(5)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros([1, 28, 28, 1])))
    # 3*3*64*(1 + 3*64) weights, 4*128 of normalisation and no bias before it, a head of 64*5 + 5
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 576 * 193 + 512 + 325
    strided = jax.eval_shape(lambda: conv4(pool=False).init(jax.random.key(0), jnp.zeros([1, 28, 28, 1])))
    assert "head" not in strided
    features = jax.eval_shape(lambda p: conv4(pool=False).apply(p, jnp.zeros([1, 28, 28, 1]), mask=None), strided)
    assert features.shape == (1, 2 * 2 * 64)
    photos = jnp.zeros([2, 84, 84, 3])
    outputs = jax.eval_shape(lambda: model.apply(model.init(jax.random.key(0), photos), photos, mask=None))
    assert outputs.shape == (2, 5)


def test_types_follow_the_parameters():
    model = conv4(3, width=4, depth=1, normalisation="layer")
    images = jnp.ones([2, 8, 8, 1], jnp.bfloat16)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.init(jax.random.key(0), images))
    assert model.apply(params, images).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"outputs": 0}, "outputs must be an integer of at least 1, got 0"),
        ({"width": 0}, "width must be an integer of at least 1, got 0"),
        ({"depth": 0}, "depth must be an integer of at least 1, got 0"),
        ({"normalisation": "spectral"}, "normalisation must be one of 'batch', .* got 'spectral'"),
        ({"form": "fft"}, "form must be one of 'auto', 'lax', 'patches', 'trilinear', got 'fft'"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        conv4(**arguments)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (conv4(), (2, 15, 28, 1), r"at least 16 pixels high and wide under max pooling, got \(15, 28, 1\)"),
        (conv4(), (2, 28), r"inputs must be images \[n, height, width, channels\], got examples of shape \(28,\)"),
        (conv4(width=12, normalisation="group"), (2, 28, 28, 1), "width must be a multiple of 8 .* got 12"),
    ],
)
def test_refusals_when_the_images_are_seen(model, shape, message):
    with pytest.raises(ValueError, match=message):
        model.init(jax.random.key(0), jnp.ones(shape))
