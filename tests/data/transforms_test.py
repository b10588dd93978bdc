"""Image operations: each against its definition, and the same in NumPy, JAX and the graph of TensorFlow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from metajax import data
from metajax.data._transforms import apply_all

COUNT = 400
RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, [6, 20, 20, 3], np.uint8)
OPERATIONS = {
    "resize": data.resize(13),
    "enlarge": data.resize(33),
    "normalise": data.normalise([0.5, 0.4, 0.3], 0.2),
    "flip": data.random_flip(),
    "rotate90": data.random_rotate90(),
    "crop": data.random_crop(15),
    "pad and crop": data.random_crop(padding=3),
    "jitter": data.colour_jitter(brightness=0.4, contrast=0.4, saturation=0.4),
    "affine": data.random_affine(rotation=20, scale=0.2, shear=0.1, shift=0.1),
}


def affine(key: jax.Array, images: jax.Array, **bounds: float) -> jax.Array:
    return data.random_affine(**bounds).apply(images, jax.random.uniform(key, [len(images), 6]))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("images", [BYTES, BYTES / np.float32(255)], ids=["bytes", "floats"])
def test_three_libraries_give_one_result(name, images):
    import tensorflow as tf

    operation = OPERATIONS[name]
    numbers = RNG.random([6, operation.draws], np.float32)
    here = operation.apply(images, numbers)
    compiled = jax.jit(operation.apply)(images, numbers)
    signature = [tf.TensorSpec([None, *array.shape[1:]], array.dtype) for array in (images, numbers)]
    graph = tf.function(operation.apply, input_signature=signature, autograph=False)(images, numbers).numpy()
    assert here.dtype == compiled.dtype == graph.dtype == (np.float32 if name == "normalise" else images.dtype)
    assert here.shape == compiled.shape == graph.shape
    tolerance = 1 if here.dtype == np.uint8 else 1e-5  # halves may be rounded either way
    for other in (compiled, graph):
        difference = np.abs(here.astype(np.float64) - np.asarray(other, np.float64))
        assert difference.max() <= tolerance
        assert (difference > 1e-5).mean() < 0.01


@pytest.mark.parametrize("size", [7, 20, 31])
def test_resize_is_the_triangle_filter(size):
    made = data.resize(size).apply(BYTES, np.zeros([6, 0]))
    for image, found in zip(BYTES, made, strict=True):
        expected = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR), int)
        assert np.abs(found - expected).max() <= 1  # Pillow rounds its weights
    floats = BYTES / np.float32(255)
    expected = jax.image.resize(floats, (6, size, size, 3), "linear", antialias=True)
    np.testing.assert_allclose(data.resize(size).apply(floats, np.zeros([6, 0])), expected, atol=1e-5)


def test_normalise():
    expected = (BYTES / 255 - [0.5, 0.4, 0.3]) / 0.2
    np.testing.assert_allclose(OPERATIONS["normalise"].apply(BYTES, np.zeros([6, 0])), expected, atol=1e-5)
    np.testing.assert_allclose(data.normalise(0.5, 2.0).apply(np.full([1, 1, 1, 3], 1.5), np.zeros([1, 0])), 0.5)


def test_flip_mirrors_half_of_the_images():
    numbers = RNG.random([2000, 1], np.float32)
    images = np.tile(BYTES[:1], (2000, 1, 1, 1))
    made = data.random_flip().apply(images, numbers)
    mirrored = (made == BYTES[0, :, ::-1]).all(axis=(1, 2, 3))
    assert ((made == BYTES[0]).all(axis=(1, 2, 3)) != mirrored).all()
    assert stats.binomtest(int(mirrored.sum()), 2000).pvalue > 1e-3


def test_rotate90_turns_by_each_quarter_equally_often():
    numbers = RNG.random([2000, 1], np.float32)
    made = data.random_rotate90().apply(np.tile(BYTES[:1], (2000, 1, 1, 1)), numbers)
    turned = np.stack([(made == np.rot90(BYTES[0], turns)).all(axis=(1, 2, 3)) for turns in range(4)])
    assert (turned.sum(axis=0) == 1).all()
    assert stats.chisquare(turned.sum(axis=1)).pvalue > 1e-3


def test_crop_takes_every_place_equally_often():
    size, padding = 4, 2
    places = np.arange(1, 37, dtype=np.float32).reshape(1, 6, 6, 1)  # no zero
    made = data.random_crop(size, padding=padding).apply(np.tile(places, (5000, 1, 1, 1)), RNG.random([5000, 2]))
    padded = np.pad(places[0], ((padding, padding), (padding, padding), (0, 0)))
    windows = [padded[top : top + size, left : left + size] for top in range(7) for left in range(7)]
    hits = np.stack([(made == window).all(axis=(1, 2, 3)) for window in windows])
    assert (hits.sum(axis=0) == 1).all()
    assert stats.chisquare(hits.sum(axis=1)).pvalue > 1e-3


def test_jitter_by_hand():
    numbers = np.array([[0.25, 0.75, 0.5], [1.0, 0.0, 0.25]])
    images = BYTES[:2] / 255
    made = data.colour_jitter(brightness=0.4, contrast=0.2, saturation=0.8).apply(images, numbers)
    for image, (b, c, s), found in zip(images, numbers * 2 - 1, made, strict=True):
        bright = image * (1 + 0.4 * b)
        grey = (bright @ [0.299, 0.587, 0.114]).mean()
        contrasted = grey + (bright - grey) * (1 + 0.2 * c)
        greys = (contrasted @ [0.299, 0.587, 0.114])[..., None]
        np.testing.assert_allclose(found, greys + (contrasted - greys) * (1 + 0.8 * s), atol=1e-5)


def test_transforms_follow_one_another():
    chain = [data.random_crop(12), data.resize(6), data.random_flip()]
    numbers = RNG.random([6, 3], np.float32)
    expected = chain[2].apply(chain[1].apply(chain[0].apply(BYTES, numbers[:, :2]), numbers[:, 2:2]), numbers[:, 2:])
    np.testing.assert_array_equal(apply_all(chain, BYTES, numbers), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.resize(0), "size must be an integer of at least 1, got 0"),
        (lambda: data.normalise(0.5, 0.0), "std must be a number or one for each channel, finite and std above 0"),
        (lambda: data.normalise(float("nan"), 1.0), "mean must be a number"),
        (lambda: data.random_crop(padding=-1), "padding must be an integer of at least 0, got -1"),
        (lambda: data.random_crop(25).apply(BYTES, np.zeros([6, 2])), "size must fit in images of shape"),
        (lambda: data.colour_jitter(contrast=1.5), "contrast must be at most 1, got 1.5"),
        (
            lambda: data.colour_jitter(saturation=0.5).apply(BYTES[..., :1], np.zeros([6, 3])),
            r"saturation must be 0 for images of 1 channel\(s\), got 0.5",
        ),
        (lambda: data.random_rotate90().apply(BYTES[:, :10], np.zeros([6, 1])), "images must be square"),
        (lambda: data.per_class(data.random_flip), "transform must be of type Transform, got"),
        (
            lambda: apply_all([data.random_flip()], BYTES[0], np.zeros([20, 1])),
            r"images must be \[n, height, width, c\]",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


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
    np.testing.assert_allclose(affine(jax.random.key(0), images), images, atol=1e-6)


def test_shift_moves_the_centre():
    _, cy, cx, *_ = _moments(affine(jax.random.key(1), _bar(), shift=0.1))
    _uniform(cy, 6.1, 0.01)
    _uniform(cx, 6.1, 0.01)
    assert abs(np.corrcoef(cy, cx)[0, 1]) < 0.2


def test_rotation_turns_the_axis():
    mass, cy, cx, yy, xx, xy = _moments(affine(jax.random.key(2), _bar(), rotation=20))
    _uniform(np.degrees(0.5 * np.arctan2(2 * xy, yy - xx)), 20, 0.3)
    np.testing.assert_allclose(mass, mass[0], rtol=0.02)
    np.testing.assert_allclose(np.hypot(cy, cx), 0, atol=0.05)


def test_scale_stretches_each_direction():
    still = _moments(_bar(31, 31))
    _, _, _, yy, xx, _ = _moments(affine(jax.random.key(3), _bar(31, 31), scale=0.3))
    high, wide = (np.sqrt(moment / still[3]) for moment in (yy, xx))
    _uniform(high - 1, 0.3, 0.02)
    _uniform(wide - 1, 0.3, 0.02)
    assert abs(np.corrcoef(high, wide)[0, 1]) < 0.2


def test_shear_moves_rows_against_each_other():
    mass, _, _, yy, _, xy = _moments(affine(jax.random.key(4), _bar(), shear=0.2))
    _uniform(xy / yy, 0.2, 0.005)
    np.testing.assert_allclose(mass, mass[0], rtol=0.01)


def test_bytes_stay_bytes_and_a_key_repeats():
    images = (np.asarray(_bar(side=41)[:8]) * 255).astype(np.uint8)
    bounds = {"rotation": 10, "scale": 0.1, "shear": 0.1, "shift": 0.1}
    moved = affine(jax.random.key(5), jnp.asarray(images), **bounds)
    assert moved.dtype == jnp.uint8
    assert moved.max() == 255
    again = jax.jit(lambda key, values: affine(key, values, **bounds))(jax.random.key(5), images)
    assert np.abs(np.asarray(moved, int) - np.asarray(again, int)).max() <= 1
    floating = affine(jax.random.key(5), jnp.asarray(images) / 255, **bounds)
    np.testing.assert_allclose(moved / 255, floating, atol=0.51 / 255)


def test_channels_move_together():
    images = jnp.concatenate([_bar()[:4], 0.5 * _bar()[:4]], axis=-1)
    moved = affine(jax.random.key(6), images, rotation=15, shift=0.1)
    np.testing.assert_allclose(moved[..., 1], 0.5 * moved[..., 0], atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rotation": -1}, "rotation must be .* got -1"),
        ({"shift": float("nan")}, "shift must be"),
        ({"scale": 1.0}, "scale must be a number of at least 0 and below 1, got 1.0"),
    ],
)
def test_bad_bounds(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.random_affine(**arguments)


def test_no_images():
    assert affine(jax.random.key(0), jnp.zeros([0, 8, 8, 1]), rotation=5).shape == (0, 8, 8, 1)
