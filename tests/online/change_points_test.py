"""Change-point detection against an independent NumPy recursion, and what it does to adaptation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax.online import change_points, recent, run_length_init, run_length_update, run_online

MEAN = metajax.Model(lambda key, x: jnp.zeros([1, 1]), lambda w, x: jnp.ones([len(x), 1]) @ w)
# one step of rate 0.5 on the squared error goes to the mean of the support set at once
LEARNER = metajax.learners.maml(MEAN, optax.sgd(0.5), loss=metajax.core.squared_error)
KEY = jax.random.key(0)


def log_likelihood(outputs, targets):
    return -2 * jnp.sum((outputs - targets) ** 2, axis=-1)


def points(values):
    """One item a value."""
    values = jnp.asarray(values, jnp.float32).reshape(-1, 1, 1)
    return metajax.Examples(jnp.ones_like(values), values, jnp.ones([len(values), 1], bool))


def along(online, values):
    items = points(values)
    state = online.init(KEY, jax.tree.map(lambda leaf: leaf[0], items), jnp.zeros([1, 1]))

    def step(state, item):
        state = online.observe(state, item)
        return state, (state.belief, state.evidence, online.adapt(state).params[0, 0])

    return jax.lax.scan(step, state, items)[1]


def test_the_belief_is_that_of_an_untruncated_recursion():
    """Adams and MacKay's recursion in probabilities and NumPy over all run lengths; the last bin holds the rest."""
    rng = np.random.default_rng(0)
    hazard, longest, steps = 0.1, 12, 10
    likelihoods = np.exp(rng.normal(size=(steps, longest + 1)))
    belief, exact = run_length_init(longest), np.array([1.0])
    for row in likelihoods:
        belief, evidence = run_length_update(belief, jnp.log(row), hazard=hazard)
        joint = exact * row[: len(exact)]
        assert float(evidence) == pytest.approx(np.log(joint.sum()), rel=1e-4, abs=1e-5)
        exact = np.concatenate([[hazard * joint.sum()], (1 - hazard) * joint]) / joint.sum()
        padded = np.zeros(longest + 1)
        padded[: len(exact)] = exact
        np.testing.assert_allclose(np.exp(belief), padded, rtol=1e-4, atol=1e-7)


def test_the_longest_run_takes_what_grows_beyond_it():
    belief = jnp.log(jnp.array([0.2, 0.3, 0.5]))
    belief, evidence = run_length_update(belief, jnp.log(jnp.array([1.0, 0.5, 0.1])), hazard=0.5)
    # joint 0.2, 0.15, 0.05, in all 0.4
    np.testing.assert_allclose(np.exp(belief), [0.5, 0.25, 0.25], rtol=1e-6)
    assert float(evidence) == pytest.approx(np.log(0.4))


def test_a_change_is_seen_and_what_was_before_it_forgotten():
    online = change_points(LEARNER, longest=10, hazard=0.05, log_likelihood=log_likelihood)
    values = [-2.0] * 8 + [2.0] * 6  # a prior of 0 predicts both alike
    belief, evidence, means = map(np.asarray, along(online, values))
    runs = belief.argmax(1)
    assert runs[7] == 8  # all steps so far
    np.testing.assert_array_equal(runs[8:], [1, 2, 3, 4, 5, 6])  # only what is new
    np.testing.assert_allclose(means[8:], 2.0, rtol=1e-5)
    np.testing.assert_allclose(means[7], -2.0, rtol=1e-5)
    assert evidence[8] == pytest.approx(np.log(0.05) - 8, abs=1e-3)  # as the prior said, after a change
    np.testing.assert_allclose(np.exp(belief).sum(1), 1, rtol=1e-5)


def test_it_loses_less_after_a_change_than_a_window_of_the_same_size():
    values = [-2.0] * 12 + [2.0] * 12
    items = [jax.tree.map(lambda leaf: leaf[0], points([value])) for value in values]
    losses = []
    for online in (
        change_points(LEARNER, longest=12, hazard=0.05, log_likelihood=log_likelihood),
        recent(LEARNER, window=12),
    ):
        state = online.init(KEY, items[0], jnp.zeros([1, 1]))
        losses.append(run_online(online, state, items, steps=24)[1])
    # the window's mean moves by 4/12 a step
    np.testing.assert_allclose(losses[1][12:16], [16, (44 / 12) ** 2, (40 / 12) ** 2, 9], rtol=1e-4)
    np.testing.assert_allclose(losses[0][13:], 0, atol=1e-6)  # one step is enough
    assert losses[0].sum() < 0.5 * losses[1].sum()


def test_padding_inside_of_an_item_says_nothing():
    online = change_points(LEARNER, longest=3, hazard=0.1, log_likelihood=log_likelihood)
    item = metajax.Examples(jnp.ones([2, 1]), jnp.array([[1.0], [jnp.nan]]), jnp.array([True, False]))
    state = online.observe(online.init(KEY, item, jnp.zeros([1, 1])), item)
    assert float(state.evidence) == pytest.approx(-2.0)
    assert np.all(np.isfinite(np.exp(state.belief)))
    assert float(online.adapt(state).params[0, 0]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run_length_init(0), "longest must be an integer of at least 1, got 0"),
        (
            lambda: run_length_update(jnp.zeros(3), jnp.zeros(2), hazard=0.1),
            r"log_likelihoods must be .* of belief \(3,\), got the shape \(2,\)",
        ),
        (
            lambda: change_points(LEARNER, longest=0, hazard=0.1, log_likelihood=log_likelihood),
            "longest must be an integer of at least 1, got 0",
        ),
        (
            lambda: change_points(None, longest=1, hazard=0.1, log_likelihood=log_likelihood),
            "learner must be of type Learner, got None",
        ),
        (
            lambda: change_points(LEARNER, longest=1, hazard=0.1, log_likelihood=1.0),
            "log_likelihood must be a function, got 1.0",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("hazard", [0.0, 1.0, -0.1, 2, float("nan")])
def test_a_hazard_is_above_0_and_below_1(hazard):
    with pytest.raises(ValueError, match=r"hazard must be .* above 0.*, got"):
        run_length_update(jnp.zeros(3), jnp.zeros(3), hazard=hazard)
    with pytest.raises(ValueError, match=r"hazard must be .* above 0.*, got"):
        change_points(LEARNER, longest=1, hazard=hazard, log_likelihood=log_likelihood)
