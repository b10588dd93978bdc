"""Image operations that run on the device, inside a compiled program."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from metajax.core import _validate


def random_affine(
    key: jax.Array,
    images: jax.Array,
    *,
    rotation: float = 0.0,
    scale: float = 0.0,
    shear: float = 0.0,
    shift: float = 0.0,
) -> jax.Array:
    """Moves each image by its own random affine map, drawn uniformly within the bounds.

    Args:
      key: a typed key.
      images: `[n, height, width, c]`, unsigned 8-bit or floating.
      rotation: largest angle in degrees, either way.
      scale: largest change of size in each direction, as a fraction: 0.1 draws a factor between 0.9 and 1.1.
      shear: largest displacement of a row per row.
      shift: largest displacement in each direction, as a fraction of the side.

    Returns:
      Images of the same shape and dtype, bilinearly interpolated; what comes from outside the image is 0.

    Raises:
      ValueError: images that are not `[n, height, width, c]`, a negative bound, or a scale of 1 and more.

    >>> import jax, jax.numpy as jnp
    >>> images = jnp.zeros([2, 28, 28, 1], jnp.uint8).at[:, 10:18, 10:18].set(255)
    >>> moved = random_affine(jax.random.key(0), images, rotation=10, shift=0.1)
    >>> moved.shape, moved.dtype
    ((2, 28, 28, 1), dtype('uint8'))
    """
    if images.ndim != 4:
        raise ValueError(f"images must be [n, height, width, c], got shape {images.shape}")
    for name, value in (("rotation", rotation), ("scale", scale), ("shear", shear), ("shift", shift)):
        _validate.non_negative_float(name, value)
    if scale >= 1:
        raise ValueError(f"scale must be below 1, got {scale!r}")
    count, height, width, _ = images.shape
    draw = jax.random.uniform(key, [6, count], minval=-1.0, maxval=1.0)
    angle, sheared = math.radians(rotation) * draw[0], shear * draw[1]
    rows, columns = (1.0 / (1.0 + scale * draw[index]) for index in (2, 3))
    down, right = shift * height * draw[4], shift * width * draw[5]
    # from a place in the result to the place in the image that it comes from: unshift, unrotate, unshear, unscale
    y, x = jnp.meshgrid(jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2, indexing="ij")
    y, x = y - down[:, None, None], x - right[:, None, None]
    cos, sin = jnp.cos(angle)[:, None, None], jnp.sin(angle)[:, None, None]
    y, x = cos * y - sin * x, sin * y + cos * x
    x = x - sheared[:, None, None] * y
    y, x = y * rows[:, None, None], x * columns[:, None, None]
    return _bilinear(images, y + (height - 1) / 2, x + (width - 1) / 2)


def _bilinear(images: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """Values of `[n, h, w, c]` at fractional places `[n, h', w']`, 0 outside."""
    count, height, width, channels = images.shape
    # a rim of zeros: a place outside is clipped onto it
    flat = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(count, (height + 2) * (width + 2), channels)
    top, left = jnp.floor(y), jnp.floor(x)
    below, beside = y - top, x - left

    def at(row: jax.Array, column: jax.Array) -> jax.Array:
        row = jnp.clip(row.astype(jnp.int32) + 1, 0, height + 1)
        column = jnp.clip(column.astype(jnp.int32) + 1, 0, width + 1)
        place = (row * (width + 2) + column).reshape(count, y.shape[1] * y.shape[2], 1)
        return (
            jnp.take_along_axis(flat, place, axis=1, mode="promise_in_bounds")
            .reshape(*y.shape, channels)
            .astype(y.dtype)
        )

    below, beside = below[..., None], beside[..., None]
    upper = at(top, left) * (1 - beside) + at(top, left + 1) * beside
    lower = at(top + 1, left) * (1 - beside) + at(top + 1, left + 1) * beside
    values = upper * (1 - below) + lower * below
    if jnp.issubdtype(images.dtype, jnp.integer):
        values = jnp.round(values)
    return values.astype(images.dtype)
