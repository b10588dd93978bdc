"""The residual network of the few-shot literature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from metajax.core import _validate
from metajax.core._types import Model
from metajax.models import _conv_ops, _norm, _wrap
from metajax.models._linear import Linear

_SLOPE = 0.1


class _Convolution(nnx.Module):
    """A convolution without bias, followed by normalisation."""

    def __init__(self, window: int, channels: int, width: int, *, policy: _norm.Policy, form: Any, rngs: nnx.Rngs):
        initializer = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
        self.kernel = nnx.Param(initializer(rngs.params(), (window, window, channels, width)))
        self.norm = _norm.Norm(width, policy)
        self.form = form

    def __call__(self, inputs: jax.Array, mask: Any, stats: Any) -> tuple[jax.Array, Any]:
        return self.norm(_conv_ops.convolution(inputs, self.kernel[...], form=self.form), mask, stats)


class _Block(nnx.Module):
    """Three 3x3 convolutions with a 1x1 shortcut, leaky ReLU, and halving by max pool."""

    def __init__(self, channels: int, width: int, **options: Any):
        self.conv_0 = _Convolution(3, channels, width, **options)
        self.conv_1 = _Convolution(3, width, width, **options)
        self.conv_2 = _Convolution(3, width, width, **options)
        self.shortcut = _Convolution(1, channels, width, **options)

    def __call__(self, inputs: jax.Array, mask: Any, stats: Any) -> tuple[jax.Array, Any]:
        stats = (None,) * 4 if stats is None else stats
        values, used_0 = self.conv_0(inputs, mask, stats[0])
        values, used_1 = self.conv_1(jax.nn.leaky_relu(values, _SLOPE), mask, stats[1])
        values, used_2 = self.conv_2(jax.nn.leaky_relu(values, _SLOPE), mask, stats[2])
        beside, used_3 = self.shortcut(inputs, mask, stats[3])
        # leaky ReLU and max commute, and leaky ReLU is cheaper on the smaller array
        values = jax.nn.leaky_relu(_conv_ops.max_pool(values + beside), _SLOPE)
        return values, (used_0, used_1, used_2, used_3)


class _ResNet(nnx.Module):
    def __init__(
        self, shape: tuple[int, ...], outputs: int | None, widths: tuple[int, ...], policy: _norm.Policy, form: Any,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        *sides, channels = _wrap.image_shape(shape)
        self.depth, self.stats_wanted = len(widths), policy == "support"
        if min(sides) < 2**self.depth:
            raise ValueError(f"inputs must be at least {2**self.depth} pixels high and wide, got {shape}")
        for index, width in enumerate(widths):
            setattr(self, f"block_{index}", _Block(channels, width, policy=policy, form=form, rngs=rngs))
            channels = width
        self.head = nnx.data(None if outputs is None else Linear(channels, outputs, rngs=rngs))

    def __call__(self, inputs: jax.Array, mask: Any = None, stats: Any = None) -> Any:
        blocks = (getattr(self, f"block_{index}") for index in range(self.depth))
        values, found = _norm.through(blocks, inputs, mask, stats)
        features = jnp.mean(values, axis=(1, 2))
        outputs = features if self.head is None else self.head(features)
        return (outputs, found) if self.stats_wanted else outputs


def resnet12(
    outputs: int | None = None,
    *,
    widths: Sequence[int] = (64, 160, 320, 640),
    normalisation: _norm.Policy = "batch",
    form: _conv_ops.Form = "auto",
) -> Model:
    """ResNet-12 (Lee et al. 2019): four residual blocks of three convolutions, then the mean over the image.

    A block has three 3x3 convolutions with a 1x1 shortcut, each with normalisation, leaky ReLU with slope 0.1, then 2x2
    max pooling. The DropBlock and the dropout of the paper are not included.

    Args:
      outputs: number of outputs of a linear head; None returns the features.
      widths: channels of each block; (64, 128, 256, 512) in some later work.
      normalisation: "batch" (transductive), "support", "layer", "group" or "none"; see `metajax.models`.
      form: how convolutions are computed; "auto" chooses by backend.

    Returns:
      A `Model` from images `[n, height, width, channels]` (any size and number of channels; unsigned 8-bit images
      are scaled to [0, 1]) to `[n, outputs]` or features `[n, widths[-1]]`.

    Raises:
      ValueError: an argument is out of range, or (at trace time) inputs are not images or too small for the poolings.

    Source: Lee et al. 2019 (MetaOptNet), arXiv:1904.03758; as the embedding of Tian et al. 2020, arXiv:2003.11539.

    >>> import jax, jax.numpy as jnp, metajax
    >>> model = metajax.models.resnet12(outputs=5, widths=(4, 8))
    >>> params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones([2, 28, 28, 1]))
    >>> sorted(params["block_0"]), jax.eval_shape(model.apply, params, jnp.ones([2, 28, 28, 1]), mask=None).shape
    (['conv_0', 'conv_1', 'conv_2', 'shortcut'], (2, 5))
    """
    if outputs is not None:
        _validate.positive_int("outputs", outputs)
    widths = tuple(_validate.positive_int("widths", width) for width in widths)
    if not widths:
        raise ValueError(f"widths must hold at least one width, got {widths!r}")
    _validate.one_of("normalisation", normalisation, _norm.POLICIES)
    _validate.one_of("form", form, _conv_ops.FORMS)

    def module(shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Module:
        return _ResNet(shape, outputs, widths, normalisation, form, rngs)

    return _wrap.from_shape(module, needs=_norm.needs(normalisation))
