"""Augmented meta steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax import Episode, Examples, OuterUpdate, data, training


def _episodes(tasks: int = 2) -> Episode:
    examples = Examples(jnp.ones([tasks, 3, 2]), jnp.zeros([tasks, 3], jnp.int32), jnp.ones([tasks, 3], bool))
    return Episode(examples, examples)


def _recording() -> OuterUpdate:
    """A meta step whose metrics are the episodes that it was given."""
    learner = metajax.learners.maml(metajax.models.mlp(outputs=2), inner=optax.sgd(0.1))
    outer = metajax.outer_update(learner, optax.sgd(0.1), hypergrad=metajax.hypergrad.first_order())
    return outer._replace(update=lambda state, episodes: (state._replace(step=state.step + 1), episodes))


def _noise(key, inputs):
    return inputs + jax.random.uniform(key, inputs.shape)


def test_every_task_set_and_step_draws_its_own():
    outer = training.augment(_recording(), _noise)
    state = outer.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], _episodes()))
    draws = []
    for _ in range(2):
        state, seen = outer.update(state, _episodes())
        draws += [*seen.support.inputs, *seen.query.inputs]
        np.testing.assert_array_equal(seen.support.targets, _episodes().support.targets)
    assert len({np.asarray(draw).tobytes() for draw in draws}) == 8
    assert all((draw >= 1).all() for draw in draws)


def test_same_state_same_draws():
    outer = training.augment(_recording(), _noise)
    state = outer.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], _episodes()))
    first, second = (outer.update(state, _episodes())[1].query.inputs for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_over_devices_as_on_one():
    learner = metajax.learners.prototypical(metajax.models.conv4(width=8, depth=2, pool=False))
    source, spec = data.glyphs("val"), data.EpisodeSpec(ways=3, shots=1, queries=2)
    transform = functools.partial(data.random_affine, rotation=10, shift=0.1)
    found = []
    for spread in (False, True):
        outer = metajax.outer_update(
            learner, optax.sgd(0.1), hypergrad=metajax.hypergrad.unrolled(), axis_name="task" if spread else None
        )
        outer = metajax.parallel.shard_tasks(outer) if spread else outer
        outer = training.augment(outer, transform)
        state = outer.init(jax.random.key(0), data.episode(source, spec, seed=0, index=0))
        episodes = data.episode_batch(source, spec, seed=0, start=0, count=8)
        found.append(jax.jit(outer.update)(state, episodes)[1]["loss"])
    assert jax.local_device_count() == 8
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_transform_that_changes_the_dtype():
    outer = training.augment(_recording(), lambda key, inputs: inputs.astype(jnp.bfloat16))
    state = outer.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], _episodes()))
    with pytest.raises(ValueError, match="transform must keep structure, shapes and dtypes"):
        outer.update(state, _episodes())
