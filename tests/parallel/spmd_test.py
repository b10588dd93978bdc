"""`shard_tasks` on simulated devices; agreement over many steps stands in tests/training/outer_test.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax


def _outer(axis_name):
    learner = metajax.learners.maml(metajax.models.mlp(outputs=2, hidden=(3,)), inner=optax.sgd(0.1))
    return metajax.outer_update(
        learner, optax.adam(1e-2), hypergrad=metajax.hypergrad.mixed_mode(), axis_name=axis_name
    )


def _episodes(tasks):
    rng = np.random.default_rng(0)
    examples = lambda: metajax.Examples(  # noqa: E731
        rng.normal(size=(tasks, 4, 3)), np.tile([0, 0, 1, 1], (tasks, 1)), np.ones((tasks, 4), bool),
        np.ones((tasks, 2), bool),
    )  # fmt: skip
    return metajax.Episode(examples(), examples())


def test_several_devices_give_what_one_gives_and_compile_once():
    episodes = _episodes(8)
    one = jax.tree.map(lambda leaf: leaf[0], episodes)
    single, several = _outer(None), metajax.parallel.shard_tasks(_outer("task"), devices=jax.devices()[:4])
    expected, state = single.init(jax.random.key(0), one), several.init(jax.random.key(0), one)
    traced = []

    def counted(state, episodes):
        traced.append(1)
        return several.update(state, episodes)

    update = jax.jit(counted)
    for _ in range(3):
        expected, known = single.update(expected, episodes)
        state, metrics = update(state, episodes)
    assert len(traced) == 1
    for name in known:
        np.testing.assert_allclose(metrics[name], known[name], rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_tasks_that_do_not_divide_are_refused():
    outer = metajax.parallel.shard_tasks(_outer("task"), devices=jax.devices()[:4])
    episodes = _episodes(6)
    state = outer.init(jax.random.key(0), jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), episodes))
    with pytest.raises(ValueError, match="multiple of 4 devices, got 6"):
        outer.update(state, episodes)


def test_a_meta_step_without_an_axis_is_refused():
    with pytest.raises(ValueError, match=r"outer must be made with an axis name, .* got None"):
        metajax.parallel.shard_tasks(_outer(None))
