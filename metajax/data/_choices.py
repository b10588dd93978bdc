"""Random choices as pure functions of random bits, the same in NumPy and in JAX.

The pipeline on the host and the sampler on the device use the same functions, so the same 32-bit numbers give the
same choices. All functions accept leading batch axes and return arrays of the same library as their arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Array = Any  # of NumPy or JAX
_INVALID = 0xFFFFFFFF
_UNROLLED = 32  # most steps of a loop that is unrolled for JAX


def below(bits: Array, count: Array) -> Array:
    """Returns uniform integers in `[0, count)`; no value is favoured by more than 2**-32.

    The result is the high word of the product `bits * count`.

    Args:
      bits: uint32.
      count: positive integers below 2**31 that broadcast against `bits`.

    >>> below(np.array([0, 2**31, 2**32 - 1], np.uint32), 10).tolist()
    [0, 5, 9]
    """
    xp = bits.__array_namespace__()
    if xp is np:
        return (bits * np.asarray(count, np.uint64) >> np.uint64(32)).astype(np.int64)
    count = xp.asarray(count).astype(xp.uint32)  # multiplies 16-bit halves, without 64-bit integers
    low, high, few, many = bits & 0xFFFF, bits >> 16, count & 0xFFFF, count >> 16
    middle = high * few + (low * few >> 16)
    return (high * many + (middle >> 16) + ((low * many + (middle & 0xFFFF)) >> 16)).astype(xp.int32)


def uniform(bits: Array) -> Array:
    """Returns uniform float32 numbers in `[0, 1)`, multiples of 2**-24.

    >>> uniform(np.array([0, 2**31], np.uint32)).tolist()
    [0.0, 0.5]
    """
    xp = bits.__array_namespace__()
    return (bits >> 8).astype(xp.float32) * np.float32(2**-24)


def distinct(bits: Array, count: Array) -> Array:
    """Returns k different integers in `[0, count)` in random order; every sequence is equally likely.

    The i-th integer is the r-th of the remaining ones, with r uniform. This takes k steps for any `count`.

    Args:
      bits: uint32 `[..., k]`.
      count: integers `[...]`; if it is below k, only the first `count` results are valid.

    Returns:
      `[..., k]`.

    >>> sorted(distinct(np.array([2**31, 7, 2**32 - 1], np.uint32), np.array(3)).tolist())
    [0, 1, 2]
    """
    xp = bits.__array_namespace__()
    steps = bits.shape[-1]
    slots = xp.arange(steps)
    count = xp.asarray(count)
    empty = xp.full(bits.shape, np.iinfo(np.int32).max, slots.dtype)

    def step(index: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
        taken, chosen = state  # taken: in ascending order, then empty
        left = below(bits[..., index], xp.maximum(count - index, 1))
        passed = xp.sum(taken - slots <= left[..., None], axis=-1, keepdims=True)  # taken integers before it
        value = (left[..., None] + passed).astype(slots.dtype)
        moved = xp.concatenate([taken[..., :1], taken[..., :-1]], axis=-1)
        taken = xp.where(slots < passed, taken, xp.where(slots == passed, value, moved))
        return taken, xp.where(slots == index, value, chosen)

    return _repeat(xp, steps, step, (empty, empty))[1]


def _repeat(xp: Any, steps: int, step: Callable[[Any, Any], Any], state: Any) -> Any:
    if xp is not np and steps > _UNROLLED:
        return jax.lax.fori_loop(0, steps, step, state)
    for index in range(steps):
        state = step(index, state)
    return state


def shuffled(bits: Array, valid: Array) -> Array:
    """Returns the positions `0 .. m - 1`, with the valid ones first and in random order.

    Args:
      bits: uint32 `[..., m]`.
      valid: bool that broadcasts against `bits`.

    >>> shuffled(np.array([9, 5, 7], np.uint32) << 8, np.array([True, False, True])).tolist()
    [2, 0, 1]
    """
    xp = bits.__array_namespace__()
    return order(xp.where(valid, bits >> 1, xp.asarray(_INVALID, dtype=bits.dtype)))


def order(keys: Array) -> Array:
    """Returns the stable argsort of uint32 keys `[..., m]` along the last axis.

    >>> order(np.array([3, 1, 1], np.uint32)).tolist()
    [1, 2, 0]
    """
    xp = keys.__array_namespace__()
    if xp is not np:
        return xp.argsort(keys, axis=-1, stable=True)
    # NumPy sorts integers several times faster than it argsorts them stably
    packed = keys.astype(np.uint64) << np.uint64(32) | np.arange(keys.shape[-1], dtype=np.uint64)
    return (np.sort(packed, axis=-1) & np.uint64(_INVALID)).astype(np.int64)


def at(values: Array, index: Array) -> Array:
    """Returns `values[..., index]` along the last axis.

    Values `[..., m]` and indices `[..., k]`, or `[k]` for all of them, give `[..., k]`.

    >>> at(np.array([[5, 6], [7, 8]]), np.array([[1], [0]])).tolist()
    [[6], [7]]
    >>> at(np.array([[5, 6], [7, 8]]), np.array([1])).tolist()
    [[6], [8]]
    """
    if index.ndim == 1 < values.ndim:
        return values[..., index]
    xp = values.__array_namespace__()
    return xp.take_along_axis(xp.broadcast_to(values, (*index.shape[:-1], values.shape[-1])), index, axis=-1)
