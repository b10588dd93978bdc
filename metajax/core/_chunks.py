"""A sum over a leading axis, computed in chunks."""

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
    """Sums the first output of `function` over the leading axis of its arguments, and stacks the second output.

    Args:
      function: takes one entry of each argument and returns `(summed, stacked)`.
      arguments: trees whose leaves share a leading axis.
      size: number of entries in a chunk. The entries of a chunk run together under vmap, the chunks run one after the
        other. Must divide the leading axis.
      axes: names of the `shard_map` axes along which the sum differs between devices.

    >>> total, squares = sum_in_chunks(lambda x: (x, x * x), (jnp.arange(4.0),), size=2)
    >>> float(total), squares.tolist()
    (6.0, [0.0, 1.0, 4.0, 9.0])
    """
    count = jax.tree.leaves(arguments)[0].shape[0]
    if size == 1:
        run, chunks = function, arguments  # no vmap: a batch axis of size one would still produce grouped kernels
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
