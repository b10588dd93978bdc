"""The fully connected network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from flax import nnx

from metajax.core import _validate
from metajax.core._types import Model
from metajax.models import _wrap


class _MLP(nnx.Module):
    def __init__(self, inputs: int, outputs: int | None, hidden: Sequence[int], rngs: nnx.Rngs):
        self.depth = len(hidden)
        for index, width in enumerate(hidden):
            setattr(self, f"layer_{index}", nnx.Linear(inputs, width, rngs=rngs))
            inputs = width
        self.head = None if outputs is None else nnx.Linear(inputs, outputs, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        values = inputs.reshape(inputs.shape[0], math.prod(inputs.shape[1:]))  # works for n = 0
        for index in range(self.depth):
            values = jax.nn.relu(getattr(self, f"layer_{index}")(values))
        return values if self.head is None else self.head(values)


def mlp(outputs: int | None = None, *, hidden: Sequence[int] = (40, 40)) -> Model:
    """A fully connected ReLU network; two hidden layers of 40 units are MAML's network for sinusoids.

    Args:
      outputs: number of outputs; None returns features, the last hidden layer.
      hidden: widths of the hidden layers; `()` is a linear model.

    Returns:
      A `Model` from `[n, ...]` (flattened) to `[n, outputs]`.

    Raises:
      ValueError: a width is below 1, or there are neither outputs nor a hidden layer.

    Source: Finn, Abbeel and Levine 2017, arXiv:1703.03400, section 5.1.

    >>> import jax, jax.numpy as jnp, metajax
    >>> model = metajax.models.mlp(outputs=1)
    >>> model.apply(model.init(jax.random.key(0), jnp.ones([2, 1])), jnp.ones([2, 1])).shape
    (2, 1)
    """
    if outputs is not None:
        _validate.positive_int("outputs", outputs)
    elif not hidden:
        raise ValueError("hidden must hold a width where outputs are None, got ()")
    for width in hidden:
        _validate.positive_int("hidden", width)
    widths = tuple(hidden)

    def module(shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Module:
        return _MLP(math.prod(shape), outputs, widths, rngs)

    return _wrap.from_shape(module)
