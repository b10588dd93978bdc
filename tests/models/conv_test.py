"""Conv4 and its parts against NumPy and against XLA's own convolution and pooling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax import models
from metajax.models import _norm


def _images(n=3, size=9, channels=2, seed=0):
    return np.random.default_rng(seed).normal(size=(n, size, size, channels)).astype(np.float32)


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("stride", [1, 2])
def test_patches_are_the_convolution_to_the_second_derivative(size, stride):
    inputs = jnp.asarray(_images(size=size))
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 2, 4)), jnp.float32)

    def value(kernel, inputs, form):
        return jnp.sum(jnp.sin(models.convolution(inputs, kernel, stride=stride, form=form)))

    def second(form):
        gradient = jax.grad(value, argnums=(0, 1))
        return jax.jvp(lambda k, x: gradient(k, x, form), (kernel, inputs), (kernel, inputs))

    np.testing.assert_allclose(
        models.convolution(inputs, kernel, stride=stride, form="patches"),
        models.convolution(inputs, kernel, stride=stride, form="lax"),
        atol=1e-5,
    )
    for ours, theirs in zip(jax.tree.leaves(second("patches")), jax.tree.leaves(second("lax")), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_convolution_against_loops():
    inputs, kernel = _images(2, 5, 1), np.random.default_rng(1).normal(size=(3, 3, 1, 1)).astype(np.float32)
    padded = np.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.zeros((2, 5, 5, 1))
    for row in range(5):
        for column in range(5):
            window = padded[:, row : row + 3, column : column + 3, 0]
            expected[:, row, column, 0] = np.sum(window * kernel[None, :, :, 0, 0], axis=(1, 2))
    np.testing.assert_allclose(models.convolution(inputs, kernel, form="patches"), expected, atol=1e-5)


def test_convolution_refuses_an_unknown_form_and_stride():
    with pytest.raises(ValueError, match="form must be one of 'auto', 'lax', 'patches', got 'fft'"):
        models.convolution(_images(), np.zeros([3, 3, 2, 1]), form="fft")
    with pytest.raises(ValueError, match="stride must be an integer of at least 1, got 0"):
        models.convolution(_images(), np.zeros([3, 3, 2, 1]), stride=0)


@pytest.mark.parametrize("size", [4, 7])
def test_max_pool_is_the_windowed_maximum_with_its_gradient(size):
    inputs = jnp.asarray(_images(size=size))

    def windowed(x):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    np.testing.assert_array_equal(models.max_pool(inputs), windowed(inputs))
    ours, theirs = (jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(inputs) for f in (models.max_pool, windowed))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("policy", _norm.POLICIES)
def test_conv4_forward_against_numpy(pool, policy):
    size, width = 8, 8
    model = models.conv4(3, width=width, depth=2, pool=pool, normalisation=policy, form="patches")
    images = _images(4, size, 1)
    params = model.init(jax.random.key(0), images)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * np.arange(leaf.size).reshape(leaf.shape) / leaf.size, params)
    needed = dict.fromkeys(model.needs)
    found = model.apply(params, images, **needed)
    found = found[0] if policy == "support" else found
    values = np.asarray(images, np.float64)
    for index in range(2):
        block = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params[f"block_{index}"])
        values = _numpy_convolution(values, block["kernel"], 1 if pool else 2)
        values = np.maximum(_numpy_norm(values, block["norm"], policy), 0)
        if pool:
            n, side = values.shape[0], values.shape[1] // 2
            values = values[:, : 2 * side, : 2 * side].reshape(n, side, 2, side, 2, width).max(axis=(2, 4))
    expected = values.reshape(4, -1) @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def _numpy_convolution(values, kernel, stride):
    size = values.shape[1]
    out = -(-size // stride)
    total = max((out - 1) * stride + 3 - size, 0)
    padded = np.pad(values, ((0, 0), *[(total // 2, total - total // 2)] * 2, (0, 0)))
    result = np.zeros((values.shape[0], out, out, kernel.shape[-1]))
    for row in range(out):
        for column in range(out):
            window = padded[:, row * stride : row * stride + 3, column * stride : column * stride + 3]
            result[:, row, column] = np.einsum("nijc,ijco->no", window, kernel)
    return result


def _numpy_norm(values, params, policy):
    if policy == "none":
        return values + params["bias"]
    if policy in ("batch", "support"):
        mean, variance = values.mean((0, 1, 2)), values.var((0, 1, 2))
    else:
        groups = 1 if policy == "layer" else 8
        grouped = values.reshape(*values.shape[:3], groups, -1)
        mean, variance = (
            np.repeat(statistic, values.shape[3] // groups, axis=-1)
            for statistic in (grouped.mean((1, 2, 4))[:, None, None], grouped.var((1, 2, 4))[:, None, None])
        )
    return (values - mean) / np.sqrt(variance + 1e-5) * params["scale"] + params["bias"]


def test_padding_does_not_enter_batch_statistics():
    model = models.conv4(3, width=8, depth=1)
    images = _images(4, 8, 1)
    params = model.init(jax.random.key(0), images)
    padded = np.concatenate([images, np.full_like(images, 1e3)])
    found = model.apply(params, padded, mask=np.arange(8) < 4)[:4]
    np.testing.assert_allclose(found, model.apply(params, images, mask=None), atol=1e-5)


def test_support_statistics_make_a_prediction_independent_of_its_neighbours():
    model = models.conv4(3, width=8, depth=1, normalisation="support")
    images = _images(4, 8, 1)
    params = model.init(jax.random.key(0), images)
    _, stats = model.apply(params, images, mask=None, stats=None)
    together, _ = model.apply(params, images, mask=None, stats=stats)
    alone, _ = model.apply(params, images[:1], mask=None, stats=stats)
    np.testing.assert_allclose(together[:1], alone, atol=1e-5)


def test_unsigned_images_are_scaled():
    model = models.conv4(width=8, depth=1)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1)).astype(np.uint8)
    params = model.init(jax.random.key(0), images)
    np.testing.assert_allclose(
        model.apply(params, images, mask=None),
        model.apply(params, images.astype(np.float32) / 255, mask=None),
        rtol=1e-4,
        atol=1e-5,
    )


def test_conv4_names_what_is_wrong():
    with pytest.raises(ValueError, match="outputs must be an integer of at least 1, got 0"):
        models.conv4(0)
    with pytest.raises(ValueError, match="width must be"):
        models.conv4(width=-1)
    with pytest.raises(ValueError, match="normalisation must be one of"):
        models.conv4(normalisation="instance")
    with pytest.raises(ValueError, match="width must be a multiple of 8 under group normalisation, got 12"):
        models.conv4(width=12, normalisation="group").init(jax.random.key(0), _images())
    with pytest.raises(ValueError, match="inputs must be at least 16 pixels high and wide"):
        models.conv4(width=8).init(jax.random.key(0), _images(size=9))
    with pytest.raises(ValueError, match="inputs must be images"):
        models.conv4(width=8).init(jax.random.key(0), np.zeros([3, 5]))
