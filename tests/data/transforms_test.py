"""Random affine maps, from the moments of what they draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax import data

COUNT = 400


def _bar(height: int = 30, width: int = 5, side: int = 61) -> jax.Array:
    """The same upright bar in the middle of each image."""
    image = np.zeros([COUNT, side, side, 1], np.float32)
    middle = side // 2
    image[:, middle - height // 2 : middle + height // 2 + 1, middle - width // 2 : middle + width // 2 + 1] = 1
    return jnp.asarray(image)


def _moments(images: jax.Array) -> tuple[np.ndarray, ...]:
    """Mass, centre and second moments of each image."""
    values = np.asarray(images, np.float64)[..., 0]
    side = values.shape[1]
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    mass = values.sum((1, 2))

    def mean(field: np.ndarray) -> np.ndarray:
        return (values * field).sum((1, 2)) / mass

    cy, cx = mean(y), mean(x)
    return mass, cy, cx, mean(y * y) - cy**2, mean(x * x) - cx**2, mean(x * y) - cx * cy


def _uniform(draws: np.ndarray, bound: float, tolerance: float) -> None:
    """Inside the bound, reaching it, without bias and with a uniform's spread."""
    assert np.abs(draws).max() <= bound + tolerance
    assert draws.max() > 0.95 * bound - tolerance
    assert draws.min() < tolerance - 0.95 * bound
    assert abs(draws.mean()) < 4 * bound / np.sqrt(3 * COUNT) + tolerance
    np.testing.assert_allclose(draws.std(), bound / np.sqrt(3), rtol=0.1)


def test_without_bounds_nothing_changes():
    images = _bar()
    np.testing.assert_allclose(data.random_affine(jax.random.key(0), images), images, atol=1e-6)


def test_shift_moves_the_centre():
    _, cy, cx, *_ = _moments(data.random_affine(jax.random.key(1), _bar(), shift=0.1))
    _uniform(cy, 6.1, 0.01)
    _uniform(cx, 6.1, 0.01)
    assert abs(np.corrcoef(cy, cx)[0, 1]) < 0.2


def test_rotation_turns_the_axis():
    mass, cy, cx, yy, xx, xy = _moments(data.random_affine(jax.random.key(2), _bar(), rotation=20))
    _uniform(np.degrees(0.5 * np.arctan2(2 * xy, yy - xx)), 20, 0.3)
    np.testing.assert_allclose(mass, mass[0], rtol=0.02)
    np.testing.assert_allclose(np.hypot(cy, cx), 0, atol=0.05)


def test_scale_stretches_each_direction():
    still = _moments(_bar(31, 31))
    _, _, _, yy, xx, _ = _moments(data.random_affine(jax.random.key(3), _bar(31, 31), scale=0.3))
    high, wide = (np.sqrt(moment / still[3]) for moment in (yy, xx))
    _uniform(high - 1, 0.3, 0.02)
    _uniform(wide - 1, 0.3, 0.02)
    assert abs(np.corrcoef(high, wide)[0, 1]) < 0.2


def test_shear_moves_rows_against_each_other():
    mass, _, _, yy, _, xy = _moments(data.random_affine(jax.random.key(4), _bar(), shear=0.2))
    _uniform(xy / yy, 0.2, 0.005)
    np.testing.assert_allclose(mass, mass[0], rtol=0.01)


def test_bytes_stay_bytes_and_a_key_repeats():
    images = (np.asarray(_bar(side=41)[:8]) * 255).astype(np.uint8)
    bounds = {"rotation": 10, "scale": 0.1, "shear": 0.1, "shift": 0.1}
    moved = data.random_affine(jax.random.key(5), jnp.asarray(images), **bounds)
    assert moved.dtype == jnp.uint8
    assert moved.max() == 255
    again = jax.jit(lambda key, values: data.random_affine(key, values, **bounds))(jax.random.key(5), images)
    assert np.abs(np.asarray(moved, int) - np.asarray(again, int)).max() <= 1
    floating = data.random_affine(jax.random.key(5), jnp.asarray(images) / 255, **bounds)
    np.testing.assert_allclose(moved / 255, floating, atol=0.51 / 255)


def test_channels_move_together():
    images = jnp.concatenate([_bar()[:4], 0.5 * _bar()[:4]], axis=-1)
    moved = data.random_affine(jax.random.key(6), images, rotation=15, shift=0.1)
    np.testing.assert_allclose(moved[..., 1], 0.5 * moved[..., 0], atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rotation": -1}, "rotation must be .* got -1"),
        ({"shift": float("nan")}, "shift must be"),
        ({"scale": 1.0}, "scale must be below 1, got 1.0"),
    ],
)
def test_bad_bounds(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.random_affine(jax.random.key(0), jnp.zeros([1, 8, 8, 1]), **arguments)


def test_images_without_channels():
    with pytest.raises(ValueError, match=r"images must be \[n, height, width, c\], got shape \(8, 8\)"):
        data.random_affine(jax.random.key(0), jnp.zeros([8, 8]))


def test_no_images():
    assert data.random_affine(jax.random.key(0), jnp.zeros([0, 8, 8, 1]), rotation=5).shape == (0, 8, 8, 1)
