"""The linear layer of networks that adapters may edit."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx


class Linear(nnx.Linear):
    """`inputs @ kernel + bias`, where the kernel may be anything that `@` takes.

    An adapter puts a pair of a kernel and its low-rank path where the kernel was (`metajax.adapters`). `nnx.Linear`
    would ask for it as one array, which is a copy of the kernel for each task.

    >>> import jax, jax.numpy as jnp
    >>> Linear(3, 2, rngs=nnx.Rngs(0))(jnp.ones([4, 3])).shape
    (4, 2)
    """

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        outputs = inputs @ self.kernel.get_value()
        return outputs if self.bias is None else outputs + self.bias.get_value()
