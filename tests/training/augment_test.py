"""Augmented meta steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax import Episode, Examples, OuterUpdate, data, training


def _episodes(tasks: int = 2) -> Episode:
    examples = Examples(
        jnp.ones([tasks, 4, 2, 2, 1]), jnp.tile(jnp.array([0, 0, 1, 1]), (tasks, 1)), jnp.ones([tasks, 4], bool),
        jnp.ones([tasks, 2], bool),
    )  # fmt: skip
    return Episode(examples, examples)


def _recording() -> OuterUpdate:
    """A meta step whose metrics are the episodes that it was given."""
    learner = metajax.learners.maml(metajax.models.mlp(outputs=2), inner=optax.sgd(0.1))
    outer = metajax.outer_update(learner, optax.sgd(0.1), hypergrad=metajax.hypergrad.first_order())
    return outer._replace(update=lambda state, episodes: (state._replace(step=state.step + 1), episodes))


_NOISE = data.Transform(1, lambda images, numbers: images + numbers[:, :, None, None])


def test_every_task_set_and_step_draws_its_own():
    outer = training.augment(_recording(), _NOISE)
    state = outer.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], _episodes()))
    draws = []
    for _ in range(2):
        state, seen = outer.update(state, _episodes())
        draws += [*seen.support.inputs, *seen.query.inputs]
        np.testing.assert_array_equal(seen.support.targets, _episodes().support.targets)
    assert len({np.asarray(draw).tobytes() for draw in draws}) == 8
    assert all((draw >= 1).all() for draw in draws)


def test_same_state_same_draws():
    outer = training.augment(_recording(), _NOISE)
    state = outer.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], _episodes()))
    first, second = (outer.update(state, _episodes())[1].query.inputs for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.slow  # a mesh; the meta step itself is compared over meshes in tests/parallel
def test_over_devices_as_on_one():
    learner = metajax.learners.prototypical(metajax.models.conv4(width=4, depth=1, pool=False))
    source, spec = data.glyphs("val"), data.EpisodeSpec(ways=3, shots=1, queries=2)
    transform = data.random_affine(rotation=10, shift=0.1)
    found = []
    for spread in (False, True):
        outer = metajax.outer_update(learner, optax.sgd(0.1), hypergrad=metajax.hypergrad.unrolled())
        outer = metajax.parallel.shard(outer, metajax.parallel.make_mesh()) if spread else outer
        outer = training.augment(outer, transform)
        state = outer.init(jax.random.key(0), data.episode(source, spec, seed=0, index=0))
        episodes = data.episode_batch(source, spec, seed=0, start=0, count=8)
        found.append(jax.jit(outer.update)(state, episodes)[1]["loss"])
    assert jax.local_device_count() == 8
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_who_shares_a_change():
    for shared, different in (("example", 8), ("class", 2), ("episode", 1)):
        outer = training.augment(_recording(), _NOISE._replace(shared=shared))
        state = outer.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], _episodes()))
        _, seen = outer.update(state, _episodes())
        for task in range(2):
            values = jnp.concatenate([seen.support.inputs[task, :, 0, 0, 0], seen.query.inputs[task, :, 0, 0, 0]])
            assert len(set(values.tolist())) == different
        assert seen.support.inputs[0, 0, 0, 0, 0] != seen.support.inputs[1, 0, 0, 0, 0]


def test_support_and_query_apart():
    outer = training.augment(_recording(), support=data.Transform(0, lambda images, numbers: 3 * images))
    state = outer.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], _episodes()))
    _, seen = outer.update(state, _episodes())
    assert (seen.support.inputs == 3).all()
    assert (seen.query.inputs == 1).all()


def test_transforms_that_do_not_fit():
    state = _recording().init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], _episodes()))
    with pytest.raises(ValueError, match="transforms must keep shapes and dtypes"):
        training.augment(_recording(), data.resize(3)).update(state, _episodes())
    with pytest.raises(ValueError, match="both must be a transform or a list of them"):
        training.augment(_recording(), lambda key, images: images)
    plain = jax.tree.map(lambda leaf: leaf, _episodes())
    plain = Episode(*(part._replace(class_mask=None) for part in plain))
    with pytest.raises(ValueError, match="shared by a class need episodes of classes, with a class_mask"):
        training.augment(_recording(), data.per_class(_NOISE)).update(state, plain)
