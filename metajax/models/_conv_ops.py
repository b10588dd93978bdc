"""Chooses how a convolution is computed, by backend. This is the only place that decides it.

On the CPU, XLA computes two things in a slow loop: the gradient of the gradient of a convolution, and any gradient of a
kernel inside a loop. `_trilinear` has neither problem, in float32. A vmap over kernels becomes a grouped convolution,
which is even slower; a convolution as shifted slices and one matrix product avoids this. Accelerators use
`lax.conv_general_dilated`.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from metajax.core import _validate
from metajax.models import _trilinear

Form = Literal["auto", "lax", "patches", "trilinear"]
FORMS = ("auto", "lax", "patches", "trilinear")


def convolution(inputs: jax.Array, kernel: jax.Array, *, stride: int = 1, form: Form = "auto") -> jax.Array:
    """Computes a 2-D convolution with SAME padding, in a form that is fast under second order on this backend.

    Args:
      inputs: `[n, height, width, c_in]`.
      kernel: `[k_h, k_w, c_in, c_out]`.
      stride: step in both directions.
      form: "lax"; "patches" (shifted slices and a matrix product); "trilinear" (contractions of one trilinear form,
        like all its derivatives); or "auto". On the CPU, "auto" is trilinear for float32 and patches for other types;
        elsewhere it is lax.

    Returns:
      `[n, ceil(height / stride), ceil(width / stride), c_out]`.

    Raises:
      ValueError: the form is unknown, or the stride is below 1.

    >>> import jax.numpy as jnp
    >>> convolution(jnp.ones([1, 4, 4, 1]), jnp.ones([3, 3, 1, 2]), stride=2).shape
    (1, 2, 2, 2)
    """
    _validate.one_of("form", form, FORMS)
    _validate.positive_int("stride", stride)
    if form == "auto":
        form = "lax" if jax.default_backend() != "cpu" else "trilinear" if _is_float32(inputs, kernel) else "patches"
    if form == "lax":
        return jax.lax.conv_general_dilated(
            inputs, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    if form == "trilinear":
        return _trilinear.convolution(inputs, kernel, stride)
    return _trilinear.by_patches(inputs, kernel, stride)


def _is_float32(*arrays: jax.Array) -> bool:
    """Whether all arrays are float32, the only type for which XLA has a fast convolution on the CPU."""
    return all(array.dtype == jnp.float32 for array in arrays)


def max_pool(inputs: jax.Array) -> jax.Array:
    """Applies 2x2 max pooling with stride 2; edges that do not fill a window are dropped.

    It uses strided slices and selections. On the CPU their gradient is several times faster than that of a windowed
    reduction, of a reshape, or of `jnp.maximum`, which splits ties. Here a tie has one winner.

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
