"""Every learner with the estimators that carry state, draw, truncate or go forwards: rows of the contract table."""

import functools

import jax
import jax.numpy as jnp
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
    "evolution": hypergrad.evolution(sigma=1e-5, pairs=2),
    "persistent_evolution": hypergrad.persistent_evolution(sigma=1e-5, pairs=2, steps=1),
}
CARRIED = ("persistent_truncation", "persistent_evolution")
PAIRS = [
    (name, estimator)
    for name, row in worlds.LEARNERS.items()
    for estimator in ESTIMATORS
    if row.learner.problem is not None or estimator not in CARRIED
]
# the default run: one learner with every estimator, and two more with the one that compiles fastest
PAIRS = worlds.few_by_default(
    PAIRS, lambda name, estimator: name == "anil" or (estimator == "truncated" and name in ("maml", "prototypical"))
)
KEY = jax.random.key(0)


@functools.cache
def compiled(name, estimator):
    return jax.jit(worlds.first_step(worlds.LEARNERS[name].learner, ESTIMATORS[estimator]))


@functools.cache
def exact(name, steps, key):
    """The gradient of the outer loss after so many inner steps, with the key of `worlds.first_step` or without one."""
    learner = worlds.LEARNERS[name].learner
    loss = lambda params, episode: metajax.core.outer_objective(  # noqa: E731
        learner, params, episode, key=jax.random.split(KEY)[1] if key else None, num_steps=steps
    )[0]
    return jax.jit(jax.grad(loss))(*worlds.world(name)[1:])


def one_segment(name):
    """Inner steps of the first segment, None for a learner that takes none."""
    return None if worlds.LEARNERS[name].learner.problem is None else 1


def check_all_steps(name, grads, key=True):
    assert worlds.relative_distance(grads, exact(name, None, key)) < 1e-9


def check_last_step(name, grads):
    """One step differentiated; those before pass a change of the start on as it is."""
    if worlds.LEARNERS[name].learner.problem is None:
        return check_all_steps(name, grads, key=False)
    row, params, episode = worlds.world(name)
    end, problem = worlds.last_step(name), row.learner.problem
    before = jax.lax.stop_gradient(end.before(params))
    slope = jax.grad(lambda fast, meta: problem.loss(fast, meta, episode.support, 0, None))
    _, through_slope = jax.vjp(slope, before, params)
    of_fast, of_meta = through_slope(end.of_slope)
    _, to_start = jax.vjp(lambda meta: problem.init(meta, episode.support, None), params)
    (of_start,) = to_start(jax.tree.map(jnp.add, end.of_before, of_fast))
    expected = jax.tree.map(lambda *parts: sum(parts), end.direct, end.of_rule, of_meta, of_start)
    assert worlds.relative_distance(grads, expected) < 1e-9


def check_first_segment(name, grads):
    """The first segment of a persistent truncation leaves nothing out, and has no key here."""
    assert worlds.relative_distance(grads, exact(name, one_segment(name), False)) < 1e-9


def check_direction(name, grads, steps=None):
    """Each pair's estimate is its direction times the slope along it, so that the mean goes up the slope."""
    slope = exact(name, steps, name in ("reptile", "bayesian"))
    cosine = worlds.dot(grads, slope) / (worlds.dot(grads, grads) * worlds.dot(slope, slope)) ** 0.5
    assert cosine > 0.01


def check_direction_of_segment(name, grads):
    check_direction(name, grads, one_segment(name))


CHECKS = {
    "forward_mode": (check_all_steps, KEY),
    "truncated": (check_last_step, None),
    "persistent_truncation": (check_first_segment, None),
    "evolution": (check_direction, KEY),
    "persistent_evolution": (check_direction_of_segment, KEY),
}


@pytest.mark.parametrize(("name", "estimator"), PAIRS)
def test_gradient(name, estimator):
    """Each against what it promises, written without it; a turned sign fails."""
    check, key = CHECKS[estimator]
    _, params, episode = worlds.world(name)
    grads = compiled(name, estimator)(params, episode, key=key)[1]
    check(name, grads)
    with pytest.raises(AssertionError):
        check(name, jax.tree.map(lambda leaf: -leaf, grads))


@pytest.mark.parametrize(("name", "estimator"), PAIRS)
def test_rows(name, estimator):
    _, params, episode = worlds.world(name)
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
