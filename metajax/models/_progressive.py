"""Progressive networks: a new column that also reads the layers of frozen columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from metajax.core import _validate
from metajax.core._types import Model, Params
from metajax.models import _conv, _norm, _wrap


class _Dense(nnx.Linear):
    """A hidden layer of `metajax.models.mlp` with the call of a `conv4` block."""

    def __call__(self, values: jax.Array, mask: Any, stats: Any) -> tuple[jax.Array, Any]:
        return jax.nn.relu(super().__call__(values)), stats


class _Column(nnx.Module):
    """A network in which each layer after the first also reads the layer below it in all earlier columns."""

    def __init__(self, kind: str, layers: Sequence[nnx.Module], head: nnx.Linear):
        self.names = [f"{kind}_{index}" for index in range(len(layers))]
        for name, layer in zip(self.names, layers, strict=True):
            setattr(self, name, layer)
        self.head = head

    def __call__(
        self, values: jax.Array, before: Sequence[Sequence[jax.Array]], mask: Any
    ) -> tuple[list[jax.Array], jax.Array]:
        """Returns the hidden layers and the outputs. `before` holds the hidden layers of each earlier column."""
        own: list[jax.Array] = []
        for index, name in enumerate(self.names):
            values, _ = getattr(self, name)(values, mask, None)
            own.append(values)
            values = jnp.concatenate([values, *(column[index] for column in before)], axis=-1)
        return own, self.head(values.reshape(values.shape[0], math.prod(values.shape[1:])))


class _Progressive(nnx.Module):
    def __init__(self, columns: Sequence[_Column], *, flat: bool):
        self.columns, self.flat = len(columns), flat
        for index, column in enumerate(columns):
            setattr(self, f"column_{index}", column)

    def __call__(self, inputs: jax.Array, mask: Any = None) -> jax.Array:
        values = inputs.reshape(inputs.shape[0], math.prod(inputs.shape[1:])) if self.flat else inputs
        before: list[list[jax.Array]] = []
        for index in range(self.columns):
            own, outputs = getattr(self, f"column_{index}")(values, before, mask)
            before.append(own)
        return outputs


def progressive_column(
    earlier: Params,
    outputs: int,
    *,
    hidden: Sequence[int] | None = None,
    pool: bool | None = None,
    normalisation: _norm.Policy | None = None,
) -> Model:
    """A new column next to previously trained columns, which stay unchanged (Rusu et al. 2016).

    Each hidden layer after the first and the head of the new column read the layer below in all columns. The lateral
    connections are the kernel rows (in convolutions: the input channels) after those for the column's own units. The
    outputs are those of the new column. Nothing is forgotten if only the new column is trained: column k with
    `outer_update(..., trainable="^column_k/")`, and with `adapts="^column_k/"` in learners with an inner loop.

    Args:
      earlier: parameters of `metajax.models.mlp` with a hidden layer, of `metajax.models.conv4` with outputs, or of a
        model that this function returned.
      outputs: number of outputs of the new column.
      hidden: widths of the hidden layers of the new column, as many as in the first column; None uses the widths of the
        first column.
      pool: only with `conv4` columns: whether they were built with pooling, which their parameters do not show.
      normalisation: only with `conv4` columns: their normalisation; any policy except "support".

    Returns:
      A `Model` from the inputs of the first column to `[n, outputs]`. Its `init` makes `column_0`, `column_1` and so
      on; all but the last are `earlier`. They are arguments of `apply` like all parameters.

    Raises:
      ValueError: the parameters are of another network, the number of layers differs, a size is below 1, `pool` or
        `normalisation` is missing for `conv4`, given for `mlp` or out of range; or (in `init`) the inputs have another
        size than the earlier columns take.

    Source: Rusu et al. 2016, Progressive Neural Networks, arXiv:1606.04671, equation 2 without adapters.

    >>> import jax, jax.numpy as jnp, metajax
    >>> inputs = jnp.ones([4, 3])
    >>> first = metajax.models.mlp(2, hidden=(8, 8)).init(jax.random.key(0), inputs)
    >>> model = metajax.models.progressive_column(first, 5)
    >>> params = model.init(jax.random.key(1), inputs)
    >>> params["column_1"]["layer_1"]["kernel"].shape, params["column_1"]["head"]["kernel"].shape
    ((16, 8), (16, 5))
    >>> model.apply(params, inputs).shape
    (4, 5)
    """
    kind, columns = _columns(earlier)
    _check_form(kind, columns[0], pool, normalisation)
    widths = [_widths(kind, column) for column in columns]
    new = widths[0] if hidden is None else tuple(_validate.positive_int("hidden", width) for width in hidden)
    _validate.positive_int("outputs", outputs)
    if len(new) != len(widths[0]):
        raise ValueError(f"hidden must hold {len(widths[0])} widths, as the columns before, got {hidden!r}")
    heads = [int(column["head"]["bias"].shape[0]) for column in columns]

    def module(shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Module:
        inputs, positions = _sizes(kind, shape, columns[0], pool)
        found, beside = [], [0] * len(new)  # number of units in each hidden layer of the earlier columns
        for size, layers in zip([*heads, outputs], [*widths, new], strict=True):
            reads = [inputs, *(sum(pair) for pair in zip(layers, beside, strict=True))]
            made = [
                _Dense(read, width, rngs=rngs) if kind == "layer"
                else _conv.Block(read, width, pool=bool(pool), policy=normalisation or "none", form="auto", rngs=rngs)
                for read, width in zip(reads, layers, strict=False)
            ]  # fmt: skip
            found.append(_Column(kind, made, nnx.Linear(positions * reads[-1], size, rngs=rngs)))
            beside = [sum(pair) for pair in zip(beside, layers, strict=True)]
        return _Progressive(found, flat=kind == "layer")

    model = _wrap.from_shape(module, needs=_norm.needs(normalisation) if normalisation else ())

    def init(key: jax.Array, inputs: jax.Array) -> Params:
        return model.init(key, inputs) | {f"column_{index}": column for index, column in enumerate(columns)}

    return Model(init, model.apply, model.needs)


def _columns(earlier: Params) -> tuple[str, list[Params]]:
    """Returns the prefix of the hidden layers, "layer" or "block", and the columns."""
    groups = earlier if isinstance(earlier, Mapping) else {}
    columns = [groups[f"column_{index}"] for index in range(len(groups)) if f"column_{index}" in groups]
    columns = columns if columns and len(columns) == len(groups) else [groups]
    for kind in ("layer", "block"):
        if "head" in columns[0] and "kernel" in columns[0].get(f"{kind}_0", {}):
            return kind, columns
    raise ValueError(
        "earlier must be parameters of metajax.models.mlp with a hidden layer, of metajax.models.conv4 with outputs, "
        f"or of a progressive network, got a tree of {sorted(groups)}"
    )


def _widths(kind: str, column: Params) -> tuple[int, ...]:
    return tuple(int(column[f"{kind}_{index}"]["kernel"].shape[-1]) for index in range(len(column) - 1))


def _check_form(kind: str, first: Params, pool: Any, normalisation: Any) -> None:
    """Raises ValueError if `pool` and `normalisation` do not fit columns of this kind."""
    if kind == "layer":
        for name, value in (("pool", pool), ("normalisation", normalisation)):
            if value is not None:
                raise ValueError(f"{name} must not be given beside columns of mlp, got {value!r}")
        return
    if not isinstance(pool, bool):
        raise ValueError(f"pool must be True or False, as the columns before were built, got {pool!r}")
    _validate.one_of("normalisation", normalisation, [policy for policy in _norm.POLICIES if policy != "support"])
    if ("scale" in first["block_0"]["norm"]) != (normalisation != "none"):
        raise ValueError(f"normalisation must be that of the columns before, got {normalisation!r}")


def _sizes(kind: str, shape: tuple[int, ...], first: Params, pool: Any) -> tuple[int, int]:
    """Returns the numbers or channels that the first layers read, and the image positions that the heads read.

    Raises:
      ValueError: the first column has other sizes.
    """
    widths = _widths(kind, first)
    if kind == "layer":
        reads, positions = math.prod(shape), 1
    else:
        height, breadth, reads = _wrap.image_shape(shape)
        for _ in widths:
            height, breadth = _conv.halved(height, pool=pool), _conv.halved(breadth, pool=pool)
        positions = height * breadth
    found = reads, positions * widths[-1]
    wanted = first[f"{kind}_0"]["kernel"].shape[-2], first["head"]["kernel"].shape[0]
    if found != wanted:
        raise ValueError(
            f"inputs must be of the size that the columns before take, and halved as there, got {shape}, of which the "
            f"first layer and the head would read {found} numbers instead of {wanted}"
        )
    return reads, positions
