"""Reptile's minibatches: drawn without replacement among the kept examples, anew in each step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax import learners
from metajax.learners import _maml

MODEL = metajax.Model(lambda key, x: jnp.zeros([x.shape[-1], 8]), lambda w, x: x @ w)
# example i is the i-th unit vector: the rows of the adapted weights that moved are the examples that were drawn
SUPPORT = metajax.Examples(jnp.eye(8), jnp.arange(8), jnp.arange(8) < 6)


@functools.cache
def adapt(steps, batch_size):
    learner = learners.reptile(MODEL, optax.sgd(1.0), steps, batch_size=batch_size)
    return jax.jit(lambda support, key: learner.adapt(jnp.zeros([8, 8]), support, key=key).params)


def drawn(key, *, steps=1, batch_size=2, support=SUPPORT):
    weights = adapt(steps, batch_size)(support, key)
    return np.flatnonzero(np.any(weights != 0, axis=1))


def test_without_replacement_among_the_kept():
    found = [drawn(jax.random.key(seed)) for seed in range(20)]
    assert {len(rows) for rows in found} == {2}
    assert set(np.concatenate(found)) == set(range(6))


def test_anew_in_each_step():
    assert max(len(drawn(jax.random.key(seed), steps=3)) for seed in range(5)) > 2


def test_the_mean_is_over_the_batch():
    """One step of rate 1 from zero moves the row of a drawn example by (one-hot - 1/8) / size of the batch."""
    learner = learners.reptile(MODEL, optax.sgd(1.0), 1, batch_size=4)
    weights = np.asarray(learner.adapt(jnp.zeros([8, 8]), SUPPORT, key=jax.random.key(0)).params)
    rows = np.flatnonzero(np.any(weights != 0, axis=1))
    np.testing.assert_allclose(weights[rows], (np.eye(8)[rows] - 1 / 8) / 4, rtol=1e-5)


def test_fewer_kept_than_asked_for_takes_them_all():
    few = SUPPORT._replace(mask=jnp.arange(8) == 3)
    assert drawn(jax.random.key(0), support=few).tolist() == [3]
    assert drawn(jax.random.key(0), batch_size=100).tolist() == list(range(6))


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}])
def test_the_whole_set_without_a_key_or_a_size(options):
    learner = learners.reptile(MODEL, optax.sgd(1.0), 1, **options)
    weights = learner.adapt(jnp.zeros([8, 8]), SUPPORT, key=None if options else jax.random.key(0)).params
    np.testing.assert_allclose(weights[:6], (np.eye(8)[:6] - 1 / 8) / 6, rtol=1e-5)
    np.testing.assert_array_equal(weights[6:], 0)


def test_padding_does_not_change_which_are_kept_in_a_batch():
    batch = _maml._minibatch(SUPPORT, 6, jax.random.key(0))
    assert np.all(batch.mask)
    assert sorted(batch.targets.tolist()) == list(range(6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        learners.reptile(MODEL, optax.sgd(0.1), **arguments)
