"""Normalisation as an explicit policy that says which examples share statistics.

| policy | statistics of | transductive |
|---|---|---|
| "batch" | the examples of the call, padding left out | yes: a query example depends on the others |
| "support" | the support set, reused for the query | no |
| "layer" | the example, all channels | no |
| "group" | the example, 8 groups of channels | no |
| "none" | - | no |
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from metajax.core import _validate

Policy = Literal["batch", "support", "layer", "group", "none"]
POLICIES = ("batch", "support", "layer", "group", "none")
_GROUPS = 8
_EPSILON = 1e-5


def needs(policy: Policy) -> tuple[str, ...]:
    """Returns the extra arguments that the `apply` of a model under this policy takes besides inputs.

    >>> needs("support")
    ('mask', 'stats')
    """
    return {"batch": ("mask",), "support": ("mask", "stats")}.get(policy, ())


def through(parts: Iterable[Any], values: jax.Array, mask: Any, stats: Any) -> tuple[jax.Array, Any]:
    """Calls parts `(values, mask, stats) -> (values, stats)` one after the other.

    Args:
      parts: for example blocks that contain a `Norm`.
      values: `[n, ..., c]`.
      mask: `[n]` bool or None.
      stats: statistics to use in each part, or None.

    Returns:
      The values, and a tuple of the statistics that each part used.
    """
    found = []
    for index, part in enumerate(parts):
        values, used = part(values, mask, None if stats is None else stats[index])
        found.append(used)
    return values, tuple(found)


class Norm(nnx.Module):
    """Normalisation over all axes but the last, or over groups of channels, with learned scale and bias."""

    def __init__(self, features: int, policy: Policy):
        """Args: features: channels, the last axis. policy: one of `POLICIES`."""
        _validate.one_of("normalisation", policy, POLICIES)
        if policy == "group" and features % _GROUPS:
            raise ValueError(f"width must be a multiple of {_GROUPS} under group normalisation, got {features}")
        self.policy = policy
        if policy != "none":
            self.scale = nnx.Param(jnp.ones([features]))
        self.bias = nnx.Param(jnp.zeros([features]))

    def __call__(self, inputs: jax.Array, mask: jax.Array | None, stats: Any) -> tuple[jax.Array, Any]:
        """Normalises `[n, ..., c]`.

        Args:
          inputs: `[n, ..., c]`.
          mask: `[n]` bool or None; padding does not enter batch statistics.
          stats: `(mean, variance)` `[c]` to use instead of those of the inputs, or None.

        Returns:
          The normalised inputs, and the batch statistics that were used (None if the policy has none).
        """
        if self.policy == "none":
            return inputs + self.bias[...], None
        if self.policy in ("batch", "support"):
            if stats is None:
                stats = _batch_statistics(inputs, mask)
            mean, variance = stats
        else:
            stats = None
            mean, variance = _example_statistics(inputs, 1 if self.policy == "layer" else _GROUPS)
        scale = jax.lax.rsqrt(variance + _EPSILON) * self.scale[...]
        return inputs * scale + (self.bias[...] - mean * scale), stats


@jax.custom_jvp
def _batch_statistics(inputs: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    mean = _mean(inputs, mask)
    return mean, _mean(jnp.square(inputs - mean), mask)


@_batch_statistics.defjvp
def _batch_statistics_jvp(primals: Any, tangents: Any) -> Any:
    """To first order the variance does not depend on the mean. JAX cannot know this; it saves three reverse passes."""
    (inputs, mask), (moved, _) = primals, tangents
    mean, variance = _batch_statistics(inputs, mask)
    return (mean, variance), (_mean(moved, mask), 2 * _mean((inputs - mean) * moved, mask))


def _mean(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Computes the mean over all axes but the last; sums within each example first."""
    sums = jnp.sum(values, tuple(range(1, values.ndim - 1)))
    positions = math.prod(values.shape[1:-1])
    if mask is None:
        return jnp.sum(sums, 0) / (positions * values.shape[0])
    count = jnp.maximum(jnp.sum(mask) * positions, 1).astype(values.dtype)
    return jnp.sum(jnp.where(mask[:, None], sums, 0), 0) / count


def _example_statistics(inputs: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    shape = inputs.shape
    grouped = inputs.reshape(*shape[:-1], groups, shape[-1] // groups)
    axes = (*range(1, inputs.ndim - 1), inputs.ndim)
    mean, variance = jnp.mean(grouped, axes, keepdims=True), jnp.var(grouped, axes, keepdims=True)

    def channels(statistic: jax.Array) -> jax.Array:
        return jnp.broadcast_to(statistic, (*statistic.shape[:-1], shape[-1] // groups)).reshape(
            *statistic.shape[:-2], shape[-1]
        )

    return channels(mean), channels(variance)
