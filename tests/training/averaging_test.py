"""Averages of parameters, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax import training

LEARNER = metajax.learners.maml(metajax.models.mlp(2, hidden=(4,)), optax.sgd(0.1))
EXAMPLES = metajax.Examples(jnp.eye(4), jnp.array([0, 0, 1, 1]), jnp.ones(4, bool))
EPISODES = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), metajax.Episode(EXAMPLES, EXAMPLES))


def meta_step():
    return metajax.outer_update(LEARNER, optax.sgd(0.5), hypergrad=metajax.hypergrad.first_order())


def test_a_soup_is_the_weighted_mean_and_keeps_dtypes():
    one = {"w": jnp.array([1.0, 5.0], jnp.bfloat16), "count": jnp.array(3)}
    other = {"w": jnp.array([3.0, 1.0], jnp.bfloat16), "count": jnp.array(3)}
    found = training.soup([one, other])
    assert found["w"].tolist() == [2.0, 3.0]
    assert found["w"].dtype == jnp.bfloat16
    assert int(found["count"]) == 3
    assert training.soup([one, other], [1, 3])["w"].tolist() == [2.5, 2.0]


def test_a_greedy_soup_leaves_out_what_makes_it_worse():
    """The target is 3. In order of score: 4, then 1 (the mean, 2.5, is nearer), then 9 (it would be 4.67)."""
    found, kept = training.greedy_soup([np.array(9.0), np.array(4.0), np.array(1.0)], lambda x: -abs(float(x) - 3))
    assert (float(found), kept) == (2.5, (1, 2))


def test_solutions_of_two_tasks_are_averaged_where_they_lie():
    """What `adapt` gives for two tasks."""
    params = LEARNER.init(jax.random.key(0), EXAMPLES.inputs)
    other = EXAMPLES._replace(targets=1 - EXAMPLES.targets)
    solved = [LEARNER.adapt(params, support).params for support in (EXAMPLES, other)]
    mean = training.soup(solved)
    biases = [np.asarray(params["head"]["bias"]) for params in solved]
    np.testing.assert_allclose(mean["head"]["bias"], (biases[0] + biases[1]) / 2, rtol=1e-6)


def test_the_moving_average_follows_its_rule_and_leaves_training_alone():
    plain, outer = meta_step(), training.averaged(meta_step(), decay=0.2)
    example = jax.tree.map(lambda leaf: leaf[0], EPISODES)
    bare, state = plain.init(jax.random.key(0), example), outer.init(jax.random.key(0), example)
    average = jax.tree.map(np.asarray, bare.params)
    update, step = jax.jit(outer.update), jax.jit(plain.update)
    for kept in (2 / 11, 0.2, 0.2):  # (1 + t) / (10 + t), then the decay
        state, metrics = update(state, EPISODES)
        bare, expected = step(bare, EPISODES)
        assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]))
        average = jax.tree.map(lambda old, new, k=kept: k * old + (1 - k) * np.asarray(new), average, bare.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.params, bare.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), training.averaged_params(state), average
    )
    assert update._cache_size() == 1


def test_the_moving_average_is_spread_over_devices_too():
    mesh = metajax.parallel.make_mesh(devices=jax.devices()[:2])
    outer = training.averaged(meta_step())
    example = jax.tree.map(lambda leaf: leaf[0], EPISODES)
    found = []
    for one in (outer, metajax.parallel.shard(outer, mesh)):
        state, _ = jax.jit(one.update)(one.init(jax.random.key(0), example), EPISODES)
        found.append(training.averaged_params(state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *found)


def test_bad_input_is_refused():
    one = {"w": jnp.ones(2)}
    for arguments, text in (
        (([],), r"solutions must be trees of one structure, shapes and dtypes, got \[\]"),
        (([one, {"w": jnp.ones(3)}],), "solutions must be trees of one structure"),
        (([one, {"v": jnp.ones(2)}],), "solutions must be trees of one structure"),
        (([one, one], [1]), r"weights must be 2 numbers, one of them above 0, got \[1\]"),
        (([one], [0.0]), "weights must be 1 numbers, one of them above 0"),
        (([one], [-1.0]), "weights must be a finite number of at least 0, got -1.0"),
        (([{"n": jnp.array(1)}, {"n": jnp.array(2)}],), "solutions must agree in what is no floating-point number"),
    ):
        with pytest.raises(ValueError, match=text):
            training.soup(*arguments)
    with pytest.raises(ValueError, match="score must give numbers"):
        training.greedy_soup([one, one], lambda params: float("nan"))
    with pytest.raises(ValueError, match=r"decay must be a number of at least 0 and below 1, got 1\.0"):
        training.averaged(meta_step(), decay=1.0)
    with pytest.raises(ValueError, match="outer must be of type OuterUpdate"):
        training.averaged(5)
    state = meta_step().init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], EPISODES))
    with pytest.raises(ValueError, match="must be of type Averaged"):
        training.averaged_params(state)
