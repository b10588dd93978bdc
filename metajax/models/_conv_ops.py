"""How a convolution is computed, chosen by backend in this one place.

XLA on the CPU runs the gradient of the gradient of a convolution in a slow loop, and turns a vmap over kernels
into a grouped convolution that is slower still. A convolution as shifted slices and one matrix product has
neither problem. Accelerators run `lax.conv_general_dilated`.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from metajax.core import _validate

Form = Literal["auto", "lax", "patches"]


def convolution(inputs: jax.Array, kernel: jax.Array, *, stride: int = 1, form: Form = "auto") -> jax.Array:
    """A 2-D convolution with SAME padding, in a form that is fast under second order on this backend.

    Args:
      inputs: `[n, height, width, c_in]`.
      kernel: `[k_h, k_w, c_in, c_out]`.
      stride: step in both directions.
      form: "lax", "patches" (shifted slices and a matrix product), or "auto": patches on the CPU, lax elsewhere.

    Returns:
      `[n, ceil(height / stride), ceil(width / stride), c_out]`.

    Raises:
      ValueError: an unknown form or a stride below 1.

    >>> import jax.numpy as jnp
    >>> convolution(jnp.ones([1, 4, 4, 1]), jnp.ones([3, 3, 1, 2]), stride=2).shape
    (1, 2, 2, 2)
    """
    _validate.one_of("form", form, ("auto", "lax", "patches"))
    _validate.positive_int("stride", stride)
    if form == "auto":
        form = "patches" if jax.default_backend() == "cpu" else "lax"
    if form == "lax":
        return jax.lax.conv_general_dilated(
            inputs, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    return patches(inputs, (kernel.shape[0], kernel.shape[1]), stride) @ kernel.reshape(-1, kernel.shape[-1])


def patches(inputs: jax.Array, window: tuple[int, int], stride: int) -> jax.Array:
    """The window around each output position: `[n, h, w, c]` to `[n, h_out, w_out, k_h * k_w * c]`."""
    height, width = inputs.shape[1:3]
    pad_h, out_h = _same_padding(height, window[0], stride)
    pad_w, out_w = _same_padding(width, window[1], stride)
    padded = jnp.pad(inputs, ((0, 0), pad_h, pad_w, (0, 0)))
    shifted = [
        padded[:, i : i + stride * (out_h - 1) + 1 : stride, j : j + stride * (out_w - 1) + 1 : stride]
        for i in range(window[0])
        for j in range(window[1])
    ]
    return jnp.concatenate(shifted, axis=-1)


def _same_padding(size: int, window: int, stride: int) -> tuple[tuple[int, int], int]:
    out = -(-size // stride)
    total = max((out - 1) * stride + window - size, 0)
    return (total // 2, total - total // 2), out


def max_pool(inputs: jax.Array) -> jax.Array:
    """2x2 max pooling with stride 2, edges that do not fill a window dropped.

    Strided slices and selections: on the CPU their gradient is several times faster than that of a windowed
    reduction, of a reshape, or of `jnp.maximum`, which splits ties. Here a tie goes to one winner.

    Args:
      inputs: `[n, height, width, c]`.

    >>> import jax.numpy as jnp
    >>> max_pool(jnp.arange(16.0).reshape([1, 4, 4, 1]))[0, :, :, 0].tolist()
    [[5.0, 7.0], [13.0, 15.0]]
    """
    height, width = (side // 2 * 2 for side in inputs.shape[1:3])

    def larger(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(a >= b, a, b)

    left, right = (
        larger(inputs[:, 0:height:2, column:width:2], inputs[:, 1:height:2, column:width:2]) for column in (0, 1)
    )
    return larger(left, right)
