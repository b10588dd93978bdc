"""Every learner with the estimators that carry state, draw, truncate or go forwards: rows of the contract table."""

import functools

import jax
import numpy as np
import pytest
import worlds

import metajax
from metajax import hypergrad

pytestmark = pytest.mark.usefixtures("x64")

ESTIMATORS = {
    "forward_mode": hypergrad.forward_mode(),
    "truncated": hypergrad.truncated(1),
    "persistent_truncation": hypergrad.persistent_truncation(1),
    "evolution": hypergrad.evolution(sigma=0.01, pairs=2),
    "persistent_evolution": hypergrad.persistent_evolution(sigma=0.01, pairs=2, steps=1),
}
CARRIED = ("persistent_truncation", "persistent_evolution")
PAIRS = [
    (name, estimator)
    for name, row in worlds.LEARNERS.items()
    for estimator in ESTIMATORS
    if row.learner.problem is not None or estimator not in CARRIED
]
# the default run: one learner with every estimator, and each learner with the one that compiles fastest, but for the
# convolutional row, which takes several times as long as the others
PAIRS = worlds.few_by_default(
    PAIRS, lambda name, estimator: name == "anil" or (estimator == "truncated" and not worlds.LEARNERS[name].images)
)
KEY = jax.random.key(0)


@functools.cache
def compiled(name, estimator):
    return jax.jit(worlds.first_step(worlds.LEARNERS[name].learner, ESTIMATORS[estimator]))


@pytest.mark.parametrize(("name", "estimator"), PAIRS)
def test_rows(name, estimator):
    row, params, episode = worlds.world(name)
    (loss, aux), grads = compiled(name, estimator)(params, episode, key=KEY)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert worlds.dot(grads, grads) > 0
    if estimator not in CARRIED and name not in ("reptile", "bayesian"):  # a key draws minibatches, and weights
        np.testing.assert_allclose(loss, worlds.outer_loss(name)(params, episode), rtol=1e-12)
    assert aux.outputs.shape == (9, worlds.WAYS)
    (again, _), same = compiled(name, estimator)(params, episode, key=KEY)
    assert float(again) == float(loss)
    assert worlds.relative_distance(same, grads) == 0
    if estimator == "forward_mode":
        exact = jax.jit(hypergrad.value_and_grad(row.learner, hypergrad.mixed_mode()))(params, episode, key=KEY)[1]
        assert worlds.relative_distance(grads, exact) < 1e-9


@pytest.mark.parametrize(("name", "estimator"), PAIRS)
def test_content_of_padding(name, estimator):
    _, params, episode = worlds.world(name)
    (loss, _), grads = compiled(name, estimator)(params, episode, key=KEY)
    spoiled = worlds.spoil_padding(episode, np.nan, 99)
    (other, _), other_grads = compiled(name, estimator)(params, spoiled, key=KEY)
    np.testing.assert_allclose(other, loss, rtol=1e-12)
    assert worlds.relative_distance(other_grads, grads) < 1e-12


@pytest.mark.parametrize("estimator", worlds.few_by_default(ESTIMATORS, lambda name: name in CARRIED))
def test_one_compilation_in_the_meta_step(estimator):
    row, params, episode = worlds.world("anil")
    outer = metajax.outer_update(row.learner, metajax.inner.adam(1e-2), hypergrad=ESTIMATORS[estimator])
    update, state = jax.jit(outer.update), outer.init(KEY, episode, params=params, num_tasks=2)
    losses = []
    for _ in range(3):
        state, metrics = update(state, worlds.stack([episode, episode]))
        losses.append(float(metrics["loss"]))
    assert update._cache_size() == 1
    assert np.isfinite(losses).all()
    assert losses[-1] != losses[0]
