"""Image operations; each works in NumPy, in the graph of the pipeline, and in programs on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from metajax.core import _validate
from metajax.data._namespace import keep_shape, namespace

Array = Any  # of NumPy, JAX or TensorFlow
Shared = Literal["example", "class", "episode"]
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Transform(NamedTuple):
    """A pure operation on images; its only randomness is the numbers passed to it.

    Attributes:
      draws: number of uniform random numbers that an image needs.
      apply: `(images [n, height, width, c], numbers float32 [n, draws] in [0, 1)) -> images`.
      shared: "example" if each example has its own numbers, "class" if all examples of a class share them, or
        "episode" if all examples of an episode do.

    >>> flip = random_flip()
    >>> flip.apply(np.arange(3.0).reshape(1, 1, 3, 1), np.array([[0.3]])).ravel().tolist()
    [2.0, 1.0, 0.0]
    """

    draws: int
    apply: Callable[[Array, Array], Array]
    shared: Shared = "example"


Transforms = Transform | Sequence[Transform]


def per_class(transform: Transform) -> Transform:
    """Returns a transform that changes all examples of a class in the same way.

    Support and query share the change if the transform is in `both`. With `random_rotate90`, rotated characters act
    as additional classes.

    >>> per_class(random_rotate90()).shared
    'class'
    """
    return _validate.instance("transform", transform, Transform)._replace(shared="class")


def per_episode(transform: Transform) -> Transform:
    """Returns a transform that changes all examples of an episode in the same way.

    Support and query share the change if the transform is in `both`.

    >>> per_episode(colour_jitter(brightness=0.4)).shared
    'episode'
    """
    return _validate.instance("transform", transform, Transform)._replace(shared="episode")


def as_transforms(name: str, transforms: Any) -> tuple[Transform, ...]:
    """Returns a transform or a sequence of transforms as a tuple.

    Raises:
      ValueError: `transforms` is neither.

    >>> len(as_transforms("both", resize(8))), as_transforms("both", ())
    (1, ())
    """
    several = (transforms,) if isinstance(transforms, Transform) else transforms
    if not isinstance(several, Sequence) or not all(isinstance(transform, Transform) for transform in several):
        raise ValueError(f"{name} must be a transform or a list of them, got {transforms!r}")
    return tuple(several)


def apply_all(transforms: Sequence[Transform], images: Array, numbers: Array) -> Array:
    """Applies transforms in order; `numbers` `[n, draws of all]` holds their numbers side by side.

    >>> apply_all([resize(2)], np.ones([1, 4, 4, 3], np.uint8), np.zeros([1, 0])).shape
    (1, 2, 2, 3)
    """
    if len(images.shape) != 4:
        raise ValueError(f"images must be [n, height, width, c], got shape {images.shape}")
    start = 0
    for transform in transforms:
        own = numbers[:, start : start + transform.draws]
        images = keep_shape(transform.apply, images, own)
        start += transform.draws
    return images


def _cast(images: Array, dtype: Any) -> Array:
    return namespace(images).asarray(images, dtype=dtype)


def _like(values: Array, images: Array) -> Array:
    """Converts floats to the dtype of `images`: rounds and clips them if `images` are bytes."""
    xp = namespace(values)
    if images.dtype != np.uint8:
        return values
    return _cast(xp.floor(xp.clip(values, 0.0, 255.0) + 0.5), np.uint8)


def _column(numbers: Array, index: int) -> Array:
    return numbers[:, index, None, None, None]


def resize(size: int) -> Transform:
    """Resizes to `size` x `size` with a triangle filter, antialiased if the image shrinks.

    Raises:
      ValueError: `size` is not a positive integer.

    >>> resize(2).apply(np.full([1, 6, 4, 1], 7, np.uint8), np.zeros([1, 0])).ravel().tolist()
    [7, 7, 7, 7]
    """
    _validate.positive_int("size", size)

    def apply(images: Array, numbers: Array) -> Array:
        height, width, channels = images.shape[1:]
        if height == width == size:
            return images
        xp = namespace(images)
        down, across = _triangle(height, size), _triangle(width, size)
        values = xp.reshape(_cast(images, np.float32), (-1, height, width * channels))
        values = xp.reshape(xp.matmul(down, values), (-1, size, width, channels))
        return _like(xp.matmul(across, values), images)

    return Transform(0, apply)


def _triangle(before: int, after: int) -> np.ndarray:
    """Returns `[after, before]` weights; pixels are areas with centres at half-integers."""
    scale = before / after
    centres = (np.arange(after) + 0.5) * scale - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(before) - centres[:, None]) / max(scale, 1))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def normalise(mean: float | Sequence[float], std: float | Sequence[float]) -> Transform:
    """Subtracts the mean and divides by the standard deviation of each channel; the result is float32.

    Bytes are scaled to [0, 1] first, so mean and standard deviation are in units of full intensity.

    Raises:
      ValueError: a number is not finite, or a standard deviation is not above 0.

    >>> normalise(0.5, 0.5).apply(np.array([[[[0], [255]]]], np.uint8), np.zeros([1, 0])).ravel().tolist()
    [-1.0, 1.0]
    """
    shift, scale = (np.atleast_1d(np.asarray(value, np.float32)) for value in (mean, std))
    for name, value in (("mean", shift), ("std", scale)):
        if value.ndim != 1 or not np.isfinite(value).all() or (name == "std" and (value <= 0).any()):
            raise ValueError(f"{name} must be a number or one for each channel, finite and std above 0, got {value}")

    def apply(images: Array, numbers: Array) -> Array:
        for name, value in (("mean", shift), ("std", scale)):
            if len(value) not in (1, images.shape[-1]):
                raise ValueError(f"{name} must be a number or one for each of {images.shape[-1]} channels, got {value}")
        values = _cast(images, np.float32)
        values = values / 255.0 if images.dtype == np.uint8 else values
        return (values - shift) / scale

    return Transform(0, apply)


def random_flip() -> Transform:
    """Mirrors an image left to right with probability 1/2.

    >>> random_flip().apply(np.arange(2.0).reshape(1, 1, 2, 1), np.array([[0.7]])).ravel().tolist()
    [0.0, 1.0]
    """

    def apply(images: Array, numbers: Array) -> Array:
        return namespace(images).where(_column(numbers, 0) < 0.5, images[:, :, ::-1], images)

    return Transform(1, apply)


def random_rotate90() -> Transform:
    """Rotates a square image by 0, 90, 180 or 270 degrees; see `per_class`.

    Raises:
      ValueError: (when applied) the images are not square.

    >>> image = np.arange(4.0).reshape(1, 2, 2, 1)
    >>> random_rotate90().apply(image, np.array([[0.3]]))[0, ..., 0].tolist()
    [[1.0, 3.0], [0.0, 2.0]]
    """

    def apply(images: Array, numbers: Array) -> Array:
        if images.shape[1] != images.shape[2]:
            raise ValueError(f"images must be square to be turned by 90 degrees, got shape {images.shape}")
        xp = namespace(images)
        turns, across = _column(numbers, 0) * 4, xp.swapaxes(images, 1, 2)
        half = xp.where(turns < 2, images, images[:, ::-1, ::-1])
        quarter = xp.where(turns < 2, across[:, ::-1], across[:, :, ::-1])
        odd = (turns >= 1) & (turns < 2) | (turns >= 3)
        return xp.where(odd, quarter, half)

    return Transform(1, apply)


def random_crop(size: int | None = None, *, padding: int = 0) -> Transform:
    """Cuts a square out of an image at a random place.

    Args:
      size: side of the square; None keeps the size of the image.
      padding: number of zeros that are first added on each side of the image.

    Raises:
      ValueError: padding is negative, size is below 1, or (when applied) size exceeds the padded image.

    >>> random_crop(2).apply(np.arange(9.0).reshape(1, 3, 3, 1), np.array([[0.9, 0.1]]))[0, ..., 0].tolist()
    [[3.0, 4.0], [6.0, 7.0]]
    """
    if size is not None:
        _validate.positive_int("size", size)
    _validate.int_at_least("padding", padding, 0)

    def apply(images: Array, numbers: Array) -> Array:
        xp = namespace(images)
        height, width, channels = images.shape[1:]
        down, across = (height, width) if size is None else (size, size)
        if down > height + 2 * padding or across > width + 2 * padding:
            raise ValueError(f"size must fit in images of shape {images.shape} with padding {padding}, got {size}")
        padded = xp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode="constant")
        tall, wide = height + 2 * padding, width + 2 * padding
        top = _cast(xp.floor(numbers[:, :1] * float(tall - down + 1)), np.int32)
        left = _cast(xp.floor(numbers[:, 1:] * float(wide - across + 1)), np.int32)
        rows = (top + np.arange(down, dtype=np.int32))[:, :, None]
        columns = (left + np.arange(across, dtype=np.int32))[:, None, :]
        flat = xp.reshape(padded, (-1, tall * wide, channels))
        return xp.reshape(
            _pick(flat, xp.reshape(rows * wide + columns, (-1, down * across))), (-1, down, across, channels)
        )

    return Transform(2, apply)


def colour_jitter(*, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0) -> Transform:
    """Changes brightness, then contrast, then saturation by random factors, each uniform in `[1 - x, 1 + x]`.

    Contrast is changed around the mean grey of the image. Bytes are rounded and clipped at the end.

    Args:
      brightness: largest change, in [0, 1].
      contrast: largest change, in [0, 1].
      saturation: largest change, in [0, 1]; images must be RGB if it is above 0.

    Raises:
      ValueError: a number is outside [0, 1], or (when applied) saturation is above 0 and the images are not RGB.

    >>> jitter = colour_jitter(brightness=0.5)
    >>> jitter.apply(np.full([1, 1, 1, 3], 100, np.uint8), np.array([[0.0, 0.5, 0.5]])).ravel().tolist()
    [50, 50, 50]
    """
    bounds = (brightness, contrast, saturation)
    for name, value in zip(("brightness", "contrast", "saturation"), bounds, strict=True):
        if _validate.non_negative_float(name, value) > 1:
            raise ValueError(f"{name} must be at most 1, got {value!r}")

    def apply(images: Array, numbers: Array) -> Array:
        xp, channels = namespace(images), images.shape[3]
        if saturation and channels != 3:
            raise ValueError(f"saturation must be 0 for images of {channels} channel(s), got {saturation!r}")
        weights = np.array(_GREY if channels == 3 else [1 / channels] * channels, np.float32)
        factors = [1.0 + bound * (2.0 * _column(numbers, index) - 1.0) for index, bound in enumerate(bounds)]
        values = _cast(images, np.float32) * factors[0]
        if contrast:
            grey = xp.mean(xp.sum(values * weights, axis=3, keepdims=True), axis=(1, 2), keepdims=True)
            values = (values - grey) * factors[1] + grey
        if saturation:
            grey = xp.sum(values * weights, axis=3, keepdims=True)
            values = (values - grey) * factors[2] + grey
        return _like(values, images)

    return Transform(3, apply)


def random_affine(*, rotation: float = 0.0, scale: float = 0.0, shear: float = 0.0, shift: float = 0.0) -> Transform:
    """Transforms each image by its own random affine map, drawn uniformly within the bounds.

    Images are interpolated bilinearly; pixels from outside the image are 0.

    Args:
      rotation: largest angle in degrees, in either direction.
      scale: largest change of size along each axis, as a fraction: 0.1 draws a factor between 0.9 and 1.1.
      shear: largest displacement of a row per row.
      shift: largest displacement along each axis, as a fraction of the side.

    Raises:
      ValueError: a bound is negative, or scale is 1 or more.

    >>> import jax
    >>> images = jax.numpy.zeros([2, 28, 28, 1], "uint8").at[:, 10:18, 10:18].set(255)
    >>> moved = random_affine(rotation=10, shift=0.1).apply(images, jax.random.uniform(jax.random.key(0), [2, 6]))
    >>> moved.shape, moved.dtype
    ((2, 28, 28, 1), dtype('uint8'))
    """
    for name, value in (("rotation", rotation), ("shear", shear), ("shift", shift)):
        _validate.non_negative_float(name, value)
    _validate.below_one("scale", scale)

    def apply(images: Array, numbers: Array) -> Array:
        xp = namespace(images)
        height, width = images.shape[1:3]
        draw = [2.0 * numbers[:, index, None, None] - 1.0 for index in range(6)]
        angle, sheared = math.radians(rotation) * draw[0], shear * draw[1]
        rows, columns = (1.0 / (1.0 + scale * draw[index]) for index in (2, 3))
        down, right = shift * height * draw[4], shift * width * draw[5]
        # maps a place in the result to its source in the image: unshift, unrotate, unshear, unscale
        line = [np.arange(side, dtype=np.float32) - np.float32((side - 1) / 2) for side in (height, width)]
        y, x = np.meshgrid(*line, indexing="ij")
        y, x = y - down, x - right
        cos, sin = xp.cos(angle), xp.sin(angle)
        y, x = cos * y - sin * x, sin * y + cos * x
        x = x - sheared * y
        y, x = y * rows, x * columns
        return _bilinear(images, y + (height - 1) / 2, x + (width - 1) / 2)

    return Transform(6, apply)


def _bilinear(images: Array, y: Array, x: Array) -> Array:
    """Returns the values of `[n, h, w, c]` at fractional places `[n, h, w]`, 0 outside."""
    xp = namespace(images)
    height, width, channels = images.shape[1:]
    # adds a rim of zeros: places outside are clipped to it
    flat = xp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="constant")
    flat = xp.reshape(flat, (-1, (height + 2) * (width + 2), channels))
    top, left = xp.floor(y), xp.floor(x)
    below, beside = (y - top)[..., None], (x - left)[..., None]

    def at(row: Array, column: Array) -> Array:
        row = _cast(xp.clip(row + 1, 0.0, float(height + 1)), np.int32)
        column = _cast(xp.clip(column + 1, 0.0, float(width + 1)), np.int32)
        found = _pick(flat, xp.reshape(row * (width + 2) + column, (-1, height * width)))
        return xp.reshape(_cast(found, np.float32), (-1, height, width, channels))

    upper = at(top, left) * (1.0 - beside) + at(top, left + 1) * beside
    lower = at(top + 1, left) * (1.0 - beside) + at(top + 1, left + 1) * beside
    values = upper * (1.0 - below) + lower * below
    return _like(values, images)


def _pick(flat: Array, place: Array) -> Array:
    """Returns pixels `[n, k, c]` of flat images `[n, m, c]` at `place` `[n, k]`; all places must be inside."""
    xp = namespace(flat)
    if xp.__name__.startswith("tensorflow"):
        import tensorflow as tf

        return tf.gather(flat, place, batch_dims=1)  # take_along_axis does not broadcast there
    if xp is np:
        return np.take_along_axis(flat, place[..., None], axis=1)
    return xp.take_along_axis(flat, place[..., None], axis=1, mode="promise_in_bounds")
