"""The encoder of the BERT family: bidirectional attention in scanned blocks."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from metajax.core import _losses, _validate
from metajax.core._types import Dtype, Model
from metajax.models import _wrap
from metajax.models._attention import attend, heads_of
from metajax.models._blocks import Remat, check_remat, gelu, layer_norm, scanned, stacked, with_prompt
from metajax.models._linear import Linear

Head = Literal["mean", "cls", "tokens", "span"]
HEADS = ("mean", "cls", "tokens", "span")


class _Block(nnx.Module):
    """Attention and a hidden layer with GELU; each is added to its input and then normalised."""

    def __init__(self, width: int, heads: int, hidden: int, epsilon: float, *, rngs: nnx.Rngs):
        self.query, self.key, self.value, self.out = (Linear(width, width, rngs=rngs) for _ in range(4))
        self.up, self.down = Linear(width, hidden, rngs=rngs), Linear(hidden, width, rngs=rngs)
        self.attention_norm, self.mlp_norm = layer_norm(width, epsilon, rngs), layer_norm(width, epsilon, rngs)
        self.size = width // heads

    def __call__(self, values: jax.Array, mask: jax.Array | None) -> jax.Array:
        query, key, value = (heads_of(part(values), self.size) for part in (self.query, self.key, self.value))
        values = self.attention_norm(values + self.out(attend(query, key, value, mask)))
        return self.mlp_norm(values + self.down(gelu(self.up(values))))


class _Encoder(nnx.Module):
    def __init__(
        self, vocab: int, depth: int, positions: int, first_position: int, types: int, head: Head,
        outputs: int | None, remat: Remat, rngs: nnx.Rngs, **block: Any,
    ):  # fmt: skip
        width = block["width"]
        self.embed, self.position = nnx.Embed(vocab, width, rngs=rngs), nnx.Embed(positions, width, rngs=rngs)
        self.type = nnx.Embed(types, width, rngs=rngs) if types else None
        for table in filter(None, (self.embed, self.position, self.type)):
            table.dtype = None  # use the type of the table in each call, not the type at creation
        self.embed_norm = layer_norm(width, block["epsilon"], rngs)
        self.blocks = stacked(functools.partial(_Block, **block), depth, rngs)
        outputs = 2 if head == "span" else outputs
        self.head = None if outputs is None else Linear(width, outputs, rngs=rngs)
        self.pooling, self.first_position, self.remat = head, first_position, remat

    def __call__(self, inputs: Any) -> jax.Array:
        inputs = inputs if isinstance(inputs, dict) else {"tokens": inputs}
        tokens, mask, prompt = inputs["tokens"], inputs.get("mask"), inputs.get("prompt")
        length, first = tokens.shape[1], self.first_position
        if length > self.position.num_embeddings - first:
            raise ValueError(
                f"tokens must be at most {self.position.num_embeddings - first} in a text, which the table of "
                f"positions holds, got {length}"
            )
        # tokens in padding are never looked up: they may be outside the vocabulary
        kept = tokens if mask is None else jnp.where(mask, tokens, 0)
        values = self.embed(kept) + self.position(jnp.arange(first, first + length))
        if self.type is not None:
            values = values + self.type(inputs.get("types", jnp.zeros_like(tokens)))
        values, mask = with_prompt(self.embed_norm(values), mask, prompt)

        def call(block: _Block, values: jax.Array, mask: jax.Array | None, _: None) -> tuple[jax.Array, None]:
            return block(values, mask), None

        values, _ = scanned(self.blocks, values, call, remat=self.remat, beside=mask)
        if prompt is not None:
            values = values[:, len(prompt) :]
        values = values.astype(jnp.promote_types(values.dtype, jnp.float32))  # for sums in means and softmaxes
        if self.pooling == "cls":
            values = values[:, 0]
        elif self.pooling == "mean":
            values = _mean(values, inputs.get("mask"))
        outputs = values if self.head is None else self.head(values)
        if self.pooling == "span" and "mask" in inputs:
            outputs = jnp.where(
                inputs.get("context", inputs["mask"])[..., None], outputs, _losses.absent_logit(outputs.dtype)
            )
        return outputs


def _mean(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Computes means `[n, width]` over the tokens that are not padding; 0 for a text that is all padding."""
    if mask is None:
        return values.mean(axis=1)
    weights = mask[..., None].astype(values.dtype)
    return (values * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)


def encoder(
    vocab: int,
    outputs: int | None = None,
    *,
    width: int = 384,
    depth: int = 6,
    heads: int = 12,
    hidden: int | None = None,
    positions: int = 512,
    first_position: int = 0,
    types: int = 2,
    norm_epsilon: float = 1e-12,
    head: Head = "mean",
    remat: Remat = True,
    dtype: Dtype = jnp.float32,
) -> Model:
    """A text encoder like BERT, DistilBERT, MiniLM, multilingual E5 and XLM-R.

    The blocks are one scan, so the program has the size of one block. With `remat`, the backward pass recomputes each
    block, so that memory holds the activations of one block and not of all.

    Args:
      vocab: number of tokens.
      outputs: outputs of a linear layer on top, the leaf group `head`; None adds no such layer.
      width: width of the residual stream.
      depth: number of blocks.
      heads: attention heads; must divide `width`.
      hidden: units of the hidden layer of a block; None means 4 times the width.
      positions: rows of the position table.
      first_position: row of the first token of a text; 0 in BERT, 2 in XLM-R.
      types: rows of the token type table; 0 means no such table, as in DistilBERT.
      norm_epsilon: epsilon of the layer normalisations.
      head: the output for a text: "mean" of its tokens `[n, width]`, its first token, "cls", `[n, width]`, or all
        "tokens" `[n, length, width]`, each through the linear layer if there is one; or "span", the scores of first and
        last tokens of an answer `[n, length, 2]`, which are large and negative at padding and at tokens that
        `"context"` excludes.
      remat: whether the backward pass recomputes blocks; "example" does so for one text at a time. Texts then go
        through a block one after the other, also in the forward pass. This takes even less memory, and more time if
        the texts are short.
      dtype: type of the parameters and of the computation in the blocks; outputs are at least float32.

    Returns:
      A `Model` from `{"tokens": int32 [n, length], "mask": bool [n, length]}`, as `data.text` gives them, or tokens
      alone. Optional entries: `"types"` int32 `[n, length]`, 0 by default; `"context"` bool `[n, length]`; `"prompt"`
      `[k, width]`, which is added after the normalisation of the embedded tokens, before all texts.

    Raises:
      ValueError: a size is below 1, heads do not divide, the head is unknown, `outputs` of a span head is neither
        None nor 2, or (in a call) a text has more tokens than there are positions.

    Source: Devlin et al. 2019, arXiv:1810.04805; Conneau et al. 2020 (XLM-R), arXiv:1911.02116; Sanh et al. 2019
    (DistilBERT), arXiv:1910.01108.

    >>> import jax, jax.numpy as jnp, metajax
    >>> model = metajax.models.encoder(100, width=16, depth=2, heads=4)
    >>> inputs = {"tokens": jnp.arange(10).reshape(2, 5), "mask": jnp.ones([2, 5], bool)}
    >>> params = jax.jit(model.init)(jax.random.key(0), inputs)
    >>> jax.jit(model.apply)(params, inputs).shape
    (2, 16)
    """
    sizes = {"vocab": vocab, "width": width, "depth": depth, "heads": heads, "positions": positions}
    for name, value in {**sizes, "outputs": outputs or 1, "hidden": hidden or 1}.items():
        _validate.positive_int(name, value)
    _validate.int_at_least("types", types, 0)
    _validate.int_at_least("first_position", first_position, 0)
    _validate.positive_float("norm_epsilon", norm_epsilon)
    _validate.one_of("head", head, HEADS)
    check_remat(remat)
    if head == "span" and outputs not in (None, 2):
        raise ValueError(f"outputs must be None or 2 for a span head, got {outputs}")
    if width % heads:
        raise ValueError(f"heads must divide width, {width}, got {heads}")
    if first_position >= positions:
        raise ValueError(f"first_position must be below positions, {positions}, got {first_position}")
    block = {"width": width, "heads": heads, "hidden": hidden or 4 * width, "epsilon": norm_epsilon}
    return _wrap.of_dtype(
        _wrap.from_nnx(
            lambda rngs: _Encoder(vocab, depth, positions, first_position, types, head, outputs, remat, rngs, **block)
        ),
        dtype,
    )
