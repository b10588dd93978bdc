"""The protocol: fixed episodes, an independent recomputation, one compilation, and what is measured."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax import core, data, learners, models
from metajax.evaluation import _fewshot, evaluate, predict, predict_query

IDENTITY = metajax.Model(lambda key, x: (), lambda params, x: x)


@pytest.fixture(scope="module")
def source():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(8), 12)
    inputs = (rng.normal(size=(8, 6))[labels] + 0.8 * rng.normal(size=(96, 6))).astype(np.float32)
    return data.ClassSource("clouds", "test", inputs, labels, tuple("abcdefgh"))


@pytest.fixture(scope="module")
def images():
    pixels = np.random.default_rng(1).integers(0, 256, (40, 8, 8, 1)).astype(np.uint8)
    return data.ClassSource("noise", "test", pixels, np.repeat(np.arange(5), 8), tuple("abcde"))


SPEC = data.EpisodeSpec(3, 2, 4)


def _nearest_mean(episode):
    """Accuracy of the nearest class mean, in NumPy."""
    support, query = episode
    means = np.stack([support.inputs[support.targets == way].mean(0) for way in range(3)])
    distance = ((query.inputs[:, None] - means[None]) ** 2).sum(-1)
    return np.mean(distance.argmin(1) == query.targets)


def test_values_equal_an_independent_computation(source):
    found = evaluate(learners.prototypical(IDENTITY), (), source, SPEC, episodes=25, seed=3, normalisation="none")
    expected = [_nearest_mean(data.episode(source, SPEC, seed=3, index=index)) for index in range(25)]
    np.testing.assert_allclose(found.values, expected, atol=1e-6)
    assert found.mean == pytest.approx(np.mean(expected), abs=1e-6)
    assert found.ci95 == pytest.approx(1.96 * np.std(expected, ddof=1) / 5, abs=1e-6)
    assert (found.metric, found.episodes, found.seed, found.spec, found.normalisation, found.source) == (
        "accuracy", 25, 3, SPEC, "none", "clouds (test)",
    )  # fmt: skip


def test_the_default_protocol_is_600_episodes(source):
    assert evaluate(learners.prototypical(IDENTITY), (), source, SPEC, batch=600).values.shape == (600,)


@pytest.mark.parametrize("batch", [1, 7, 25, 100])
def test_the_list_of_episodes_does_not_depend_on_the_batch(source, batch):
    learner = learners.prototypical(IDENTITY)
    found = evaluate(learner, (), source, SPEC, episodes=25, seed=1, batch=batch)
    np.testing.assert_allclose(found.values, evaluate(learner, (), source, SPEC, episodes=25, seed=1).values, atol=1e-6)


def test_progress_counts_the_episodes_that_are_done(source):
    done = []
    evaluate(learners.prototypical(IDENTITY), (), source, SPEC, episodes=25, batch=10, progress=done.append)
    assert done == [10, 20, 25]


@pytest.mark.parametrize("key", [None, jax.random.key(0)])
def test_queries_in_parts_are_predicted_the_same(source, key):
    model = models.mlp(outputs=3, hidden=(5,))
    learner = learners.maml(model, optax.sgd(0.1), 2)
    one = data.episode(source, data.EpisodeSpec(3, 2, 7), seed=0, index=0)
    params = learner.init(jax.random.key(1), one.support.inputs)
    whole, parts = (
        predict(learner, params, one.support, one.query.inputs, batch=batch, key=key) for batch in (None, 8)
    )
    assert whole.shape == (21, 3)
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    with pytest.raises(ValueError, match="batch must be an integer of at least 1, got 0"):
        predict(learner, params, one.support, one.query.inputs, batch=0)


def test_seeds_and_splits_give_other_episodes(source):
    learner = learners.prototypical(IDENTITY)
    train = data.ClassSource("clouds", "train", source.inputs, source.labels, source.class_names)
    one, same, seed, split = (
        evaluate(learner, (), where, SPEC, episodes=20, seed=number).values
        for where, number in ((source, 0), (source, 0), (source, 1), (train, 0))
    )
    np.testing.assert_array_equal(one, same)
    assert (one != seed).any()
    assert (one != split).any()


def test_side_by_side_and_one_after_the_other_agree(source, monkeypatch):
    learner = learners.maml(models.mlp(3, hidden=(8,)), optax.sgd(0.1), 3)
    params = learner.init(jax.random.key(0), source.inputs[:2])
    found = []
    for side_by_side in (True, False):
        monkeypatch.setattr(_fewshot, "side_by_side", lambda episode, choice=side_by_side: choice)
        found.append(evaluate(learner, params, source, SPEC, episodes=20).values)
    np.testing.assert_allclose(*found, atol=1e-6)


def test_one_compilation_for_all_chunks_and_all_parameters(source):
    traces = []

    def apply(params, inputs):
        traces.append(inputs.shape)
        return inputs * params

    learner = learners.prototypical(metajax.Model(lambda key, x: jnp.ones([]), apply))
    evaluate(learner, jnp.ones([]), source, SPEC, episodes=23, batch=10)
    once = len(traces)
    before = _fewshot._values._cache_size()
    evaluate(learner, jnp.full([], 2.0), source, SPEC, episodes=23, batch=10, seed=5)
    evaluate(learner, np.float32(2.0), source, SPEC, episodes=40, batch=10)
    assert (len(traces), _fewshot._values._cache_size()) == (once, before)


def test_num_steps_reaches_the_learner(source):
    learner = learners.maml(models.mlp(3, hidden=()), optax.sgd(0.5), 1)
    params = jax.tree.map(jnp.zeros_like, learner.init(jax.random.key(0), source.inputs[:2]))
    still, trained = (evaluate(learner, params, source, SPEC, episodes=20, num_steps=steps) for steps in (0, 20))
    np.testing.assert_allclose(still.values, 1 / 3, atol=1e-6)  # zero logits everywhere: the first class
    assert trained.mean > 0.7


def test_keys_are_folded_with_the_episode(source):
    def apply(params, inputs, key):
        return inputs if key is None else jax.random.normal(key, inputs.shape)

    learner = learners.prototypical(metajax.Model(lambda key, x: (), apply, ("key",)))
    one, other, new = (
        evaluate(learner, (), source, SPEC, episodes=12, batch=batch, key=jax.random.key(seed)).values
        for batch, seed in ((12, 0), (5, 0), (12, 1))
    )
    np.testing.assert_allclose(one, other, atol=1e-6)
    assert len(set(one)) > 1
    assert (one != new).any()


def test_fewer_ways_than_outputs_are_masked_and_more_are_refused(source, monkeypatch):
    learner = learners.maml(models.mlp(4, hidden=()), optax.sgd(0.5), 5)
    params = learner.init(jax.random.key(0), source.inputs[:2])
    large = jax.tree.map(lambda leaf: leaf, params)
    large["head"]["bias"] = large["head"]["bias"].at[3].set(1e4)  # would win if it were not masked
    found = evaluate(learner, large, source, data.EpisodeSpec(3, 3, 4), episodes=20)
    assert found.mean > 0.6
    monkeypatch.setattr(_fewshot, "_values", None)
    with pytest.raises(ValueError, match=r"ways must be at most 4, .* got 5"):
        evaluate(learner, params, source, data.EpisodeSpec(5, 1, 4), episodes=20)


@pytest.mark.parametrize(
    ("policy", "transductive", "queries"),
    [("batch", True, 5), ("batch", True, 1), ("support", False, 5), ("layer", False, 5), ("none", False, 1)],
)
def test_the_transductive_flag_is_measured(images, policy, transductive, queries):
    model = models.conv4(width=4, depth=1, pool=False, normalisation=policy)
    learner = learners.prototypical(model)
    params = learner.init(jax.random.key(0), images.inputs[:2])
    spec = data.EpisodeSpec(5 if queries > 1 else 1, 1, queries)
    assert evaluate(learner, params, images, spec, episodes=2).transductive is transductive


def test_the_transductive_flag_of_a_maml_with_masked_classes(images):
    for policy, transductive in (("batch", True), ("support", False)):
        model = models.conv4(7, width=4, depth=1, pool=False, normalisation=policy)
        learner = learners.maml(model, optax.sgd(0.1), 2)
        params = learner.init(jax.random.key(0), images.inputs[:2])
        found = evaluate(learner, params, images, data.EpisodeSpec(5, 2, 3), episodes=2)
        assert found.transductive is transductive


def test_a_learner_that_looks_at_the_other_queries_is_transductive_whatever_it_says(source):
    inductive = learners.prototypical(IDENTITY)

    def predict_centred(adapted, inputs, *, mask=None, key=None):
        return inductive.predict(adapted, inputs - 1e-2 * jnp.mean(inputs, 0), mask=mask, key=key)

    transductive = inductive._replace(predict=predict_centred)
    assert not evaluate(inductive, (), source, SPEC, episodes=2, normalisation="batch").transductive
    assert evaluate(transductive, (), source, SPEC, episodes=2, normalisation="none").transductive


def test_parameters_that_are_not_finite_score_nothing(source):
    learner = learners.maml(models.mlp(3, hidden=()), optax.sgd(0.5), 1)
    params = learner.init(jax.random.key(0), source.inputs[:2])
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
    found = evaluate(learner, params, source, SPEC, episodes=10)
    assert (found.mean, found.ci95, found.transductive) == (0.0, 0.0, None)
    assert found.nonfinite == found.episodes * SPEC.queries * SPEC.ways
    assert f"not finite     {found.nonfinite} predictions, which are not finite, count as wrong" in str(found)


def test_regression_reports_the_mean_squared_error():
    waves, spec = data.sinusoids(split="test"), data.EpisodeSpec(1, 10, 7)
    learner = learners.maml(models.mlp(1, hidden=()), optax.sgd(0.01), 1, loss=core.squared_error)
    params = jax.tree.map(jnp.zeros_like, learner.init(jax.random.key(0), jnp.zeros([1, 1])))
    found = evaluate(learner, params, waves, spec, episodes=30, num_steps=0)
    expected = [np.mean(data.episode(waves, spec, seed=0, index=index).query.targets ** 2) for index in range(30)]
    np.testing.assert_allclose(found.values, expected, rtol=1e-5)
    assert found.metric == "mse"
    assert found.summary() == f"mse {found.mean:.4f} +- {found.ci95:.4f} (30 episodes)"
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
    assert np.isnan(evaluate(learner, broken, waves, spec, episodes=5).mean)


def test_the_summary_is_one_line_in_per_cent(source):
    found = evaluate(learners.prototypical(IDENTITY), (), source, SPEC, episodes=10)
    found = found._replace(mean=0.98712, ci95=0.00218, episodes=600, normalisation="batch", transductive=True)
    assert found.summary() == "accuracy 98.71 +- 0.22 % (600 episodes)"
    table = str(found).splitlines()
    assert table[-1] == found.summary()
    assert "normalisation  batch" in table
    assert "predictions    transductive" in table


@pytest.mark.parametrize(
    ("name", "value"),
    [("episodes", 1), ("episodes", 2.5), ("seed", -1), ("seed", None), ("batch", 0), ("num_steps", -1)],
)
def test_arguments_out_of_range_are_named(source, name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*got {value}"):
        evaluate(learners.prototypical(IDENTITY), (), source, SPEC, **{name: value})


def test_a_source_that_is_too_small_and_a_learner_that_is_none_are_refused(source):
    with pytest.raises(ValueError, match="ways is 9"):
        evaluate(learners.prototypical(IDENTITY), (), source, data.EpisodeSpec(9, 1, 1))
    with pytest.raises(ValueError, match="learner"):
        evaluate("maml", (), source, SPEC)


def test_predict_is_adapt_and_predict(source):
    learner = learners.maml(models.mlp(3, hidden=(8,)), optax.sgd(0.1), 2)
    support, query = data.episode(source, SPEC, seed=0, index=0)
    params = learner.init(jax.random.key(0), support.inputs)
    outputs = predict_query(learner, params, metajax.Episode(support, query), num_steps=4)
    expected = learner.predict(learner.adapt(params, support, num_steps=4), query.inputs)
    np.testing.assert_allclose(outputs.after, expected, atol=1e-5)
    start = learner.predict(learner.adapt(params, support, num_steps=0), query.inputs)
    np.testing.assert_allclose(outputs.before, start, atol=1e-5)
    np.testing.assert_allclose(predict(learner, params, support, query.inputs, num_steps=4), expected, atol=1e-5)
    assert predict_query(learners.prototypical(IDENTITY), (), metajax.Episode(support, query)).before is None
