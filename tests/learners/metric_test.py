"""Prototypes: other ways and shots than in training, absent classes, edge cases, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

import metajax
from metajax import hypergrad, learners

IDENTITY = metajax.Model(lambda key, x: {}, lambda params, x: x)


def examples(inputs, labels, **rest):
    return metajax.Examples(jnp.array(inputs), jnp.array(labels), jnp.ones(len(labels), bool))._replace(**rest)


SUPPORT = examples([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]], [0, 0, 1])


def test_by_hand():
    learner = learners.prototypical(IDENTITY, scale=0.5)
    adapted = learner.adapt({}, SUPPORT)
    np.testing.assert_allclose(adapted.head, [[1.0, 0.0], [0.0, 4.0]])
    np.testing.assert_allclose(learner.predict(adapted, jnp.array([[1.0, 4.0]])), [[-8.0, -0.5]])
    cosine = learners.prototypical(IDENTITY, distance="cosine", scale=2.0)
    found = cosine.predict(cosine.adapt({}, SUPPORT), jnp.array([[3.0, 4.0]]))
    np.testing.assert_allclose(found, [[1.2, 1.6]], rtol=1e-6)


def test_centred_cosines_by_hand():
    learner = learners.prototypical(IDENTITY, distance="centred_cosine", scale=2.0)
    # prototypes (1, 0) and (0, 4), their mean (0.5, 2); the query is (2, 1.5) from it, the prototypes (0.5, -2) and its
    # negative; the absent third class has no part in the mean
    for more in ({}, {"class_mask": jnp.array([True, True, False])}):
        adapted = learner.adapt({}, SUPPORT._replace(**more))
        found = learner.predict(adapted, jnp.array([[2.5, 3.5]]))[:, :2]
        cosine = (2 * 0.5 - 1.5 * 2) / np.hypot(2, 1.5) / np.hypot(0.5, 2)
        np.testing.assert_allclose(found, [[2 * cosine, -2 * cosine]], rtol=1e-6)
    moved = SUPPORT._replace(inputs=SUPPORT.inputs + 100.0)
    np.testing.assert_allclose(learner.predict(learner.adapt({}, moved), jnp.array([[102.5, 103.5]])), found, rtol=1e-4)
    # one class alone is its own centre
    alone = learner.adapt({}, SUPPORT._replace(targets=jnp.zeros(3, int)))
    np.testing.assert_array_equal(learner.predict(alone, jnp.ones([1, 2])), 0)


def test_any_ways_and_shots():
    learner = learners.prototypical(IDENTITY)
    for ways, shots in ((2, 1), (7, 3)):
        labels = np.repeat(np.arange(ways), shots)
        adapted = learner.adapt({}, examples(np.eye(ways)[labels], labels))
        assert learner.predict(adapted, jnp.eye(ways)).argmax(1).tolist() == list(range(ways))


def test_ways_under_jit():
    for learner, support in (
        (learners.prototypical(IDENTITY, ways=3), SUPPORT),
        (learners.prototypical(IDENTITY), SUPPORT._replace(class_mask=jnp.ones(3, bool))),
    ):
        outputs = jax.jit(lambda s, f=learner: f.predict(f.adapt({}, s), s.inputs))(support)
        assert outputs.shape == (3, 3)
        np.testing.assert_array_equal(outputs[:, 2], -1e9)  # no example of it
    with pytest.raises(ValueError, match="the number of ways is unknown"):
        jax.jit(lambda s: learners.prototypical(IDENTITY).adapt({}, s))(SUPPORT)


def test_a_class_that_the_mask_denies():
    adapted = learners.prototypical(IDENTITY).adapt({}, SUPPORT._replace(class_mask=jnp.array([True, False])))
    assert adapted.class_mask.tolist() == [True, False]


def test_no_support_is_no_class_and_no_nan():
    learner = learners.prototypical(IDENTITY, ways=2)
    adapted = learner.adapt({}, SUPPORT._replace(mask=jnp.zeros(3, bool), inputs=jnp.full([3, 2], jnp.nan)))
    assert not np.any(adapted.class_mask)
    np.testing.assert_array_equal(learner.predict(adapted, jnp.ones([1, 2])), -1e9)


def test_cosine_of_a_zero_vector_has_a_finite_gradient():
    model = metajax.Model(lambda key, x: {}, lambda params, x: x * params)
    learner = learners.prototypical(model, distance="cosine")
    fn, episode = hypergrad.value_and_grad(learner, hypergrad.unrolled()), metajax.Episode(SUPPORT, SUPPORT)
    (loss, _), grads = jax.jit(lambda params: fn(params, episode))(jnp.zeros(2))  # the number of ways is in the data
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    assert np.all(np.isfinite(grads))


def test_an_unlabelled_example_is_no_member():
    labels = jnp.array([0, -1, 1])
    adapted = learners.prototypical(IDENTITY).adapt({}, SUPPORT._replace(targets=labels))
    np.testing.assert_allclose(adapted.head, [[0.0, 0.0], [0.0, 4.0]])


def test_there_is_no_inner_problem_and_steps_mean_nothing(x64):
    row = worlds.LEARNERS["prototypical"]
    params, episode = worlds.parameters(row), worlds.episode(row)
    assert row.learner.problem is None
    heads = [row.learner.adapt(params, episode.support, num_steps=steps).head for steps in (0, 9)]
    np.testing.assert_array_equal(*heads)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distance": "manhattan"}, "distance must be one of 'euclidean', 'cosine', 'centred_cosine', got 'manhattan'"),
        ({"scale": 0.0}, "scale must be a finite number above 0, got 0.0"),
        ({"scale": float("inf")}, "scale must be a finite number above 0, got inf"),
        ({"ways": 0}, "ways must be an integer of at least 1, got 0"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        learners.prototypical(IDENTITY, **arguments)
