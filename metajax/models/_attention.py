"""Attention shared by all transformers of this package."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def heads_of(values: jax.Array, size: int) -> jax.Array:
    """Reshapes `[n, length, heads * size]` to `[n, length, heads, size]`.

    >>> heads_of(jnp.ones([2, 5, 32]), 8).shape
    (2, 5, 4, 8)
    """
    return values.reshape(*values.shape[:-1], values.shape[-1] // size, size)  # works for n = 0, where -1 is unknown


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None, *, causal: bool = False
) -> jax.Array:
    """Computes scaled dot-product attention with `jax.nn.dot_product_attention`.

    Args:
      query: `[n, length, heads, size]`.
      key: `[n, more + length, kv_heads, size]`; the `more` positions in front, such as a learned prefix, are visible to
        every query. `kv_heads` divides `heads`.
      value: the same shape as `key`.
      mask: `[n, length]` bool, False for padding, which no query sees; None means no padding. A longer mask also covers
        the last of the positions in front.
      causal: whether a query sees only itself and earlier positions.

    Returns:
      `[n, length, heads * size]`.

    >>> attend(jnp.ones([2, 5, 4, 8]), jnp.ones([2, 5, 2, 8]), jnp.ones([2, 5, 2, 8]), causal=True).shape
    (2, 5, 32)
    """
    length, more = query.shape[1], key.shape[1] - query.shape[1]
    seen = None
    if mask is not None:
        front = key.shape[1] - mask.shape[1]
        seen = jnp.pad(mask, ((0, 0), (front, 0)), constant_values=True)[:, None, None, :]
    if causal and more:
        before = jnp.tri(length, more + length, more, dtype=bool)
        seen = before if seen is None else seen & before
        causal = False
    mixed = jax.nn.dot_product_attention(query, key, value, mask=seen, is_causal=causal)
    return mixed.reshape(*mixed.shape[:2], mixed.shape[2] * mixed.shape[3])
