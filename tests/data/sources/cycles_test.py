"""Texts that repeat a word: the rule, the distribution, and what is refused."""

import jax
import numpy as np
import pytest
from scipy import stats

from metajax.data import EpisodeSpec, cycles, device_sampler, episode_batch

SPEC = EpisodeSpec(ways=1, shots=3, queries=2)


def test_all_texts_of_a_task_repeat_one_word():
    batch = episode_batch(cycles(vocab=1000, length=12, period=5), SPEC, seed=0, start=0, count=20)
    for support, query in zip(batch.support.inputs, batch.query.inputs, strict=True):
        texts = np.concatenate([support, query])
        assert (texts[:, 5:] == texts[:, :-5]).all()
        turns = {tuple(np.roll(texts[0, :5], turn)) for turn in range(5)}
        assert {tuple(text[:5]) for text in texts} <= turns
    for part in (batch.support, batch.query):
        assert part.inputs.dtype == part.targets.dtype == np.int32
        assert (part.inputs[..., 1:] == part.targets[..., :-1]).all()
        assert part.mask.all()


def test_words_and_beginnings_are_uniform():
    batch = episode_batch(cycles(vocab=7, length=4, period=4), SPEC, seed=1, start=0, count=3000)
    assert stats.chisquare(np.bincount(batch.support.inputs[:, 0].reshape(-1), minlength=7)).pvalue > 1e-3
    # a text begins where another one of its task does in a quarter of the cases, and else by chance of the tokens
    same = (batch.query.inputs[:, 0] == batch.query.inputs[:, 1]).all(axis=-1).mean()
    assert 0.22 < same < 0.29  # four standard deviations around 0.25, and chance


def test_the_device_draws_them_too():
    data, sample = device_sampler(cycles(vocab=50, length=8, period=3), SPEC)
    drawn = jax.jit(sample)(data, jax.random.key(0))
    assert drawn.support.inputs.shape == (3, 8)
    assert (drawn.query.inputs[:, 3:] == drawn.query.inputs[:, :-3]).all()


@pytest.mark.parametrize("spec", [EpisodeSpec(2, 1, 1), EpisodeSpec(1, (1, 2), 1), EpisodeSpec(1, 1, 1, True)])
def test_episodes_that_texts_cannot_have_are_refused(spec):
    with pytest.raises(ValueError, match=r"(ways|shots|hierarchical) must be .* for cycles"):
        episode_batch(cycles(), spec, seed=0, start=0, count=1)


@pytest.mark.parametrize("name", ["vocab", "length", "period"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
        cycles(**{name: 0})
