"""Rotary positions, with optional scaling for longer texts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metajax.core import _validate

_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotates the two halves of queries and keys, taken as coordinate pairs, by angles that grow with the position.

    Attributes:
      theta: base of the frequencies.
      factor: divisor of the frequencies.
      band: `(low, high, length)`, where `length` is the longest text before the scaling. A frequency with at least
        `high` turns within `length` positions is kept, one with at most `low` turns is divided, and one in between is
        divided in part. None divides all.

    Source: Su et al. 2021, arXiv:2104.09864; Chen et al. 2023 (linear), arXiv:2306.15595; the parts of Llama 3.1,
    Grattafiori et al. 2024, arXiv:2407.21783.

    >>> Rotary()(jnp.ones([1, 3, 2, 4]), jnp.arange(3)).shape
    (1, 3, 2, 4)
    """

    theta: float = 1e4
    factor: float = 1.0
    band: tuple[float, float, float] | None = None

    def frequencies(self, half: int) -> np.ndarray:
        """Returns the angle between neighbouring positions for each of `half` pairs of coordinates.

        >>> Rotary(16.0).frequencies(2).tolist(), Rotary(16.0, factor=2.0).frequencies(2).tolist()
        ([1.0, 0.25], [0.5, 0.125])
        """
        rates = self.theta ** (-np.arange(half) / half)
        kept = np.zeros(half)
        if self.band is not None:
            low, high, length = self.band
            kept = np.clip((length * rates / (2 * math.pi) - low) / (high - low), 0, 1)
        return (rates * (kept + (1 - kept) / self.factor)).astype(np.float32)

    def __call__(self, values: jax.Array, positions: jax.Array) -> jax.Array:
        """Args: values: `[n, length, heads, size]`. positions: `[length]` or `[n, length]`."""
        half = values.shape[-1] // 2
        angles = positions.astype(jnp.float32)[..., None, None] * self.frequencies(half)
        first, second = values[..., :half], values[..., half:]
        cos, sin = jnp.cos(angles).astype(values.dtype), jnp.sin(angles).astype(values.dtype)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotary(theta: float, scaling: Mapping[str, Any] | None) -> Rotary:
    """Makes the rotary positions that a `rope_scaling` in the format of Hugging Face describes.

    Args:
      theta: base of the frequencies.
      scaling: `{"rope_type": "linear", "factor": 4.0}`, or "llama3", which also takes `low_freq_factor`,
        `high_freq_factor` and `original_max_position_embeddings`; None or "default" means no scaling. Other entries are
        ignored.

    Raises:
      ValueError: the type is unknown, or a number is missing or out of range.

    >>> rotary(5e5, {"rope_type": "linear", "factor": 4.0}).factor
    4.0
    """
    _validate.positive_float("theta", theta)
    if scaling is None:
        return Rotary(theta)
    if not isinstance(scaling, Mapping):
        raise ValueError(f"rope_scaling must be None or a dict with a rope_type, got {scaling!r}")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    _validate.one_of("rope_type of rope_scaling", kind, tuple(_NUMBERS))
    numbers = {part: _validate.positive_float(f"{part} of rope_scaling", scaling.get(part)) for part in _NUMBERS[kind]}
    if kind != "llama3":
        return Rotary(theta, numbers.get("factor", 1.0))
    factor, low, high, length = numbers.values()
    if low >= high:
        raise ValueError(f"low_freq_factor of rope_scaling must be below high_freq_factor, {high}, got {low}")
    return Rotary(theta, factor, (low, high, length))
