"""The inner loop: against gradient descent in NumPy, step by step and as a whole, keys and edge cases."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax.core import _inner, _keys

INPUTS = np.array([[1.0, 2.0], [0.0, 1.0], [3.0, -1.0]])
TARGETS = np.array([[1.0], [2.0], [0.0]])
START = np.array([[0.5], [-1.0]])
LINEAR = metajax.Model(lambda key, x: jnp.zeros([x.shape[-1], 1]), lambda w, x: x @ w)
SUPPORT = metajax.Examples(jnp.array(INPUTS), jnp.array(TARGETS), jnp.ones(3, bool))


def descend(steps, rate=0.1, momentum=0.0):
    weights, trace, losses = START, 0.0, []
    for _ in range(steps):
        error = INPUTS @ weights - TARGETS
        losses.append(np.mean(error**2))
        trace = 2 * INPUTS.T @ error / 3 + momentum * trace
        weights = weights - rate * trace
    return weights, losses


def learner(inner, steps=3):
    return metajax.learners.maml(LINEAR, inner, steps, loss=metajax.core.squared_error)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_unroll_is_gradient_descent(steps, momentum):
    problem = learner(optax.sgd(0.1, momentum=momentum)).problem
    result = _inner.unroll(problem, jnp.array(START), SUPPORT, num_steps=steps)
    weights, losses = descend(steps, momentum=momentum)
    np.testing.assert_allclose(result.params, weights, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(result.losses.values, losses, rtol=2e-6)
    np.testing.assert_array_equal(result.initial, START)
    assert result.losses.values.shape == (steps,)


def test_inner_update_is_one_step_of_the_loop():
    problem = learner(optax.sgd(0.1, momentum=0.9)).problem
    state = metajax.inner_init(problem)(jnp.array(START), SUPPORT)
    update = jax.jit(metajax.inner_update(problem))
    for steps in range(1, 4):
        state = update(state, jnp.array(START), SUPPORT)
        assert int(state.step) == steps
        np.testing.assert_allclose(state.params, descend(steps, momentum=0.9)[0], rtol=2e-6)
    assert update._cache_size() == 1


@pytest.mark.parametrize("steps", [-1, 1.5, "2"])
def test_number_of_steps(steps):
    with pytest.raises(ValueError, match=f"num_steps must be an integer of at least 0, got {steps!r}"):
        learner(optax.sgd(0.1)).adapt(jnp.array(START), SUPPORT, num_steps=steps)


def test_every_step_has_a_key_of_its_own_and_the_update_sees_the_same():
    seen = []

    def noise(params, meta_params, support, step, key):
        jax.debug.callback(lambda *found: seen.append(tuple(int(value) for value in found)), step, jax.random.bits(key))
        return jnp.sum(params * jax.random.normal(key, params.shape))

    problem = metajax.InnerProblem(
        lambda meta, support, key: meta, noise, lambda meta: optax.sgd(1.0), 3,
        lambda params, meta, support, key: params,
    )  # fmt: skip
    key = jax.random.key(7)
    whole = _inner.unroll(problem, jnp.zeros(2), SUPPORT, key=key)
    jax.effects_barrier()
    assert sorted(step for step, _ in seen) == [0, 1, 2]
    assert len({bits for _, bits in seen}) == 3
    state = metajax.inner_init(problem)(jnp.zeros(2), SUPPORT, key=key)
    for _ in range(3):
        state = metajax.inner_update(problem)(state, jnp.zeros(2), SUPPORT, key)
    np.testing.assert_allclose(state.params, whole.params, rtol=1e-6)


def test_keys():
    assert _keys.split(None, 2) == [None, None]
    assert _keys.fold(None, 1) is None
    key = jax.random.key(0)
    assert jnp.array_equal(jax.random.key_data(_keys.fold(key, 3)), jax.random.key_data(jax.random.fold_in(key, 3)))
    a, b = _keys.split(key, 2)
    assert not jnp.array_equal(jax.random.key_data(a), jax.random.key_data(b))


def test_frozen_parameters_may_hold_integers_and_are_no_part_of_the_carry():
    meta = {"w": jnp.array(START), "table": jnp.array([1, 2], jnp.int32)}
    problem = metajax.InnerProblem(
        lambda meta, support, key: {"w": meta["w"]},
        lambda params, meta, support, step, key: jnp.sum(params["w"] * meta["table"][:, None]),
        lambda meta: optax.sgd(0.1), 2, lambda params, meta, support, key: {**meta, **params},
    )  # fmt: skip
    trained, frozen = {"w": meta["w"], "table": None}, {"w": None, "table": meta["table"]}
    result = _inner.unroll(problem, trained, SUPPORT, frozen=frozen)
    np.testing.assert_allclose(result.params["w"], START - 0.2 * np.array([[1.0], [2.0]]), rtol=1e-6)
    assert result.adapted["table"].dtype == jnp.int32
