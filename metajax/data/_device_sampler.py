"""Draws episodes on the device, inside a compiled program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metajax.core._types import Episode, PyTree
from metajax.data import _episodes
from metajax.data._source import Source
from metajax.data._spec import EpisodeSpec


class DeviceData(NamedTuple):
    """The data that a device sampler reads: an argument of the compiled program, never a constant in it.

    Attributes:
      tables: the tables of the sampling rule.
      examples: all examples, leaves `[n, ...]`.

    >>> DeviceData._fields
    ('tables', 'examples')
    """

    tables: PyTree
    examples: PyTree


def device_sampler(
    source: Source, spec: EpisodeSpec, *, device: Any = None
) -> tuple[DeviceData, Callable[[DeviceData, jax.Array], Episode]]:
    """Stores a source in the memory of the accelerator and draws its episodes there.

    The sampler uses the same functions as the pipeline, so the same random bits give the same episode. Episodes have
    the size `spec.capacity` (one static shape), and sequences have their full length. If one scan contains the sampler
    and the meta step, hundreds of steps run without the host; see `metajax.training.fit_on_device`.

    Args:
      source: the source; all its examples are decoded and stored.
      spec: the sampling rule.
      device: the device or sharding for the data; JAX's default device by default. Use a replicated sharding for a
        meta step over several devices.

    Returns:
      `(data, sample)`: `sample(data, key) -> Episode` is pure and draws one episode. Pass `data` as an argument; if
      a function closes over it, it becomes a constant of the program.

    Raises:
      ValueError: the source is too small for `spec`, or cannot draw on a device.

    >>> import jax
    >>> from metajax.data.sources._glyphs import glyphs
    >>> data, sample = device_sampler(glyphs("val"), EpisodeSpec(ways=5, shots=1, queries=3))
    >>> keys = jax.random.split(jax.random.key(0), 4)
    >>> jax.jit(jax.vmap(sample, in_axes=(None, 0)))(data, keys).query.inputs.shape
    (4, 15, 28, 28, 1)
    """
    _episodes.check_source(source, spec)
    if getattr(source, "host_only", False):
        raise ValueError(f"source must draw on a device, which {source.name} ({source.split}) does not: use episodes()")
    whole = jax.tree.map(lambda leaf: leaf.take(np.arange(leaf.shape[0]), axis=0), source.examples)
    data = jax.device_put(DeviceData(source.tables(spec), whole), device)
    count = source.bits(spec)

    def take(examples: PyTree, rows: jax.Array) -> PyTree:
        def read(leaf: jax.Array) -> jax.Array:
            values = leaf.at[jnp.maximum(rows, 0)].get(mode="promise_in_bounds")
            if not spec.pads:
                return values
            there = jnp.expand_dims(rows >= 0, tuple(range(rows.ndim, values.ndim)))
            return jnp.where(there, values, jnp.zeros((), values.dtype))  # a plain 0 would turn a mask into integers

        return jax.tree.map(read, examples)

    def sample(data: DeviceData, key: jax.Array) -> Episode:
        drawn = source.draw(spec, data.tables, jax.random.bits(key, (count,), jnp.uint32))
        return source.finish(drawn, data.examples, take)

    return data, sample
