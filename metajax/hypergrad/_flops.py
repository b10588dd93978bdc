"""Floating-point operations of a function, counted in its jaxpr.

The compiler's own count takes the body of a loop once, however often it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def count(function: Callable[..., Any], *arguments: Any) -> float:
    """Operations of one call: 2 for each multiply-add of matrix products and convolutions, 1 for each other result.

    A loop of unknown length counts as one turn, and a branch as the costliest one.

    >>> import jax.numpy as jnp
    >>> count(lambda x: x @ x, jnp.ones([10, 10]))
    2000.0
    >>> count(lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=3)[0], jnp.ones([10, 10]))
    6000.0
    """
    return _of(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of(jaxpr: Any) -> float:
    return float(sum(map(_equation, jaxpr.eqns)))


def _equation(equation: Any) -> float:
    name, inside = equation.primitive.name, [_of(jaxpr) for jaxpr in _jaxprs(equation.params)]
    size = sum(math.prod(getattr(variable.aval, "shape", ())) for variable in equation.outvars)
    if name == "scan":
        return equation.params["length"] * sum(inside)
    if name == "cond":
        return max(inside)
    if inside:
        return sum(inside)
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2.0 * size * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    if name == "convolution":  # of `metajax.models`: its value and its derivatives cost the same
        _, kernel, outputs = equation.params["shapes"]
        return 2.0 * math.prod(outputs) * math.prod(kernel[:-1])
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * size * math.prod(kernel) / outputs
    return float(size)


def _jaxprs(params: Any) -> Iterator[Any]:
    """The jaxprs that an equation holds."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(part, "jaxpr", part)  # of a closed one
            if hasattr(inner, "eqns"):
                yield inner
