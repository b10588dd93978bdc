"""ResNet-12 against NumPy under all normalisations; padding, sizes, learners, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds
from parity import numpy_reference as reference

import metajax
from metajax import learners
from metajax.models import resnet12

POLICIES = ["batch", "support", "layer", "group", "none"]


# tests/models/conv_ops_test.py compares the forms of a convolution; lax compiles in half of the time
def images(count, size=(5, 4, 2), seed=1):
    return jnp.array(np.random.default_rng(seed).normal(size=(count, *size)))


def generic(model, inputs):
    """Parameters with no zero bias and no unit scale."""
    rng = np.random.default_rng(0)
    params = jax.jit(model.init)(jax.random.key(0), inputs)
    return jax.tree.map(lambda leaf: leaf + jnp.array(0.2 * rng.normal(size=leaf.shape)), params)


def call(model, params, inputs, mask=None, **rest):
    needed = {"mask": mask} if "mask" in model.needs else {}
    needed |= {"stats": None, **rest} if "stats" in model.needs else {}
    outputs = jax.jit(model.apply)(params, inputs, **needed)
    return outputs if "stats" in model.needs else (outputs, None)


@pytest.mark.parametrize(
    ("policy", "outputs"),
    worlds.few_by_default(
        [*((policy, 3) for policy in POLICIES), ("layer", None)], lambda policy, outputs: policy == "support"
    ),
)
def test_is_the_numpy_network(policy, outputs, x64):
    model = resnet12(outputs, widths=(8, 16), normalisation=policy, form="lax")
    params = generic(model, images(3))
    plain = jax.tree.map(np.asarray, params)
    found, stats = call(model, params, images(3))
    expected, expected_stats = reference.resnet12(plain, np.asarray(images(3)), policy=policy)
    assert found.shape == (3, outputs or 16)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    if policy == "support":
        others = images(2, seed=2)
        found, used = call(model, params, others, stats=stats)
        expected, _ = reference.resnet12(plain, np.asarray(others), policy=policy, stats=expected_stats)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
        jax.tree.map(np.testing.assert_array_equal, used, stats)


@pytest.mark.parametrize("policy", worlds.few_by_default(POLICIES, lambda policy: policy == "batch"))
def test_padding_and_other_images(policy, x64):
    """Padding has no part in any statistics; only under batch statistics does an image depend on the others."""
    model = resnet12(3, widths=(8,), normalisation=policy, form="lax")
    inputs = images(5)
    params = generic(model, inputs)
    whole, stats = call(model, params, inputs[:3])
    padded, padded_stats = call(model, params, inputs.at[3:].set(1e6), jnp.arange(5) < 3)
    np.testing.assert_allclose(padded[:3], whole, rtol=1e-10, atol=1e-12)
    for a, b in zip(*map(jax.tree.leaves, (stats, padded_stats)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-14)
    moved, _ = call(model, params, inputs[:3].at[2].add(1.0), stats=stats)
    assert (np.abs(moved[0] - whole[0]).max() > 1e-6) == (policy == "batch")


def test_the_published_sizes():
    photos = jnp.zeros([2, 84, 84, 3])
    model = resnet12()
    params = jax.eval_shape(model.init, jax.random.key(0), photos)
    kernels = [leaf.size for path, leaf in jax.tree.leaves_with_path(params) if path[-1].key == "kernel"]
    # 9*i*o + 9*o*o + 9*o*o + i*o of each block from i to o channels
    pairs = [(3, 64), (64, 160), (160, 320), (320, 640)]
    assert sum(kernels) == sum(10 * i * o + 18 * o * o for i, o in pairs) == 12_414_848
    assert jax.eval_shape(lambda p: model.apply(p, photos, mask=None), params).shape == (2, 640)


def test_types_follow_the_parameters_and_8_bit_images_are_scaled():
    model = resnet12(3, widths=(4,), normalisation="layer")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1)).astype(np.uint8)
    params = jax.jit(model.init)(jax.random.key(0), pixels)
    apply = jax.jit(model.apply)
    scaled = jnp.asarray(pixels, jnp.float32) / 255
    np.testing.assert_allclose(apply(params, pixels), apply(params, scaled), rtol=1e-6)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert apply(narrow, scaled.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("kind", worlds.few_by_default(["maml", "prototypical"], lambda kind: kind != "maml"))
def test_a_learner_trains_every_leaf(kind):
    if kind == "maml":  # the exact hypergradient, through statistics of the support set
        model = resnet12(worlds.WAYS, widths=(4,), normalisation="support", form="lax")
        learner = learners.maml(model, optax.sgd(0.1), 1)
    else:
        learner = learners.prototypical(resnet12(widths=(4, 8), form="lax"))
    episode = worlds.episode(worlds.Row(learner, images=True), dtype=jnp.float32)
    outer = metajax.outer_update(learner, optax.sgd(0.1), hypergrad=metajax.hypergrad.mixed_mode(), before=False)
    state = jax.jit(outer.init)(jax.random.key(0), episode)
    after, metrics = jax.jit(outer.update)(state, worlds.stack([episode, episode]))
    assert np.isfinite(metrics["loss"])
    still = {path for path, moved in worlds.distances(after.params, state.params).items() if not moved > 1e-4}
    assert still == {"block_0/shortcut/kernel"}  # of one channel: normalisation undoes its scale


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"outputs": 0}, "outputs must be an integer of at least 1, got 0"),
        ({"widths": (4, 0)}, "widths must be an integer of at least 1, got 0"),
        ({"widths": ()}, r"widths must hold at least one width, got \(\)"),
        ({"normalisation": "spectral"}, "normalisation must be one of 'batch', .* got 'spectral'"),
        ({"form": "fft"}, "form must be one of 'auto', 'lax', 'patches', 'trilinear', got 'fft'"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        resnet12(**arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 15, 28, 1), r"inputs must be at least 16 pixels high and wide, got \(15, 28, 1\)"),
        ((2, 28), r"inputs must be images \[n, height, width, channels\], got examples of shape \(28,\)"),
    ],
)
def test_refusals_when_the_images_are_seen(shape, message):
    with pytest.raises(ValueError, match=message):
        resnet12().init(jax.random.key(0), jnp.ones(shape))
