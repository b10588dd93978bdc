"""Clipping of gradients by their norm."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from metajax.inner import _options
from metajax.inner._roots import safe_norm


def clip_by_global_norm(max_norm: Any) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` with finite second-order gradients where the whole inner gradient is zero.

    The inner gradient is zero if all support examples are padding, or if a fit is exact in floating-point arithmetic.
    `optax.clip` does not have this problem.

    Args:
      max_norm: largest Euclidean norm of the whole gradient, which is scaled down to it if its norm is larger; a number
        above 0, or a scalar array such as a meta-parameter.

    Raises:
      ValueError: `max_norm` is out of its range.

    Source: Pascanu, Mikolov and Bengio 2013, arXiv:1211.5063.

    >>> import jax.numpy as jnp, optax, metajax
    >>> rule = optax.chain(metajax.inner.clip_by_global_norm(1.0), optax.sgd(0.5))
    >>> gradient = jnp.array([0.0, 4.0])
    >>> rule.update(gradient, rule.init(gradient))[0].tolist()
    [-0.0, -0.5]
    """
    _options.positive("max_norm", max_norm)

    def update(grads: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        del params
        norm = safe_norm(grads)
        small = norm < max_norm
        divisor = jnp.where(small, 1, norm)  # the branch that is not selected is differentiated too

        def clip(leaf: jax.Array) -> jax.Array:
            return jnp.where(small, leaf, leaf / divisor.astype(leaf.dtype) * max_norm)

        return jax.tree.map(clip, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
