"""Progressive networks: a new column beside frozen ones, whose layers it reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from metajax.core import _validate
from metajax.core._types import Model, Params
from metajax.models import _wrap


class _Column(nnx.Module):
    """An `mlp` whose layers read, behind the first, the layer below of the columns before it too."""

    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int], beside: Sequence[int], rngs: nnx.Rngs):
        """Args: beside: how many units the columns before have in each hidden layer."""
        self.depth = len(hidden)
        for index, width in enumerate(hidden):
            setattr(self, f"layer_{index}", nnx.Linear(inputs, width, rngs=rngs))
            inputs = width + beside[index]
        self.head = nnx.Linear(inputs, outputs, rngs=rngs)

    def __call__(self, values: jax.Array, before: Sequence[Sequence[jax.Array]]) -> tuple[list[jax.Array], jax.Array]:
        """The hidden layers, and the outputs; `before`: the hidden layers of each column before."""
        own: list[jax.Array] = []
        for index in range(self.depth):
            values = jax.nn.relu(getattr(self, f"layer_{index}")(values))
            own.append(values)
            values = jnp.concatenate([values, *(column[index] for column in before)], axis=-1)
        return own, self.head(values)


class _Progressive(nnx.Module):
    def __init__(self, inputs: int, sizes: Sequence[tuple[Sequence[int], int]], rngs: nnx.Rngs):
        self.columns = len(sizes)
        beside = [0] * len(sizes[0][0])
        for index, (hidden, outputs) in enumerate(sizes):
            setattr(self, f"column_{index}", _Column(inputs, outputs, hidden, beside, rngs))
            beside = [sum(pair) for pair in zip(beside, hidden, strict=True)]

    def __call__(self, inputs: jax.Array) -> jax.Array:
        values = inputs.reshape(inputs.shape[0], math.prod(inputs.shape[1:]))
        before: list[list[jax.Array]] = []
        for index in range(self.columns):
            own, outputs = getattr(self, f"column_{index}")(values, before)
            before.append(own)
        return outputs


def progressive_column(earlier: Params, outputs: int, *, hidden: Sequence[int] | None = None) -> Model:
    """A new column beside the columns that were trained before, which stay as they are (Rusu et al. 2016).

    A hidden layer of the new column, and its head, read the layer below of all columns; the rows of their kernels
    behind those for the column's own units are the lateral connections. The outputs are those of the new column. What
    was learned before is not forgotten where only the new column is trained: column k with
    `outer_update(..., trainable="^column_k/")`, and `adapts="^column_k/"` in learners with an inner loop.

    Args:
      earlier: parameters of `metajax.models.mlp` with a hidden layer, or of a model that this function returned.
      outputs: number of outputs of the new column.
      hidden: widths of its hidden layers, as many as the first column has; None takes those of the first.

    Returns:
      A `Model` from `[n, ...]` (flattened) to `[n, outputs]`. Its `init` makes `column_0`, `column_1` and so on, where
      all but the last are `earlier`; these are arguments of `apply` as all parameters are.

    Raises:
      ValueError: parameters of another network, another number of layers, or a size below 1; (in `init`) inputs of
        another size than the earlier columns take.

    Source: Rusu et al. 2016, Progressive Neural Networks, arXiv:1606.04671, equation 2 without adapters.

    >>> import jax, jax.numpy as jnp, metajax
    >>> inputs = jnp.ones([4, 3])
    >>> first = metajax.models.mlp(2, hidden=(8, 8)).init(jax.random.key(0), inputs)
    >>> model = metajax.strategies.progressive_column(first, 5)
    >>> params = model.init(jax.random.key(1), inputs)
    >>> params["column_1"]["layer_1"]["kernel"].shape, params["column_1"]["head"]["kernel"].shape
    ((16, 8), (16, 5))
    >>> model.apply(params, inputs).shape
    (4, 5)
    """
    columns = _columns(earlier)
    widths = [_widths(column) for column in columns]
    new = widths[0] if hidden is None else tuple(_validate.positive_int("hidden", width) for width in hidden)
    _validate.positive_int("outputs", outputs)
    if len(new) != len(widths[0]):
        raise ValueError(f"hidden must hold {len(widths[0])} widths, as the columns before, got {hidden!r}")
    heads = [int(column["head"]["bias"].shape[0]) for column in columns]
    size = int(columns[0]["layer_0"]["kernel"].shape[0])
    sizes = list(zip([*widths, new], [*heads, outputs], strict=True))

    def module(shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Module:
        if math.prod(shape) != size:
            raise ValueError(f"inputs must be of size {size}, as the columns before take them, got {shape}")
        return _Progressive(size, sizes, rngs)

    model = _wrap.from_shape(module)

    def init(key: jax.Array, inputs: jax.Array) -> Params:
        return model.init(key, inputs) | {f"column_{index}": column for index, column in enumerate(columns)}

    return Model(init, model.apply, model.needs)


def _columns(earlier: Params) -> list[Params]:
    groups = earlier if isinstance(earlier, Mapping) else {}
    if "layer_0" in groups and "head" in groups:
        return [earlier]
    if groups and set(groups) == {f"column_{index}" for index in range(len(groups))}:
        return [groups[f"column_{index}"] for index in range(len(groups))]
    raise ValueError(
        "earlier must be parameters of metajax.models.mlp with a hidden layer, or of a progressive network, got a tree "
        f"of {sorted(groups)}"
    )


def _widths(column: Params) -> tuple[int, ...]:
    return tuple(int(column[f"layer_{index}"]["bias"].shape[0]) for index in range(len(column) - 1))
