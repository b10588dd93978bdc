"""More rows of the contract table: learners whose inputs or tasks are not those of `worlds.LEARNERS`.

Tests import it by name (`tests/conftest.py` puts this folder on the path).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import streams
import worlds

import metajax
from metajax import learners, models, tasks

KEY = jax.random.key(3)


class Row(NamedTuple):
    """A learner of the table.

    Attributes:
      learner: the learner.
      episode: `(seed, padding, dtype) -> Episode`; as many more examples in each set are padding.
      support: whether the objective depends on the support set.
      ordered: whether the order of the support set counts.
    """

    learner: metajax.Learner
    episode: Callable[[int, int, Any], metajax.Episode]
    support: bool = True
    ordered: bool = False


def _classes(seed: int, padding: int, dtype: Any) -> metajax.Episode:
    return worlds.episode(worlds.LEARNERS["maml"], seed, padding=padding, dtype=dtype)


def _images(seed: int, padding: int, dtype: Any) -> metajax.Episode:
    return worlds.episode(worlds.LEARNERS["maml_support_statistics"], seed, padding=padding, dtype=dtype)


def _texts(seed: int, padding: int, dtype: Any) -> metajax.Episode:
    del dtype
    rng = np.random.default_rng(seed)

    def part(count: int) -> metajax.Examples:
        rows = count + padding
        mask = np.arange(3) < rng.integers(1, 4, [count + 4, 1])[:rows]
        tokens = rng.integers(1, 9, [count + 4, 3])[:rows]
        kept = np.arange(rows) < count
        targets = np.where(kept, np.arange(rows) % 2, 0)
        inputs = {"tokens": jnp.array(tokens * kept[:, None], jnp.int32), "mask": jnp.array(mask & kept[:, None])}
        return metajax.Examples(inputs, jnp.array(targets, jnp.int32), jnp.array(kept), jnp.ones(2, bool))

    return metajax.Episode(part(4), part(3))


def _numbers(seed: int, padding: int, dtype: Any) -> metajax.Episode:
    rng = np.random.default_rng(seed)

    def part(count: int) -> metajax.Examples:
        kept = np.arange(count + padding) < count
        inputs, targets = (rng.normal(size=(count + 4, size))[: count + padding] for size in (3, 2))
        inputs, targets = (jnp.asarray(leaf * kept[:, None], dtype) for leaf in (inputs, targets))
        return metajax.Examples(inputs, targets, jnp.array(kept))

    return metajax.Episode(part(5), part(4))


def _chunks(seed: int, padding: int, dtype: Any) -> metajax.Episode:
    """The padding is in the examples of a chunk and in whole chunks."""
    task = streams.episode(seed, dtype=dtype)
    mask = np.array(task.support.mask)
    mask[:, -1], mask[2] = False, padding == 0  # the amount of padding in a stream is no matter of its length
    kept = jnp.array(mask)
    support = task.support._replace(
        inputs=jnp.where(kept[..., None], task.support.inputs, 0), targets=jnp.where(kept, task.support.targets, 0),
        mask=kept,
    )  # fmt: skip
    return task._replace(support=support)


def _view(key: jax.Array, images: jax.Array) -> jax.Array:
    """Brightness, of each image by a key of its own."""
    keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.arange(len(images)))
    draws = jax.vmap(lambda key: jax.random.normal(key, (), images.dtype))(keys)
    return images * (1 + 0.3 * draws.reshape(-1, 1, 1, 1))


_FLAT = metajax.Model(
    lambda key, x: {"kernel": jax.random.normal(key, (x[0].size, 5))},
    lambda params, x: jnp.tanh(x.reshape(len(x), -1) @ params["kernel"]),
)
_TOKENS = models.decoder(16, width=8, depth=1, heads=2, remat=False)
_CONTRAST = {"dim": 4, "hidden": 5, "view": _view}

ROWS = {
    "contrastive_simclr": Row(
        learners.contrastive(_FLAT, **_CONTRAST), _images, support=False
    ),
    "contrastive_moco": Row(
        learners.contrastive(_FLAT, momentum=0.9, queue=8, **_CONTRAST), _images, support=False
    ),
    "contrastive_moco_v3": Row(
        learners.contrastive(_FLAT, momentum=0.9, **_CONTRAST), _images, support=False
    ),
    "in_context": Row(
        learners.in_context(_TOKENS, labels=[[10], [11]], separator=[12], end=[13]), _texts, ordered=True
    ),
    "proto_maml": Row(
        learners.proto_maml(models.mlp(worlds.FEATURES, hidden=(6,)), optax.sgd(0.3), 2, adapts="layer_0"), _classes
    ),
    "matching": Row(learners.matching(models.mlp(worlds.FEATURES, hidden=(6,))), _classes),
    "matching_full_context": Row(
        learners.matching(models.mlp(worlds.FEATURES, hidden=(6,)), full_context=True, steps=2), _classes, ordered=True
    ),
    "recurrent": Row(learners.recurrent(models.mlp(2, hidden=(6,)), 2, hidden=4), _numbers, ordered=True),
    "recurrent_labels": Row(
        learners.recurrent(models.mlp(worlds.WAYS), worlds.WAYS, hidden=4, task=tasks.classification), _classes,
        ordered=True,
    ),
    **{
        f"bilevel_{objective}": Row(
            streams.learner(objective), _chunks, ordered=True, support=True
        ) for objective in streams.OBJECTIVES
    },
}  # fmt: skip


def parameters(name: str, dtype: Any = np.float64) -> Any:
    """Meta-parameters at a point where nothing is special."""
    row = ROWS[name]
    start = row.learner.init(jax.random.key(0), row.episode(0, 0, dtype).query.inputs)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.2 * rng.normal(size=leaf.shape), dtype), start)
