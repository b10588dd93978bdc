"""Random augmentation of episodes before the meta step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from metajax.core import _tree
from metajax.core._types import Episode, MetaState, OuterUpdate, Params
from metajax.data import Transforms, as_transforms, count_numbers, spread_numbers, transform_episode

# the meta step folds its step number into the same key; no step number is this large
_PURPOSE = 2**32 - 1


def augment(
    outer: OuterUpdate, both: Transforms = (), *, support: Transforms = (), query: Transforms = ()
) -> OuterUpdate:
    """Transforms the images of every episode on the device, in the same compiled program as the meta step.

    Args:
      outer: any meta step. To spread tasks over devices, augment the result of `metajax.parallel.shard`.
      both: a transform of `metajax.data`, such as `metajax.data.random_affine(rotation=10)`, or a list of them, applied
        to support and query. Draws that are shared by a class or an episode are shared by the two sets.
      support: transforms of the support set only.
      query: transforms of the query set only.

    Returns:
      An `OuterUpdate` with the same signature. The random draws depend on the state's key and step and on the task's
      index in the call.

    Raises:
      ValueError: an argument is not a transform; or (when traced) a transform changes a shape or a dtype, or is shared
        by classes and the episodes have no class mask.

    >>> import jax, optax, metajax
    >>> learner = metajax.learners.prototypical(metajax.models.conv4(width=8, depth=1, pool=False))
    >>> outer = metajax.outer_update(learner, optax.adam(1e-3), hypergrad=metajax.hypergrad.unrolled())
    >>> outer = metajax.training.augment(outer, metajax.data.random_affine(rotation=10))
    >>> source, spec = metajax.data.glyphs("val"), metajax.data.EpisodeSpec(ways=5, shots=1, queries=2)
    >>> state = outer.init(jax.random.key(0), metajax.data.episode(source, spec, seed=0, index=0))
    >>> episodes = metajax.data.episode_batch(source, spec, seed=0, start=0, count=2)
    >>> state, metrics = jax.jit(outer.update)(state, episodes)
    >>> int(state.step)
    1
    """
    several = as_transforms("both", both), as_transforms("support", support), as_transforms("query", query)
    by_class = any(transform.shared == "class" for transforms in several for transform in transforms)

    def changed(key: jax.Array, episode: Episode) -> Episode:
        present = episode.support.class_mask
        labelled = present is not None  # the targets are then class labels
        if by_class and not labelled:
            raise ValueError("transforms that are shared by a class need episodes of classes, with a class_mask")
        ways = 1 if present is None else present.shape[0]
        classes = [part.targets if labelled else jnp.zeros(part.mask.shape, int) for part in episode]
        sizes = [part.mask.shape[0] for part in episode]
        numbers = jax.random.uniform(key, [count_numbers(several, ways, *sizes)])
        after = transform_episode(several, episode, spread_numbers(several, numbers, ways, classes))
        shapes = [jax.tree.map(_shape, [part.inputs for part in parts]) for parts in (episode, after)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"transforms must keep shapes and dtypes, got {shapes[1]} from {shapes[0]}")
        return after

    def update(state: MetaState, episodes: Episode, frozen: Params = None) -> tuple[MetaState, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, _PURPOSE), state.step)
        keys = jax.random.split(key, episodes.query.mask.shape[0])
        return outer.update(state, jax.vmap(changed)(keys, episodes), *_tree.given(frozen))

    return outer.wrapped(outer.init, update)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
