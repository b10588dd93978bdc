"""The decoder of language models: causal attention in blocks that are scanned."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from metajax.core import _validate
from metajax.core._types import Model
from metajax.models import _wrap
from metajax.models._attention import attend, heads_of
from metajax.models._linear import Linear


class _Block(nnx.Module):
    """RMSNorm and causal attention with rotary positions, RMSNorm and SwiGLU, each added to its input."""

    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int, theta: float, *, rngs: nnx.Rngs):
        size = width // heads
        linear = lambda inputs, outputs: Linear(inputs, outputs, use_bias=False, rngs=rngs)  # noqa: E731
        self.attention_norm, self.mlp_norm = nnx.RMSNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)
        self.query, self.out = linear(width, heads * size), linear(heads * size, width)
        self.key, self.value = linear(width, kv_heads * size), linear(width, kv_heads * size)
        self.gate, self.up, self.down = linear(width, hidden), linear(width, hidden), linear(hidden, width)
        self.size, self.theta = size, theta

    def __call__(self, values: jax.Array, mask: jax.Array | None) -> jax.Array:
        normed = self.attention_norm(values)
        query, key, value = (heads_of(part(normed), self.size) for part in (self.query, self.key, self.value))
        query, key = (rotary(part, self.theta) for part in (query, key))
        values = values + self.out(attend(query, key, value, mask, causal=True))
        normed = self.mlp_norm(values)
        return values + self.down(jax.nn.silu(self.gate(normed)) * self.up(normed))


def rotary(values: jax.Array, theta: float) -> jax.Array:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) of `[n, length, heads, size]`, its halves as two coordinates.

    >>> rotary(jnp.ones([1, 3, 2, 4]), 1e4).shape
    (1, 3, 2, 4)
    """
    half = values.shape[-1] // 2
    rates = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(values.shape[1], dtype=jnp.float32)[:, None, None] * rates
    first, second = values[..., :half], values[..., half:]
    cos, sin = jnp.cos(angles).astype(values.dtype), jnp.sin(angles).astype(values.dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class _Decoder(nnx.Module):
    def __init__(self, vocab: int, depth: int, remat: bool, rngs: nnx.Rngs, **block: Any):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap
        def blocks(rngs: nnx.Rngs) -> _Block:
            return _Block(**block, rngs=rngs)

        width = block["width"]
        self.embed = nnx.Embed(vocab, width, rngs=rngs)
        self.embed.dtype = None  # whichever type the table has in a call, and not the one it is made in
        self.blocks = blocks(rngs)  # every leaf with a leading axis of blocks
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = Linear(width, vocab, use_bias=False, rngs=rngs)
        self.remat = remat

    def __call__(self, inputs: Any) -> jax.Array:
        inputs = inputs if isinstance(inputs, dict) else {"tokens": inputs}
        tokens, mask, prompt = inputs["tokens"], inputs.get("mask"), inputs.get("prompt")
        values = self.embed(tokens)
        if prompt is not None:
            front = jnp.broadcast_to(prompt.astype(values.dtype), (len(tokens), *prompt.shape))
            values = jnp.concatenate([front, values], axis=1)
            if mask is not None:
                mask = jnp.pad(mask, ((0, 0), (len(prompt), 0)), constant_values=True)
        graph, params = nnx.split(self.blocks)

        def block(values: jax.Array, params: Any) -> tuple[jax.Array, None]:
            return nnx.merge(graph, params)(values, mask), None

        values, _ = jax.lax.scan(jax.checkpoint(block) if self.remat else block, values, params)
        if prompt is not None:
            values = values[:, len(prompt) :]
        logits = self.head(self.norm(values))
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))  # for the sums of a softmax


def decoder(
    vocab: int,
    *,
    width: int = 256,
    depth: int = 6,
    heads: int = 8,
    kv_heads: int | None = None,
    hidden: int | None = None,
    theta: float = 1e4,
    remat: bool = True,
    dtype: Any = jnp.float32,
) -> Model:
    """A decoder with RMSNorm, rotary positions, grouped-query attention and SwiGLU, as in Llama.

    The blocks are one scan: the program has the size of one block. With `remat` the backward pass computes each block
    once more, so that the activations of one block are kept and not those of all.

    Args:
      vocab: number of tokens.
      width: of the stream.
      depth: number of blocks.
      heads: of attention; must divide `width` into even parts.
      kv_heads: heads of keys and values, which must divide `heads`; None is as many.
      hidden: of SwiGLU; None is 8/3 of the width, rounded up to a multiple of 32.
      theta: base of the rotary frequencies.
      remat: whether blocks are recomputed in the backward pass.
      dtype: of the parameters, and of the computation; logits are float32 at least. bfloat16 halves a frozen base; what
        takes gradient steps should be float32 (`models.mixed_precision`, or adapters, whose leaves are).

    Returns:
      A `Model` from tokens, int32 `[n, length]` (or `{"tokens": ..., "mask": bool [n, length]}`, as `data.text` gives
      them, where False is padding behind the text), to logits `[n, length, vocab]`. A third entry, `"prompt"`
      `[k, width]`, stands in front of all texts as embeddings do, and gets no logits (see `adapters.prompt`).

    Raises:
      ValueError: a size below 1, heads that do not divide, or a `dtype` that is no floating-point type.

    Source: Touvron et al. 2023, arXiv:2302.13971; Ainslie et al. 2023 (grouped queries), arXiv:2305.13245.

    >>> import jax, jax.numpy as jnp, metajax
    >>> model = metajax.models.decoder(100, width=16, depth=2, heads=4, kv_heads=2)
    >>> tokens = jnp.arange(10).reshape(2, 5)
    >>> model.apply(model.init(jax.random.key(0), tokens), tokens).shape
    (2, 5, 100)
    """
    sizes = {"vocab": vocab, "width": width, "depth": depth, "heads": heads}
    for name, value in {**sizes, "kv_heads": kv_heads or heads, "hidden": hidden or 1}.items():
        _validate.positive_int(name, value)
    if width % (2 * heads):
        raise ValueError(f"heads must divide width, {width}, into even parts, got {heads}")
    if heads % (kv_heads or heads):
        raise ValueError(f"kv_heads must divide heads, {heads}, got {kv_heads}")
    _validate.positive_float("theta", theta)
    hidden = hidden or -(-8 * width // 96) * 32
    block = {"width": width, "heads": heads, "kv_heads": kv_heads or heads, "hidden": hidden, "theta": theta}
    model = _wrap.from_nnx(lambda rngs: _Decoder(vocab, depth, remat, rngs, **block))
    return _wrap.of_dtype(model, dtype)
