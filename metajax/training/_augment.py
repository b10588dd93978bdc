"""Episodes that are changed at random before the meta step sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from metajax.core._types import Episode, Examples, MetaState, OuterUpdate

Transform = Callable[[jax.Array, Any], Any]

# the meta step folds its step into the same key; no step is this large
_PURPOSE = 2**32 - 1


def augment(outer: OuterUpdate, transform: Transform) -> OuterUpdate:
    """Applies a random transform to the inputs of every example, on the device, in the same compiled program.

    Args:
      outer: any meta step; to spread tasks over devices, augment what `shard_tasks` returns.
      transform: `(key, inputs) -> inputs` over a leading axis of examples, of the same structure, shapes and dtypes,
        as `functools.partial(metajax.data.random_affine, rotation=10)`.

    Returns:
      An `OuterUpdate` with the same signature. The draws depend on the state's key and step, the task's place in the
      call, and support or query.

    Raises:
      ValueError: (when traced) the transform changes the structure, a shape or a dtype.

    >>> import functools, jax, jax.numpy as jnp, optax, metajax
    >>> learner = metajax.learners.prototypical(metajax.models.conv4(width=8, pool=False))
    >>> outer = metajax.outer_update(learner, optax.adam(1e-3), hypergrad=metajax.hypergrad.unrolled())
    >>> outer = metajax.training.augment(outer, functools.partial(metajax.data.random_affine, rotation=10))
    >>> source, spec = metajax.data.glyphs("val"), metajax.data.EpisodeSpec(ways=5, shots=1, queries=2)
    >>> state = outer.init(jax.random.key(0), metajax.data.episode(source, spec, seed=0, index=0))
    >>> episodes = metajax.data.episode_batch(source, spec, seed=0, start=0, count=2)
    >>> state, metrics = jax.jit(outer.update)(state, episodes)
    >>> int(state.step)
    1
    """

    def changed(key: jax.Array, examples: Examples) -> Examples:
        inputs = jax.vmap(transform)(jax.random.split(key, examples.mask.shape[0]), examples.inputs)
        before, after = (jax.tree.map(_shape, tree) for tree in (examples.inputs, inputs))
        if before != after:
            raise ValueError(f"transform must keep structure, shapes and dtypes, got {after} from {before}")
        return examples._replace(inputs=inputs)

    def update(state: MetaState, episodes: Episode) -> tuple[MetaState, dict[str, Any]]:
        own_key = jax.random.fold_in(state.key, _PURPOSE)
        support_key, query_key = jax.random.split(jax.random.fold_in(own_key, state.step))
        episodes = Episode(changed(support_key, episodes.support), changed(query_key, episodes.query))
        return outer.update(state, episodes)

    return outer._replace(update=update)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
