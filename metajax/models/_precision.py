"""Computation in a narrow type with parameters in a wide type."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from metajax.core import _validate
from metajax.core._types import Dtype, Model
from metajax.models._wrap import as_floats


def mixed_precision(model: Model, dtype: Dtype = jnp.bfloat16) -> Model:
    """Makes a model compute in a narrow type while its parameters keep their type (Micikevicius et al. 2018).

    The parameters are the master copy: fast weights, inner optimizer and hypergradient keep their type and are rounded
    when the model reads them. Outputs are cast back to the type of the parameters, so losses are computed in that type.

    Args:
      model: any model.
      dtype: the type of the computation, a floating-point type.

    Returns:
      A `Model` with the same parameters. With `needs=("stats",)`, the statistics stay in the narrow type.

    Raises:
      ValueError: an argument has the wrong type, or `dtype` is not a floating-point type.

    Source: Micikevicius et al. 2018, Mixed Precision Training, arXiv:1710.03740; bfloat16 needs no scaling of the loss.

    >>> import jax, jax.numpy as jnp, metajax
    >>> model = metajax.models.mixed_precision(metajax.models.mlp(outputs=2))
    >>> params = model.init(jax.random.key(0), jnp.ones([4, 3]))
    >>> model.apply(params, jnp.ones([4, 3])).dtype.name
    'float32'
    """
    _validate.instance("model", model, Model)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating-point type, got {dtype!r}")

    def cast(tree: Any, dtype: Any) -> Any:
        floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
        return jax.tree.map(lambda leaf: leaf.astype(dtype) if floating(leaf) else leaf, tree)

    def apply(params: Any, inputs: Any, **needed: Any) -> Any:
        wide = jnp.result_type(*jax.tree.leaves(params))
        outputs = model.apply(cast(params, dtype), cast(as_floats(inputs), dtype), **needed)
        outputs, *stats = outputs if "stats" in model.needs else (outputs,)
        outputs = cast(outputs, wide)
        return (outputs, *stats) if stats else outputs

    return Model(model.init, apply, model.needs)
