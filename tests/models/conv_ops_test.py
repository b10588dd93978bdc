"""The two forms of a convolution and of max pooling agree, also in their second derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from metajax.models import convolution, max_pool


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.array(rng.normal(size=shape)) for shape in shapes]


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 8), (12, 12)])
@pytest.mark.parametrize("window", [(3, 3), (1, 1), (2, 4), (5, 3)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_patches_are_the_convolution(size, window, stride, x64):
    images, kernel = arrays((2, *size, 3), (*window, 3, 4))
    expected = convolution(images, kernel, stride=stride, form="lax")
    found = convolution(images, kernel, stride=stride, form="patches")
    assert found.shape == (2, -(-size[0] // stride), -(-size[1] // stride), 4)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_second_order_of_both_forms(stride, x64):
    """The derivative of a gradient step through two layers, which is what a hypergradient is made of."""
    images, first, second = arrays((3, 6, 5, 2), (3, 3, 2, 4), (3, 3, 4, 1))

    def loss(first, form):
        values = jnp.tanh(convolution(images, first, stride=stride, form=form))
        return jnp.mean(jnp.sin(convolution(values, second, stride=stride, form=form)))

    def after_a_step(first, form):
        return loss(first - 0.5 * jax.grad(loss)(first, form), form)

    found, expected = (worlds.jit(jax.grad(lambda k, f=form: after_a_step(k, f)))(first) for form in ("patches", "lax"))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)


def test_a_kernel_of_its_own_for_each_task(x64):
    images, kernels = arrays((3, 2, 5, 5, 2), (3, 3, 3, 2, 4))
    found = jax.vmap(lambda x, k: convolution(x, k, form="patches"))(images, kernels)
    expected = [convolution(x, k, form="lax") for x, k in zip(images, kernels, strict=True)]
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-12, atol=1e-12)


def test_auto_is_patches_on_the_cpu(x64):
    images, kernel = arrays((2, 6, 6, 2), (3, 3, 2, 3))
    assert "conv_general_dilated" not in str(jax.make_jaxpr(convolution)(images, kernel))
    assert "conv_general_dilated" in str(jax.make_jaxpr(lambda x, k: convolution(x, k, form="lax"))(images, kernel))


@pytest.mark.parametrize("size", [(2, 2), (3, 2), (8, 8), (7, 5)])
def test_max_pool_is_the_windowed_reduction(size, x64):
    (images,) = arrays((2, *size, 3))

    def reduction(images):
        return jax.lax.reduce_window(images, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    np.testing.assert_array_equal(max_pool(images), reduction(images))
    slopes = [jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(images) for f in (max_pool, reduction)]
    np.testing.assert_array_equal(*slopes)


def test_a_tie_has_one_winner():
    slope = jax.grad(lambda x: jnp.sum(max_pool(x)))(jnp.ones([1, 4, 4, 1]))
    assert sorted(slope.ravel().tolist()) == [0.0] * 12 + [1.0] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "fft"}, "form must be one of 'auto', 'lax', 'patches', got 'fft'"),
        ({"stride": 0}, "stride must be an integer of at least 1, got 0"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        convolution(jnp.ones([1, 4, 4, 1]), jnp.ones([3, 3, 1, 1]), **arguments)
