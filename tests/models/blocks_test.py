"""What transformers share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from metajax import models
from metajax.models._blocks import gelu

TOKENS = np.random.default_rng(0).integers(0, 20, (5, 7))
KEPT = np.arange(7) < np.array([[7], [4], [1], [6], [0]])
TEXTS = {"tokens": TOKENS, "mask": KEPT}
IMAGES = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)
TRANSFORMERS = {
    "encoder": (lambda remat: models.encoder(20, 3, width=16, depth=3, heads=4, remat=remat), TEXTS),
    "encoder, no mask": (lambda remat: models.encoder(20, width=16, depth=2, heads=4, remat=remat), TOKENS),
    "decoder": (
        lambda remat: models.decoder(20, width=16, depth=3, heads=4, kv_heads=2, outputs=3, remat=remat), TEXTS
    ),
    "decoder, no mask": (lambda remat: models.decoder(20, width=16, depth=2, heads=4, remat=remat), TOKENS),
    "vit": (lambda remat: models.vit(2, patch=4, width=16, depth=2, heads=2, remat=remat), IMAGES),
}  # fmt: skip


def test_gelu_and_its_derivatives_are_those_of_the_error_function(x64):
    values = jnp.linspace(-6, 6, 97, dtype=jnp.float64)

    def reference(x):
        return jax.nn.gelu(x, approximate=False)

    first, second, mixed = jax.grad(gelu), jax.grad(jax.grad(gelu)), jax.jacfwd(jax.grad(gelu))
    np.testing.assert_allclose(gelu(values), reference(values), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(jax.vmap(first)(values), jax.vmap(jax.grad(reference))(values), rtol=1e-12, atol=1e-15)
    expected = jax.vmap(jax.grad(jax.grad(reference)))(values)
    for found in (second, mixed):
        np.testing.assert_allclose(jax.vmap(found)(values), expected, rtol=1e-10, atol=1e-14)


def test_gelu_keeps_dtypes():
    for dtype in (jnp.float32, jnp.bfloat16):
        assert gelu(jnp.ones(3, dtype)).dtype == jax.vmap(jax.grad(gelu))(jnp.ones(3, dtype)).dtype == dtype


@pytest.mark.parametrize("name", worlds.few_by_default(TRANSFORMERS, lambda name: name == "encoder"))
def test_one_example_at_a_time_has_the_same_gradient(name):
    make, inputs = TRANSFORMERS[name]
    params = make(True).init(jax.random.key(0), inputs)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 1.1 * leaf]), params)  # as tasks under vmap have them
    found = []
    for remat in (False, True, "example"):
        model = make(remat)
        loss = lambda params, model=model: jnp.sum(jnp.square(model.apply(params, inputs)))  # noqa: E731
        outputs, slopes = jax.jit(jax.vmap(jax.value_and_grad(loss)))(several)
        assert np.isfinite(outputs).all()
        found.append((outputs, slopes))
    for other in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found[0], other)


def test_one_example_at_a_time_takes_less_memory():
    tokens = np.zeros([16, 32], np.int32)
    sizes = []
    for remat in (True, "example"):
        model = models.encoder(20, width=32, depth=3, heads=4, remat=remat)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)
        slope = jax.jit(jax.grad(lambda params, model=model: jnp.sum(jnp.square(model.apply(params, tokens)))))
        sizes.append(worlds.temporary_bytes(slope, params))
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.parametrize("make", [make for make, _ in TRANSFORMERS.values()])
def test_other_values_of_remat_are_refused(make):
    for value in ("block", 2, None):
        with pytest.raises(ValueError, match=f"remat must be True, False or 'example', got {value!r}"):
            make(value)
