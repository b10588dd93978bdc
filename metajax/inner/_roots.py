"""A square root and a norm with finite gradients at zero."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def safe_sqrt(values: jax.Array) -> jax.Array:
    """Computes the square root, with derivative 0 instead of infinity where the value is zero.

    Update rules compute the root of a mean of squares. If the mean is zero, its own derivative is zero too, and
    infinity times zero is NaN. At this point, a root with derivative 0 gives the correct derivative of a quotient such
    as `g / (sqrt(g**2) + eps)`.

    >>> float(jax.grad(safe_sqrt)(0.0)), float(safe_sqrt(4.0))
    (0.0, 2.0)
    """
    zero = values == 0  # NaN is not zero and stays NaN
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, values))).astype(jnp.result_type(values))


def safe_norm(tree: Any) -> jax.Array:
    """Computes the Euclidean norm of all numbers of a tree, with derivative 0 if all of them are zero.

    >>> float(safe_norm({"a": jnp.array([3.0]), "b": jnp.array([4.0])}))
    5.0
    """
    return safe_sqrt(jnp.asarray(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree))))
