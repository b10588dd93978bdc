"""A sum over a leading axis, so many entries at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from metajax.core import _tree

PyTree = Any


def sum_in_chunks(
    function: Callable[..., tuple[PyTree, PyTree]], arguments: tuple[PyTree, ...], size: int, axes: Iterable[Any] = ()
) -> tuple[PyTree, PyTree]:
    """Sums what `function` gives first over the leading axis of its arguments; what it gives second comes back stacked.

    Args:
      function: of one entry of each argument, gives `(summed, stacked)`.
      arguments: trees whose leaves share a leading axis.
      size: how many entries run together under vmap, one chunk after the other; it divides the leading axis.
      axes: names of the `shard_map` axes along which the sum differs between devices.

    >>> total, squares = sum_in_chunks(lambda x: (x, x * x), (jnp.arange(4.0),), size=2)
    >>> float(total), squares.tolist()
    (6.0, [0.0, 1.0, 4.0, 9.0])
    """
    count = jax.tree.leaves(arguments)[0].shape[0]
    if size == 1:
        run, chunks = function, arguments  # no vmap: a batch axis of one would still make grouped kernels
    else:
        chunks = jax.tree.map(lambda leaf: leaf.reshape(count // size, size, *leaf.shape[1:]), arguments)

        def run(*chunk: PyTree) -> tuple[PyTree, PyTree]:
            parts, rest = jax.vmap(function)(*chunk)
            return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), parts), rest

    if count == size > 1:
        return run(*arguments)

    def add(total: PyTree, chunk: PyTree) -> tuple[PyTree, PyTree]:
        more, rest = run(*chunk)
        return jax.tree.map(jnp.add, total, more), rest

    shapes = jax.eval_shape(lambda: run(*jax.tree.map(lambda leaf: leaf[0], chunks))[0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, rest = jax.lax.scan(add, _tree.vary(zeros, axes), chunks)
    if size > 1:
        rest = jax.tree.map(lambda leaf: leaf.reshape(count, *leaf.shape[2:]), rest)
    return total, rest
