"""The forms of a convolution and of max pooling agree, also in their second derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from metajax.models import convolution, max_pool


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.array(rng.normal(size=shape)) for shape in shapes]


FORMS = ("patches", "trilinear")


SIZES = [((1, 1), (3, 3)), ((2, 5), (2, 4)), ((2, 5), (5, 3)), ((7, 8), (1, 1)), ((7, 8), (2, 4)), ((12, 11), (3, 3))]
CASES = [(form, size, window, stride) for form in FORMS for size, window in SIZES for stride in (1, 2, 3)]


# by default what networks use, an even window (its padding differs by side), and a window larger than the image
@pytest.mark.parametrize(
    ("form", "size", "window", "stride"),
    worlds.few_by_default(
        CASES,
        lambda form, size, window, stride: (
            (stride < 3 and size + window in ((12, 11, 3, 3), (7, 8, 2, 4))) or (size, stride) == ((1, 1), 2)
        ),
    ),
)
def test_value_and_gradients(form, size, window, stride, x64):
    images, kernel = arrays((2, *size, 3), (*window, 3, 4))
    expected, pull_back = jax.vjp(lambda x, k: convolution(x, k, stride=stride, form="lax"), images, kernel)
    found, own_pull_back = jax.vjp(lambda x, k: convolution(x, k, stride=stride, form=form), images, kernel)
    assert found.shape == (2, -(-size[0] // stride), -(-size[1] // stride), 4)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    (cotangent,) = arrays(found.shape, seed=1)
    for own, reference in zip(own_pull_back(cotangent), pull_back(cotangent), strict=True):
        np.testing.assert_allclose(own, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("examples", [75, 79, 100])
def test_the_gradient_of_a_kernel_is_summed_over_groups_of_images(examples, x64):
    images, kernel, cotangent = arrays((examples, 12, 11, 2), (3, 3, 2, 3), (examples, 12, 11, 3))
    found, expected = (
        jax.vjp(lambda k, form=form: convolution(images, k, form=form), kernel)[1](cotangent)[0]
        for form in ("trilinear", "lax")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-11)


def test_no_images():
    images, kernel = jnp.ones([0, 6, 6, 2]), jnp.ones([3, 3, 2, 4])
    found, pull_back = jax.vjp(lambda x, k: convolution(x, k, form="trilinear"), images, kernel)
    assert found.shape == (0, 6, 6, 4)
    assert [leaf.shape for leaf in pull_back(found)] == [images.shape, kernel.shape]
    np.testing.assert_array_equal(pull_back(found)[1], 0)


@pytest.mark.parametrize("stride", worlds.few_by_default([1, 2], lambda stride: stride == 2))
@pytest.mark.parametrize("kind", ["reverse", "forward"])
def test_second_order(kind, stride, x64):
    """The derivative of a gradient step through two layers, which is what a hypergradient is made of."""
    images, first, second = arrays((3, 6, 5, 2), (3, 3, 2, 4), (3, 3, 4, 1))

    def loss(first, form):
        values = jnp.tanh(convolution(images, first, stride=stride, form=form))
        return jnp.mean(jnp.sin(convolution(values, second, stride=stride, form=form)))

    def after_a_step(first, form):
        return loss(first - 0.5 * jax.grad(loss)(first, form), form)

    def derivative(form):
        outer = jax.grad if kind == "reverse" else lambda f: lambda k: jax.jvp(f, (k,), (jnp.cos(k),))[1]
        return jax.jit(outer(lambda k: after_a_step(k, form)))(first)

    for form in FORMS:
        np.testing.assert_allclose(derivative(form), derivative("lax"), rtol=1e-10, atol=1e-14)


@pytest.mark.slow
def test_third_order(x64):
    images, kernel = arrays((1, 4, 4, 1), (3, 3, 1, 2))

    def third(form):
        value = lambda k: jnp.sum(jnp.sin(convolution(images, k, form=form)))  # noqa: E731
        return jax.jacrev(jax.jacfwd(jax.grad(value)))(kernel)

    np.testing.assert_allclose(third("trilinear"), third("lax"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_kernel_of_its_own_for_each_task(form, x64):
    images, kernels = arrays((3, 2, 5, 5, 2), (3, 3, 3, 2, 4))

    def loss(images, kernel, form):
        return jnp.sum(jnp.sin(convolution(images, kernel, form=form)))

    for shared in (True, False):
        weights, axis = (kernels[0], None) if shared else (kernels, 0)
        gradients = jax.vmap(jax.grad(lambda x, k: loss(x, k, form), argnums=(0, 1)), in_axes=(0, axis))
        found = gradients(images, weights)
        for task, image in enumerate(images):
            expected = jax.grad(loss, argnums=(0, 1))(image, weights if shared else weights[task], "lax")
            for own, reference in zip(found, expected, strict=True):
                np.testing.assert_allclose(own[task], reference, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("axis", [0, 1, 4])
def test_the_axis_of_tasks_may_be_any(axis, x64):
    images, kernel = arrays((3, 2, 5, 5, 2), (3, 3, 2, 4))
    found = jax.vmap(lambda x: convolution(x, kernel, form="trilinear"), in_axes=axis, out_axes=axis)(
        jnp.moveaxis(images, 0, axis)
    )
    expected = [convolution(x, kernel, form="lax") for x in images]
    np.testing.assert_allclose(jnp.moveaxis(found, axis, 0), np.stack(expected), rtol=1e-12, atol=1e-12)


def test_devices_that_share_a_kernel(x64):
    """The gradient with respect to a shared kernel is summed over the devices, as everywhere in shard_map."""
    images, kernel = arrays((8, 2, 5, 5, 2), (3, 3, 2, 4))
    mesh = jax.make_mesh((8,), ("task",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(kernel, images):
        return jnp.sum(jnp.sin(convolution(images, kernel, form="trilinear")))

    spread = jax.shard_map(
        lambda kernel, images: jax.grad(loss)(kernel, images[0]),
        mesh=mesh, in_specs=(jax.P(), jax.P("task")), out_specs=jax.P(),
    )  # fmt: skip
    expected = sum(jax.grad(loss)(kernel, part) for part in images)
    np.testing.assert_allclose(jax.jit(spread)(kernel, images), expected, rtol=1e-11)


@pytest.mark.parametrize(
    ("dtype", "form"), [(jnp.float32, "trilinear"), (jnp.float64, "patches"), (jnp.bfloat16, "patches")]
)
def test_auto_on_the_cpu(dtype, form, x64):
    images, kernel = (leaf.astype(dtype) for leaf in arrays((2, 6, 6, 2), (3, 3, 2, 3)))
    found, expected = (
        str(jax.make_jaxpr(lambda x, k, form=form: convolution(x, k, form=form))(images, kernel))
        for form in ("auto", form)
    )
    assert found == expected


@pytest.mark.parametrize(
    "size", worlds.few_by_default([((2, 2),), ((3, 2),), ((8, 8),), ((7, 5),)], lambda s: s[0] > 3)
)
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
        ({"form": "fft"}, "form must be one of 'auto', 'lax', 'patches', 'trilinear', got 'fft'"),
        ({"stride": 0}, "stride must be an integer of at least 1, got 0"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        convolution(jnp.ones([1, 4, 4, 1]), jnp.ones([3, 3, 1, 1]), **arguments)
