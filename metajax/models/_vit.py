"""The Vision Transformer: attention among the patches of an image, in scanned blocks."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from metajax.core import _validate
from metajax.core._types import Dtype, Model
from metajax.models import _wrap
from metajax.models._attention import attend, heads_of
from metajax.models._blocks import Remat, check_remat, gelu, layer_norm, scanned, stacked
from metajax.models._linear import Linear

Pooling = Literal["cls", "mean"]
POOLINGS = ("cls", "mean")


class _Block(nnx.Module):
    """Attention and a hidden layer with GELU; each reads normalised values and adds to its input."""

    def __init__(self, width: int, heads: int, hidden: int, epsilon: float, *, rngs: nnx.Rngs):
        self.attention_norm, self.mlp_norm = layer_norm(width, epsilon, rngs), layer_norm(width, epsilon, rngs)
        self.query, self.key, self.value, self.out = (Linear(width, width, rngs=rngs) for _ in range(4))
        self.up, self.down = Linear(width, hidden, rngs=rngs), Linear(hidden, width, rngs=rngs)
        self.size = width // heads

    def __call__(self, values: jax.Array) -> jax.Array:
        normed = self.attention_norm(values)
        query, key, value = (heads_of(part(normed), self.size) for part in (self.query, self.key, self.value))
        values = values + self.out(attend(query, key, value))
        return values + self.down(gelu(self.up(self.mlp_norm(values))))


class _ViT(nnx.Module):
    def __init__(
        self, shape: tuple[int, ...], outputs: int | None, patch: int, depth: int, pooling: Pooling, remat: Remat,
        rngs: nnx.Rngs, **block: Any,
    ):  # fmt: skip
        height, breadth, channels = _wrap.image_shape(shape)
        if not height * breadth or height % patch or breadth % patch:
            raise ValueError(f"patch must divide the height and the width of the images, {shape}, got {patch}")

        width, patches = block["width"], height // patch * (breadth // patch)
        self.embed = Linear(patch * patch * channels, width, rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros([width]))
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), [1 + patches, width]))
        self.blocks = stacked(functools.partial(_Block, **block), depth, rngs)
        self.norm = layer_norm(width, block["epsilon"], rngs)
        self.head = nnx.data(None if outputs is None else Linear(width, outputs, rngs=rngs))
        self.patch, self.patches, self.pooling, self.remat = patch, patches, pooling, remat

    def __call__(self, inputs: jax.Array) -> jax.Array:
        position, token = self.position.get_value(), self.class_token.get_value()
        if len(position) != 1 + self.patches:
            raise ValueError(
                f"inputs must be images of {len(position) - 1} patches, for which the parameters have positions, got "
                f"{self.patches} patches of {self.patch} by {self.patch} pixels in {inputs.shape[1:]}"
            )
        values = self.embed(unfold(inputs, self.patch).astype(position.dtype))  # the parameters decide the type
        token = jnp.broadcast_to(token.astype(values.dtype), (len(values), 1, len(token)))
        values = jnp.concatenate([token, values], axis=1) + position

        def call(block: _Block, values: jax.Array, *_: None) -> tuple[jax.Array, None]:
            return block(values), None

        values, _ = scanned(self.blocks, values, call, remat=self.remat)
        values = self.norm(values[:, :1] if self.pooling == "cls" else values[:, 1:])
        values = values.astype(jnp.promote_types(values.dtype, jnp.float32))  # for sums in means and softmaxes
        features = values.mean(axis=1)
        return features if self.head is None else self.head(features)


def unfold(images: jax.Array, patch: int) -> jax.Array:
    """Cuts images `[n, height, width, c]` into patches `[n, patches, patch * patch * c]`, both in row-major order.

    >>> unfold(jnp.arange(16).reshape(1, 4, 4, 1), 2)[0, :2].tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    count, height, width, channels = images.shape
    rows, columns = height // patch, width // patch
    grid = images.reshape(count, rows, patch, columns, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(count, rows * columns, patch * patch * channels)


def vit(
    outputs: int | None = None,
    *,
    patch: int = 16,
    width: int = 384,
    depth: int = 12,
    heads: int = 6,
    hidden: int | None = None,
    norm_epsilon: float = 1e-6,
    pooling: Pooling = "cls",
    remat: Remat = True,
    dtype: Dtype = jnp.float32,
) -> Model:
    """The Vision Transformer (Dosovitskiy et al. 2021); the default sizes are those of ViT-S/16.

    The blocks are one scan, so the program has the size of one block. With `remat`, the backward pass recomputes each
    block, so that memory holds the activations of one block and not of all. Adapters edit the kernels `query`, `key`,
    `value`, `out`, `up` and `down` of the blocks, `embed` of the patches, and `head`.

    Args:
      outputs: number of outputs of a linear head; None returns the features.
      patch: side of a patch in pixels; must divide both sides of the images.
      width: width of the residual stream.
      depth: number of blocks.
      heads: attention heads; must divide `width`.
      hidden: units of the hidden layer of a block; None means 4 times the width.
      norm_epsilon: epsilon of the layer normalisations; 1e-12 in Hugging Face's `ViTModel`.
      pooling: which features to return: "cls", the normalised state of the class token, or "mean", the mean of the
        normalised states of the patches.
      remat: whether the backward pass recomputes blocks; "example" does so for one image at a time. Images then go
        through a block one after the other, also in the forward pass. This takes even less memory, and more time if
        the images are small.
      dtype: type of the parameters and of the computation in the blocks; outputs are at least float32.

    Returns:
      A `Model` from images `[n, height, width, channels]` (unsigned 8-bit images are scaled to [0, 1]) to
      `[n, outputs]` or features `[n, width]`. The images given to `init` determine the number of positions.

    Raises:
      ValueError: a size is below 1, heads do not divide, the pooling is unknown, `dtype` is not a floating-point type,
        or (at trace time) inputs are not images, the patch does not divide them, or they have another number of patches
        than the parameters have positions.

    Source: Dosovitskiy et al. 2021, arXiv:2010.11929.

    >>> import jax, jax.numpy as jnp, metajax
    >>> model = metajax.models.vit(outputs=5, patch=7, width=16, depth=2, heads=4)
    >>> params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones([2, 28, 28, 1]))
    >>> params["position"].shape, jax.eval_shape(model.apply, params, jnp.ones([2, 28, 28, 1])).shape
    ((17, 16), (2, 5))
    """
    sizes = {"patch": patch, "width": width, "depth": depth, "heads": heads, "outputs": outputs, "hidden": hidden}
    for name, value in sizes.items():
        if value is not None or name not in ("outputs", "hidden"):
            _validate.positive_int(name, value)
    if width % heads:
        raise ValueError(f"heads must divide width, {width}, got {heads}")
    _validate.positive_float("norm_epsilon", norm_epsilon)
    check_remat(remat)
    _validate.one_of("pooling", pooling, POOLINGS)
    block = {"width": width, "heads": heads, "hidden": hidden or 4 * width, "epsilon": norm_epsilon}

    def module(shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Module:
        return _ViT(shape, outputs, patch, depth, pooling, remat, rngs, **block)

    return _wrap.of_dtype(_wrap.from_shape(module), dtype)
