"""The phases of the supervised recipe, one by one."""

import itertools

import jax
import numpy as np
import optax
import pytest

import metajax
from metajax import data, hypergrad, learners, models, training

MODEL = models.mlp(6, hidden=(8,))
RNG = np.random.default_rng(0)
LABELS = np.repeat(np.arange(8), 12)
SOURCE = data.ClassSource(
    "clouds", "train", np.float32(2 * np.eye(8)[LABELS] + RNG.normal(size=(96, 8))), LABELS, tuple("abcdefgh")
)
SPEC = data.EpisodeSpec(ways=4, shots=1, queries=3)


@pytest.fixture(scope="module")
def found():
    return training.supervised(
        MODEL, SOURCE, SPEC, steps=(40, 5), rates=(0.02, 0.01), batch=16, meta_batch=2, inner_steps=3, seed=7
    )


def test_the_second_phase_begins_where_the_first_ended(found):
    """Both phases taken by hand, on the same streams."""
    keys = jax.random.split(jax.random.key(7))
    stages = (
        (learners.pretrain(MODEL, 8), data.batches(SOURCE, 16, 7), 0.02, 40),
        (learners.prototypical(MODEL, distance="cosine"), data.episodes(SOURCE, SPEC, batch=2, seed=7), 0.01, 5),
    )
    params = None
    for key, (learner, stream, rate, steps) in zip(keys, stages, strict=True):
        rule = optax.adam(optax.cosine_decay_schedule(rate, steps))
        outer = metajax.outer_update(learner, rule, hypergrad=hypergrad.unrolled(), before=False)
        episodes = list(itertools.islice(stream, steps))
        stream.close()
        state = outer.init(key, jax.tree.map(lambda leaf: leaf[0], episodes[0]), params)
        update = jax.jit(outer.update)
        for batch in episodes:
            state, _ = update(state, batch)
        params = state.params.get("backbone", state.params)
        expected = found.pretrained if learner is stages[0][0] else found.params
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), expected, params)


def test_the_learner_begins_at_the_prototypes_and_takes_its_steps(found):
    episode = data.episode(SOURCE, SPEC, seed=1, index=0)
    metric = learners.prototypical(MODEL, distance="cosine")
    plain = metric.predict(metric.adapt(found.params, episode.support), episode.query.inputs)
    start = found.learner.adapt(found.params, episode.support, num_steps=0)
    np.testing.assert_allclose(found.learner.predict(start, episode.query.inputs), plain, rtol=1e-4, atol=1e-4)
    tuned = found.learner.adapt(found.params, episode.support)
    assert found.learner.problem.num_steps == 3
    assert np.abs(found.learner.predict(tuned, episode.query.inputs) - plain).max() > 1e-3
    trained = metajax.evaluation.evaluate(found.learner, found.params, SOURCE, SPEC, episodes=40)
    fresh = metajax.evaluation.evaluate(
        found.learner, MODEL.init(jax.random.key(0), episode.query.inputs), SOURCE, SPEC, episodes=40
    )
    assert trained.mean > fresh.mean + 0.05


def test_bad_input_is_refused():
    for options, text in (
        ({"steps": (3,)}, r"steps must be a pair, for pre-training and meta-training, got \(3,\)"),
        ({"steps": (3, 0)}, "steps must be an integer of at least 1, got 0"),
        ({"rates": (0.1, -1.0)}, "rates must be a finite number above 0, got -1.0"),
        ({"inner_steps": -1}, "inner_steps must be an integer of at least 0, got -1"),
        ({"batch": 0}, "size must be an integer of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=text):
            training.supervised(MODEL, SOURCE, SPEC, **options)
    with pytest.raises(ValueError, match=r"source must have classes, got sinusoids \(train\)"):
        training.supervised(MODEL, data.sinusoids(), SPEC)
