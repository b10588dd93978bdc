"""Cost of a function, counted in its jaxpr: floating-point operations, and bytes between memory and compute units.

The compiler's own counts include the body of a loop only once, regardless of how often it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

_Count = Callable[[Any], float]  # counts one equation that contains no other equations


def flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Counts operations of one call: 2 per multiply-add of matrix products and convolutions, 1 per other result.

    A loop of unknown length counts as one iteration, a conditional as its most expensive branch, and a `shard_map`
    region as the part of one device.

    >>> import jax.numpy as jnp
    >>> flops(lambda x: x @ x, jnp.ones([10, 10]))
    2000.0
    >>> flops(lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=3)[0], jnp.ones([10, 10]))
    6000.0
    """
    return _total(jax.make_jaxpr(function)(*arguments).jaxpr, _flops)


def traffic(function: Callable[..., Any], *arguments: Any) -> float:
    """Counts the bytes that the matrix products, convolutions, reductions and gathers of one call read and write.

    Assumes that every other operation is fused with one of these.

    >>> import jax.numpy as jnp
    >>> traffic(lambda x: jnp.sin(x @ x), jnp.ones([10, 10], jnp.float32))
    1200.0
    """
    return _total(jax.make_jaxpr(function)(*arguments).jaxpr, _traffic)


def _total(jaxpr: Any, count: _Count) -> float:
    return float(sum(_equation(equation, count) for equation in jaxpr.eqns))


def _equation(equation: Any, count: _Count) -> float:
    name, inside = equation.primitive.name, [_total(jaxpr, count) for jaxpr in _jaxprs(equation.params)]
    if name == "scan":
        return equation.params["length"] * sum(inside)
    if name == "cond":
        return max(inside)
    return sum(inside) if inside else count(equation)


def _flops(equation: Any) -> float:
    name = equation.primitive.name
    size = sum(math.prod(getattr(variable.aval, "shape", ())) for variable in equation.outvars)
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2.0 * size * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    if name == "convolution":  # the primitive of `metajax.models`: its value and its derivatives cost the same
        _, kernel, outputs = equation.params["shapes"]
        return 2.0 * math.prod(outputs) * math.prod(kernel[:-1])
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * size * math.prod(kernel) / outputs
    return float(size)


_ENDS_OF_FUSION = (
    "dot_general",
    "conv_general",
    "convolution",
    "reduce",
    "gather",
    "scatter",
    "cumsum",
    "sort",
    "argmax",
)


def _traffic(equation: Any) -> float:
    if not equation.primitive.name.startswith(_ENDS_OF_FUSION):
        return 0.0
    variables = [*equation.invars, *equation.outvars]
    return float(sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in variables if hasattr(v.aval, "dtype")))


def _jaxprs(params: Any) -> Iterator[Any]:
    """Yields the jaxprs that an equation contains."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(part, "jaxpr", part)  # unwraps a closed jaxpr
            if hasattr(inner, "eqns"):
                yield inner
