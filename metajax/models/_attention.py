"""Attention of all transformers here."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def heads_of(values: jax.Array, size: int) -> jax.Array:
    """`[n, length, heads * size]` as `[n, length, heads, size]`.

    >>> heads_of(jnp.ones([2, 5, 32]), 8).shape
    (2, 5, 4, 8)
    """
    return values.reshape(*values.shape[:-1], values.shape[-1] // size, size)  # also of no texts, where -1 is unknown


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None, *, causal: bool = False
) -> jax.Array:
    """Scaled dot-product attention, through `jax.nn.dot_product_attention`.

    Args:
      query: `[n, length, heads, size]`.
      key: `[n, more + length, kv_heads, size]`, where `more` positions stand in front that every query sees, such as
        a learned prefix; `kv_heads` divides `heads`.
      value: as `key`.
      mask: `[n, length]` bool, False for padding, which no query sees; None sees all. A longer one is of the last of
        the positions in front too.
      causal: whether a query sees what stands before it alone, and itself.

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
