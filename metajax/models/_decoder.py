"""The decoder of language models: causal attention in scanned blocks."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from metajax.core import _validate
from metajax.core._types import Dtype, Model
from metajax.models import _wrap
from metajax.models._attention import attend, heads_of
from metajax.models._blocks import Remat, check_remat, scanned, stacked, with_prompt
from metajax.models._linear import Linear
from metajax.models._rotary import Rotary, rotary

Outputs = int | Literal["tokens", "features"]


class _Block(nnx.Module):
    """RMSNorm and causal attention with rotary positions, then RMSNorm and SwiGLU; each adds to its input."""

    def __init__(
        self, width: int, heads: int, kv_heads: int, size: int, hidden: int, turn: Rotary, epsilon: float, bias: bool,
        qk_norm: bool, *, rngs: nnx.Rngs,
    ):  # fmt: skip
        linear = lambda inputs, outputs, bias=False: Linear(inputs, outputs, use_bias=bias, rngs=rngs)  # noqa: E731
        self.attention_norm, self.mlp_norm = (nnx.RMSNorm(width, epsilon=epsilon, rngs=rngs) for _ in range(2))
        self.query, self.out = linear(width, heads * size, bias), linear(heads * size, width)
        self.key, self.value = linear(width, kv_heads * size, bias), linear(width, kv_heads * size, bias)
        self.gate, self.up, self.down = linear(width, hidden), linear(width, hidden), linear(hidden, width)
        if qk_norm:
            self.query_norm, self.key_norm = (nnx.RMSNorm(size, epsilon=epsilon, rngs=rngs) for _ in range(2))
        self.size, self.turn, self.qk_norm = size, turn, qk_norm

    def __call__(
        self, values: jax.Array, positions: jax.Array, mask: jax.Array | None, before: dict[str, jax.Array] | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Args: mask: of the keys, including those in `before`, which are `[n or 1, ..., kv_heads, size]`."""
        normed = self.attention_norm(values)
        query, key, value = (heads_of(part(normed), self.size) for part in (self.query, self.key, self.value))
        own = slice(key.shape[1] - query.shape[1], None)  # keys before these are a learned prefix without positions
        new = {"key": key[:, own], "value": value[:, own]}
        if self.qk_norm:
            query, new["key"] = self.query_norm(query), self.key_norm(new["key"])
        query, new["key"] = self.turn(query, positions), self.turn(new["key"], positions)
        seen = new if before is None else {name: after(before[name], new[name]) for name in new}
        if own.start:
            front = {"key": key[:, : own.start], "value": value[:, : own.start]}
            seen = {name: after(front[name], seen[name]) for name in seen}
        values = values + self.out(attend(query, seen["key"], seen["value"], mask, causal=True))
        normed = self.mlp_norm(values)
        return values + self.down(jax.nn.silu(self.gate(normed)) * self.up(normed)), new


def after(old: jax.Array, new: jax.Array) -> jax.Array:
    """Appends `new` `[n, length, ...]` to `old` `[n or 1, more, ...]`.

    >>> after(jnp.zeros([1, 3]), jnp.zeros([2, 5])).shape
    (2, 8)
    """
    old = jnp.broadcast_to(old, (new.shape[0], *old.shape[1:]))
    return jnp.concatenate([old.astype(new.dtype), new], axis=1)


def last_kept(mask: jax.Array) -> jax.Array:
    """Returns the place of the last True in each row of `[n, length]`; `length - 1` if there is none.

    >>> last_kept(jnp.array([[True, True, False], [False, True, True]])).tolist()
    [1, 2]
    """
    return mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)


class _Decoder(nnx.Module):
    def __init__(
        self, vocab: int, depth: int, outputs: Outputs, tied: bool, positions: int | None, remat: Remat,
        rngs: nnx.Rngs, **block: Any,
    ):  # fmt: skip
        width = block["width"]
        self.embed = nnx.Embed(vocab, width, rngs=rngs)
        self.embed.dtype = None  # use the type of the table in each call, not the type at creation
        self.blocks = stacked(functools.partial(_Block, **block), depth, rngs)
        self.norm = nnx.RMSNorm(width, epsilon=block["epsilon"], rngs=rngs)
        if outputs == "tokens" and not tied:
            self.head = Linear(width, vocab, use_bias=False, rngs=rngs)
        elif isinstance(outputs, int):
            self.head = Linear(width, outputs, use_bias=False, rngs=rngs)
        self.outputs, self.positions, self.remat = outputs, positions, remat

    def __call__(self, inputs: Any) -> Any:
        inputs = inputs if isinstance(inputs, dict) else {"tokens": inputs}
        tokens, mask, cache, read = (inputs.get(name) for name in ("tokens", "mask", "cache", "read"))
        length = tokens.shape[1] + (cache["mask"].shape[1] if cache else 0)
        if self.positions is not None and length > self.positions:
            raise ValueError(f"tokens must be at most {self.positions} in a text, a cache included, got {length}")
        # tokens in padding are never looked up: they may be outside the vocabulary
        values = self.embed(tokens if mask is None else jnp.where(mask, tokens, 0))
        prompt = None if cache else inputs.get("prompt")  # the cache already holds it
        values, mask = with_prompt(values, mask, prompt)
        # padding takes no position, wherever it is
        positions = jnp.arange(values.shape[1]) if mask is None else jnp.cumsum(mask, axis=1) - 1
        own = jnp.ones(values.shape[:2], bool) if mask is None else mask
        if cache:
            positions = positions + jnp.sum(cache["mask"], axis=1)[:, None]
            mask = after(cache["mask"], own)
        before = {name: cache[name] for name in ("key", "value")} if cache else None

        def call(block: _Block, values: jax.Array, beside: Any, before: Any) -> tuple[jax.Array, Any]:
            positions, mask = beside
            values, new = block(values, positions, mask, before)
            return values, None if cache is None else new

        remat = self.remat if cache is None else bool(self.remat)  # examples may share the entries of a cache
        if remat == "example":
            positions = jnp.broadcast_to(positions, values.shape[:2])
        values, new = scanned(self.blocks, values, call, remat=remat, beside=(positions, mask), each=before)
        if self.outputs != "tokens":
            read = last_kept(own)[:, None]
        elif prompt is not None:
            values = values[:, len(prompt) :]
        if read is not None:
            values = jnp.take_along_axis(values, read[..., None], axis=1)
        outputs = self._head(self.norm(values))
        outputs = outputs if self.outputs == "tokens" else outputs[:, 0]
        return outputs if cache is None else (outputs, {**new, "mask": own})

    def _head(self, values: jax.Array) -> jax.Array:
        if hasattr(self, "head"):
            values = self.head(values)
        elif self.outputs == "tokens":
            values = values @ self.embed.embedding.get_value().T
        return values.astype(jnp.promote_types(values.dtype, jnp.float32))  # for sums in a softmax or a distance


def decoder(
    vocab: int,
    *,
    width: int = 256,
    depth: int = 6,
    heads: int = 8,
    kv_heads: int | None = None,
    head_size: int | None = None,
    hidden: int | None = None,
    theta: float = 1e4,
    rope_scaling: Mapping[str, Any] | None = None,
    positions: int | None = None,
    norm_epsilon: float = 1e-6,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    tied: bool = False,
    outputs: Outputs = "tokens",
    remat: Remat = True,
    dtype: Dtype = jnp.float32,
) -> Model:
    """A decoder with RMSNorm, rotary positions, grouped-query attention and SwiGLU, as in Llama, Mistral and Qwen.

    The blocks are one scan, so the program has the size of one block. With `remat`, the backward pass recomputes each
    block, so that memory holds the activations of one block and not of all.

    The model takes tokens, int32 `[n, length]`, or a dict of

    - `"tokens"`: int32 `[n, length]`.
    - `"mask"`: bool `[n, length]`, as `data.text` gives it. False is padding, anywhere in the text: no token sees it,
      and it takes no position.
    - `"prompt"`: `[k, width]`, embeddings that come before all texts and get no outputs (see `adapters.prompt`).
    - `"read"`: int32 `[n, k]`, the places in a text that get logits, instead of all: logits `[n, k, vocab]`.
    - `"cache"`: what the texts continue: `{}` for nothing, or `{"key", "value"}` `[depth, n or 1, more, kv_heads,
      head_size]` and `"mask"` `[n or 1, more]`. The model then returns `(outputs, cache)`. The returned cache has the
      same entries for the new tokens alone (and for the prompt, in the first call); the caller appends it to the old
      one.

    Args:
      vocab: number of tokens.
      width: width of the residual stream.
      depth: number of blocks.
      heads: attention heads; must divide `width` into even parts if `head_size` is None.
      kv_heads: heads of keys and values, which must divide `heads`; None means `heads`.
      head_size: size of an attention head, even; None means `width / heads`.
      hidden: hidden units of SwiGLU; None means 8/3 of the width, rounded up to a multiple of 32.
      theta: base of the rotary frequencies.
      rope_scaling: how the frequencies were stretched for longer texts, in the format of Hugging Face:
        `{"rope_type": "linear", "factor": 4.0}`, or "llama3", which also takes `low_freq_factor`, `high_freq_factor`
        and `original_max_position_embeddings`, as in Llama 3.1; None means no scaling.
      positions: maximum number of tokens of a text, cached tokens and padding included; None sets no limit.
      norm_epsilon: value that RMSNorm adds to the mean square.
      qkv_bias: whether queries, keys and values have a bias, as in Qwen2.
      qk_norm: whether RMSNorm normalises the queries and keys of each head before the rotation, as in Qwen3.
      tied: whether the embedding table also gives the token logits, instead of a head.
      outputs: "tokens" returns the next-token logits at each place. A number of classes returns class logits, from a
        head without bias on the last token of a text that is not padding. "features" returns the normalised state of
        that token.
      remat: whether the backward pass recomputes blocks; "example" does so for one text at a time (without a cache).
        Texts then go through a block one after the other, also in the forward pass. This takes even less memory, and
        more time if the texts are short.
      dtype: type of the parameters and of the computation; outputs are at least float32. bfloat16 halves the memory of
        a frozen base; parameters that take gradient steps should be float32 (`models.mixed_precision`, or adapters,
        whose leaves are float32).

    Returns:
      A `Model` from tokens to logits `[n, length, vocab]`, logits `[n, outputs]` or features `[n, width]`.

    Raises:
      ValueError: a size is below 1, heads do not divide, the scaling or `outputs` is unknown, `dtype` is not a
        floating-point type, or (in a call) a text has more tokens than `positions`.

    Source: Touvron et al. 2023, arXiv:2302.13971; Qwen2, Yang et al. 2024, arXiv:2407.10671; Qwen3, Yang et al. 2025,
    arXiv:2505.09388; Ainslie et al. 2023 (grouped queries), arXiv:2305.13245; Press and Wolf 2017 (tied embeddings),
    arXiv:1608.05859.

    >>> import jax, jax.numpy as jnp, metajax
    >>> tokens = jnp.arange(10).reshape(2, 5)
    >>> for outputs in ("tokens", "features", 3):
    ...     model = metajax.models.decoder(100, width=16, depth=2, heads=4, kv_heads=2, outputs=outputs)
    ...     params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    ...     jax.eval_shape(model.apply, params, tokens).shape
    (2, 5, 100)
    (2, 16)
    (2, 3)
    """
    sizes = {"vocab": vocab, "width": width, "depth": depth, "heads": heads}
    given = {"kv_heads": kv_heads, "hidden": hidden, "positions": positions}
    sizes |= {name: size for name, size in given.items() if size is not None}
    for name, value in sizes.items():
        _validate.positive_int(name, value)
    kv_heads = heads if kv_heads is None else kv_heads
    hidden = -(-8 * width // 96) * 32 if hidden is None else hidden
    for name, flag in {"qkv_bias": qkv_bias, "qk_norm": qk_norm, "tied": tied}.items():
        _validate.instance(name, flag, bool)
    if head_size is None and width % (2 * heads):
        raise ValueError(f"heads must divide width, {width}, into even parts, got {heads}")
    size = _validate.positive_int("head_size", width // heads if head_size is None else head_size)
    if size % 2:
        raise ValueError(f"head_size must be even, got {head_size}")
    if heads % kv_heads:
        raise ValueError(f"kv_heads must divide heads, {heads}, got {kv_heads}")
    check_remat(remat)
    _validate.positive_float("norm_epsilon", norm_epsilon)
    classes = isinstance(outputs, int) and not isinstance(outputs, bool) and outputs > 0
    if not classes and outputs not in ("tokens", "features"):
        raise ValueError(f"outputs must be 'tokens', 'features' or a number of classes, got {outputs!r}")
    block = {
        "width": width, "heads": heads, "kv_heads": kv_heads, "size": size,
        "hidden": hidden, "turn": rotary(theta, rope_scaling), "epsilon": norm_epsilon, "bias": qkv_bias,
        "qk_norm": qk_norm,
    }  # fmt: skip
    model = _wrap.from_nnx(lambda rngs: _Decoder(vocab, depth, outputs, tied, positions, remat, rngs, **block))
    return _wrap.of_dtype(model, dtype)
