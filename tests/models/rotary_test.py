import math

import jax.numpy as jnp
import numpy as np
import pytest

from metajax.models._rotary import rotary

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def test_products_depend_on_the_distance_alone():
    values = np.random.default_rng(0).normal(size=[2, 1, 1, 1, 8]).astype(np.float32)
    turn = rotary(100.0, None)
    products = [
        jnp.vdot(turn(values[0], jnp.array([place + 3])), turn(values[1], jnp.array([place]))) for place in (0, 5)
    ]
    np.testing.assert_allclose(*products, rtol=1e-4)


def test_linear_is_other_positions():
    values = np.random.default_rng(0).normal(size=[1, 5, 2, 8]).astype(np.float32)
    stretched = rotary(100.0, {"type": "linear", "factor": 4.0})(values, jnp.arange(5))
    np.testing.assert_allclose(stretched, rotary(100.0, None)(values, jnp.arange(5) / 4), atol=1e-6)


def test_llama3_by_wavelengths():
    """The published rule: short waves stay, long ones are stretched, and those in between are between."""
    plain, found = (rotary(5e5, scaling).frequencies(64) for scaling in (None, LLAMA3))
    waves = 2 * math.pi / plain.astype(float)
    short, long = waves < 8192 / 4, waves > 8192
    assert short.sum() > 10
    assert long.sum() > 10
    np.testing.assert_allclose(found[short], plain[short], rtol=1e-6)
    np.testing.assert_allclose(found[long], plain[long] / 8, rtol=1e-6)
    between = ~short & ~long
    smooth = (8192 / waves[between] - 1) / 3
    np.testing.assert_allclose(found[between], ((1 - smooth) / 8 + smooth) * plain[between], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_type": "yarn"}, "rope_type of rope_scaling must be one of 'default', 'linear', 'llama3', got 'yarn'"),
        ({"factor": 0}, "factor of rope_scaling must be a finite number above 0, got 0"),
        ({"low_freq_factor": 4.0}, "low_freq_factor of rope_scaling must be below high_freq_factor, 4.0, got 4.0"),
    ],
)
def test_refusals(changes, said):
    with pytest.raises(ValueError, match=said):
        rotary(1e4, LLAMA3 | changes)
