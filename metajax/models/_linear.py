"""The linear layer of networks whose kernels adapters may edit."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx


class Linear(nnx.Linear):
    """Computes `inputs @ kernel + bias`, where the kernel may be anything that supports `@`.

    An adapter replaces the kernel by a pair of the kernel and its low-rank path (`metajax.adapters`). `nnx.Linear`
    would read it as one array, which copies the kernel for each task.

    >>> import jax, jax.numpy as jnp
    >>> Linear(3, 2, rngs=nnx.Rngs(0))(jnp.ones([4, 3])).shape
    (4, 2)
    """

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        outputs = inputs @ self.kernel.get_value()
        return outputs if self.bias is None else outputs + self.bias.get_value()
