"""What transformers share."""

import jax
import jax.numpy as jnp
import numpy as np

from metajax.models._blocks import gelu


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
