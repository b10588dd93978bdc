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
    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int], rngs: nnx.Rngs):
        self.depth = len(hidden)
        for index, width in enumerate(hidden):
            setattr(self, f"layer_{index}", nnx.Linear(inputs, width, rngs=rngs))
            inputs = width
        self.head = nnx.Linear(inputs, outputs, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        values = inputs.reshape(inputs.shape[0], math.prod(inputs.shape[1:]))  # also of no examples
        for index in range(self.depth):
            values = jax.nn.relu(getattr(self, f"layer_{index}")(values))
        return self.head(values)


def mlp(outputs: int, *, hidden: Sequence[int] = (40, 40)) -> Model:
    """A fully connected ReLU network; two hidden layers of 40 units are those of MAML's sinusoids.

    Args:
      outputs: number of outputs.
      hidden: widths of the hidden layers; `()` is a linear model.

    Returns:
      A `Model` from `[n, ...]` (flattened) to `[n, outputs]`.

    Raises:
      ValueError: a width below 1.

    Source: Finn, Abbeel and Levine 2017, arXiv:1703.03400, section 5.1.

    >>> import jax, jax.numpy as jnp, metajax
    >>> model = metajax.models.mlp(outputs=1)
    >>> model.apply(model.init(jax.random.key(0), jnp.ones([2, 1])), jnp.ones([2, 1])).shape
    (2, 1)
    """
    _validate.positive_int("outputs", outputs)
    for width in hidden:
        _validate.positive_int("hidden", width)
    widths = tuple(hidden)

    def module(shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Module:
        return _MLP(math.prod(shape), outputs, widths, rngs)

    return _wrap.from_shape(module)
