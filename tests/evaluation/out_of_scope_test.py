"""AUROC against a count of pairs; inputs of no class beside the episodes of `evaluate`; shuffled support labels."""

import jax
import numpy as np
import optax
import pytest

import metajax
from metajax import data, learners
from metajax.evaluation import _fewshot, auroc, evaluate, out_of_scope

IDENTITY = metajax.Model(lambda key, x: (), lambda params, x: x)
LEARNER = learners.prototypical(IDENTITY)
SPEC = data.EpisodeSpec(3, 2, 4)


@pytest.fixture(scope="module")
def source():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(8), 12)
    inputs = (3 * rng.normal(size=(8, 6))[labels] + 0.5 * rng.normal(size=(96, 6))).astype(np.float32)
    return data.ClassSource("clouds", "test", inputs, labels, tuple("abcdefgh"))


def outside(inputs):
    return data.ClassSource("none", "test", np.asarray(inputs, np.float32), np.zeros(len(inputs), int), ("none",))


def test_auroc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(1)
    for _ in range(20):
        scores, positive = rng.integers(0, 6, 30), rng.random(30) < 0.4
        scores = np.where(rng.random(30) < 0.1, np.inf, scores)
        high, low = scores[positive][:, None], scores[~positive][None]
        assert auroc(scores, positive) == pytest.approx(np.mean((high > low) + 0.5 * (high == low)), abs=1e-12)
    assert np.isnan(auroc([np.nan, 1.0], np.array([True, False])))


@pytest.mark.parametrize(
    ("scores", "positive", "text"),
    [
        ([1.0, 2.0], [True, True], "positive must hold True and False, got 2 True in 2"),
        ([1.0, 2.0], [False, False], "got 0 True in 2"),
        ([1.0, 2.0], [1, 0], "positive must be a line of bool"),
        ([1.0], [True, False], "one for each of the scores"),
    ],
)
def test_auroc_refuses(scores, positive, text):
    with pytest.raises(ValueError, match=text):
        auroc(scores, np.array(positive))


@pytest.mark.parametrize("score", ["logit", "probability"])
def test_values_are_those_of_the_episodes(source, score):
    beyond = outside(np.random.default_rng(2).normal(size=(12, 6)))  # as many as queries: all of them in each episode
    done, options = [], {"judge": out_of_scope(beyond, score=score), "episodes": 7, "seed": 3, "batch": 5}
    found = evaluate(LEARNER, (), source, SPEC, **options, progress=done.append)
    assert done == [5, 7]
    expected = []
    for index in range(7):
        support, query = data.episode(source, SPEC, seed=3, index=index)
        means = np.stack([support.inputs[support.targets == way].mean(0) for way in range(3)])
        inputs = np.concatenate([query.inputs, beyond.inputs]).astype(np.float64)
        logits = -((inputs[:, None] - means[None]) ** 2).sum(-1)
        ranked = np.sort(logits)
        # (1 - p) / p of the largest probability p
        odds = np.exp(ranked[:, :-1] - ranked[:, -1:]).sum(-1)
        scores = logits.max(-1) if score == "logit" else -odds
        expected.append(np.mean(scores[:12, None] > scores[None, 12:]))
    np.testing.assert_allclose(found.values, expected, atol=1e-6)
    probabilities = np.exp((logits - logits.max(-1, keepdims=True)).astype(np.float32))
    assert (probabilities.sum(-1) == 1).sum() > 2  # of which many are 1 in float32, and still not tied
    assert (found.metric, found.episodes, found.seed) == ("out_of_scope_auroc", 7, 3)
    assert f"out of scope   12 inputs, told by the largest {score}" in str(found)
    assert found.mean == pytest.approx(np.mean(found.values))


def test_far_inputs_are_told_and_those_of_the_class_itself_are_not(source):
    far = out_of_scope(outside(np.full([99, 6], 50.0)), score="logit")
    found = evaluate(LEARNER, (), source, SPEC, judge=far, episodes=9)
    assert found.mean == 1.0
    # one class, and outside of it the same distribution
    cloud = np.random.default_rng(3).normal(size=(400, 6)).astype(np.float32)
    same = data.ClassSource("one", "test", cloud[:200], np.zeros(200, int), ("a",))
    spec = data.EpisodeSpec(1, 2, 20)
    found = evaluate(LEARNER, (), same, spec, judge=out_of_scope(outside(cloud[200:]), score="logit"), episodes=60)
    assert abs(found.mean - 0.5) < 3 * found.ci95


def test_longer_texts_from_outside_share_a_batch_with_shorter_queries():
    def texts(name, length, count):
        mask = np.arange(8) < length
        inputs = {"tokens": np.tile(np.where(mask, 1, 0), (count, 1)), "mask": np.tile(mask, (count, 1))}
        return data.ClassSource(
            name, "test", inputs, np.arange(count) % 2, ("a", "b"), lengths=np.full(count, length),
            length_buckets=(2, 4, 8),
        )  # fmt: skip

    model = metajax.Model(lambda key, x: (), lambda params, x: x["mask"].sum(1, keepdims=True).astype(np.float32))
    learner, spec = learners.prototypical(model), data.EpisodeSpec(2, 1, 2)
    for inside, beyond in ((2, 7), (7, 2)):
        judge = out_of_scope(texts("y", beyond, 12), score="logit")
        found = evaluate(learner, (), texts("x", inside, 12), spec, judge=judge, episodes=3)
        assert found.values.tolist() == [1.0, 1.0, 1.0]  # queries are as long as their prototypes, the others are not


def test_refusals(source):
    with pytest.raises(ValueError, match="score must be one of 'probability', 'logit', got 'energy'"):
        out_of_scope(outside(np.zeros([3, 6])), score="energy")
    with pytest.raises(ValueError, match="outside must be of type ClassSource, got None"):
        out_of_scope(None)
    waves, spec, judge = (
        data.sinusoids(split="test"),
        data.EpisodeSpec(1, 2, 2),
        out_of_scope(outside(np.zeros([3, 1]))),
    )
    learner = learners.maml(metajax.models.mlp(1), optax.sgd(0.1), task=metajax.tasks.regression)
    with pytest.raises(ValueError, match=r"got regression of source and classification of out_of_scope\(\)"):
        evaluate(learner, learner.init(jax.random.key(0), np.zeros([1, 1])), waves, spec, judge=judge, episodes=2)
    with pytest.raises(ValueError, match="shuffle_support must be False for regression, whose targets are no labels"):
        evaluate(learner, (), waves, spec, shuffle_support=True, episodes=2)


def test_accuracy_with_shuffled_support_labels_stands_at_chance(source):
    given = evaluate(LEARNER, (), source, SPEC, episodes=300)
    assert given.mean > 0.9
    found = evaluate(LEARNER, (), source, SPEC, episodes=300, shuffle_support=True)
    assert abs(found.mean - 1 / 3) < 2 * found.ci95
    assert "labels shuffled (a control)" in str(found)
    assert "shuffled" not in str(given)
    again = evaluate(LEARNER, (), source, SPEC, episodes=50, shuffle_support=True, batch=7)
    np.testing.assert_array_equal(again.values, found.values[:50])
    assert not np.array_equal(
        evaluate(LEARNER, (), source, SPEC, episodes=50, shuffle_support=True, seed=1).values, again.values
    )


def test_shuffling_leaves_padding_alone(source):
    spec = data.EpisodeSpec((2, 3), (1, 2), 1)
    chunk = data.episode_batch(source, spec, seed=0, start=0, count=6)
    shuffled = _fewshot._shuffled(chunk, 0, 0)
    before, after, mask = chunk.support.targets, shuffled.support.targets, chunk.support.mask
    assert not mask.all()
    np.testing.assert_array_equal(before[~mask], after[~mask])
    for one, other, kept in zip(before, after, mask, strict=True):
        assert sorted(one[kept]) == sorted(other[kept])
    assert (before != after).any()
    jax.tree.map(np.testing.assert_array_equal, chunk.query, shuffled.query)
