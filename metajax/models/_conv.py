"""The convolutional network of the few-shot literature."""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import nnx

from metajax.core import _validate
from metajax.core._types import Model
from metajax.models import _conv_ops, _norm, _wrap


class Block(nnx.Module):
    """3x3 convolution without bias, normalisation, ReLU, and halving by max pool or by stride."""

    def __init__(self, channels: int, width: int, *, pool: bool, policy: _norm.Policy, form: Any, rngs: nnx.Rngs):
        initializer = nnx.initializers.glorot_uniform()
        self.kernel = nnx.Param(initializer(rngs.params(), (3, 3, channels, width)))
        self.norm = _norm.Norm(width, policy)
        self.pool, self.form = pool, form

    def __call__(self, inputs: jax.Array, mask: Any, stats: Any) -> tuple[jax.Array, Any]:
        stride = 1 if self.pool else 2
        outputs = _conv_ops.convolution(inputs, self.kernel[...], stride=stride, form=self.form)
        outputs, stats = self.norm(outputs, mask, stats)
        # ReLU and max commute, and ReLU is cheaper on the smaller array
        return jax.nn.relu(_conv_ops.max_pool(outputs) if self.pool else outputs), stats


def halved(length: int, *, pool: bool) -> int:
    """Returns the output height or width of a `Block`; pooling drops an odd last row, a stride does not."""
    return length // 2 if pool else -(-length // 2)


class _ConvNet(nnx.Module):
    def __init__(
        self, shape: tuple[int, ...], outputs: int | None, width: int, depth: int, *, pool: bool,
        policy: _norm.Policy, form: Any, rngs: nnx.Rngs,
    ):  # fmt: skip
        height, breadth, channels = _wrap.image_shape(shape)
        self.stats_wanted = policy == "support"
        self.depth = depth
        for index in range(depth):
            block = Block(channels, width, pool=pool, policy=policy, form=form, rngs=rngs)
            setattr(self, f"block_{index}", block)
            channels = width
            height, breadth = halved(height, pool=pool), halved(breadth, pool=pool)
        if not height * breadth:
            raise ValueError(f"inputs must be at least {2**depth} pixels high and wide under max pooling, got {shape}")
        head = None if outputs is None else nnx.Linear(height * breadth * width, outputs, rngs=rngs)
        self.head = nnx.data(head)

    def __call__(self, inputs: jax.Array, mask: Any = None, stats: Any = None) -> Any:
        blocks = (getattr(self, f"block_{index}") for index in range(self.depth))
        values, found = _norm.through(blocks, inputs, mask, stats)
        features = values.reshape(values.shape[0], math.prod(values.shape[1:]))  # works for n = 0
        outputs = features if self.head is None else self.head(features)
        return (outputs, found) if self.stats_wanted else outputs


def conv4(
    outputs: int | None = None,
    *,
    width: int = 64,
    depth: int = 4,
    pool: bool = True,
    normalisation: _norm.Policy = "batch",
    form: _conv_ops.Form = "auto",
) -> Model:
    """Conv4 (Vinyals et al. 2016): blocks of 3x3 convolution, normalisation, ReLU and halving.

    Args:
      outputs: number of outputs of a linear head; None returns the flat features.
      width: channels of each block (64; 32 in MAML's MiniImageNet network).
      depth: number of blocks.
      pool: whether to halve by 2x2 max pooling; False halves by stride 2, which is several times cheaper.
      normalisation: "batch" (transductive), "support", "layer", "group" or "none"; see `metajax.models`.
      form: how convolutions are computed; "auto" chooses by backend.

    Returns:
      A `Model` from images `[n, height, width, channels]` (any size and number of channels; unsigned 8-bit images
      are scaled to [0, 1]) to `[n, outputs]` or features `[n, d]`.

    Raises:
      ValueError: an argument is out of range, or (at trace time) an image is too small for `depth` poolings.

    Sources: Vinyals et al. 2016, arXiv:1606.04080; the strided form: Finn et al. 2017, arXiv:1703.03400.

    >>> import jax, jax.numpy as jnp, metajax
    >>> model = metajax.models.conv4(outputs=5, width=8)
    >>> params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones([2, 28, 28, 1]))
    >>> sorted(params), jax.eval_shape(model.apply, params, jnp.ones([2, 28, 28, 1]), mask=None).shape
    (['block_0', 'block_1', 'block_2', 'block_3', 'head'], (2, 5))
    """
    if outputs is not None:
        _validate.positive_int("outputs", outputs)
    _validate.positive_int("width", width)
    _validate.positive_int("depth", depth)
    _validate.one_of("normalisation", normalisation, _norm.POLICIES)
    _validate.one_of("form", form, _conv_ops.FORMS)

    def module(shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Module:
        return _ConvNet(shape, outputs, width, depth, pool=pool, policy=normalisation, form=form, rngs=rngs)

    return _wrap.from_shape(module, needs=_norm.needs(normalisation))
