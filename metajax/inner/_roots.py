"""The square root and the norm that have a gradient at zero."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def safe_sqrt(values: jax.Array) -> jax.Array:
    """The square root, with derivative 0 instead of infinity where the value is zero.

    What rules take the root of is a mean of squares. Where it is zero so is its own derivative, and infinity times
    zero is NaN; the derivative of a quotient such as `g / (sqrt(g**2) + eps)` there is that with a root of slope 0.

    >>> float(jax.grad(safe_sqrt)(0.0)), float(safe_sqrt(4.0))
    (0.0, 2.0)
    """
    zero = values == 0  # NaN is not zero, and stays
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, values))).astype(jnp.result_type(values))


def safe_norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all numbers of a tree, with derivative 0 where they are all zero.

    >>> float(safe_norm({"a": jnp.array([3.0]), "b": jnp.array([4.0])}))
    5.0
    """
    return safe_sqrt(jnp.asarray(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree))))
