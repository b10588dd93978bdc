"""Sinusoids: the formula, the ranges, and what is refused."""

import numpy as np
import pytest
from scipy import stats

from metajax.data import EpisodeSpec, Imbalanced, episode, episode_batch, sinusoids

SPEC = EpisodeSpec(ways=1, shots=10, queries=30)


def fitted_waves(count=2000):
    """Amplitude and phase of drawn waves, recovered by least squares; the largest residual; all inputs."""
    batch = episode_batch(sinusoids(), SPEC, seed=1, start=0, count=count)
    x = np.concatenate([batch.support.inputs, batch.query.inputs], axis=1)[..., 0].astype(np.float64)
    y = np.concatenate([batch.support.targets, batch.query.targets], axis=1)[..., 0].astype(np.float64)
    design = np.stack([np.sin(x), np.cos(x)], axis=-1)
    weights = np.stack([np.linalg.lstsq(d, t, rcond=None)[0] for d, t in zip(design, y, strict=True)])
    residual = np.abs(np.einsum("tnk,tk->tn", design, weights) - y).max()
    # a sin(x - p) = a cos(p) sin(x) - a sin(p) cos(x)
    return np.hypot(*weights.T), np.arctan2(-weights[:, 1], weights[:, 0]), residual, x


def test_every_task_is_one_sine_wave_of_the_published_distribution():
    amplitude, phase, residual, x = fitted_waves()
    assert residual < 1e-5
    for sample, low, high in ((amplitude, 0.1, 5.0), (phase, 0.0, np.pi), (x.reshape(-1)[:4000], -5.0, 5.0)):
        assert sample.min() > low - 1e-5
        assert sample.max() < high + 1e-5
        assert stats.kstest(sample, stats.uniform(low, high - low).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(amplitude, phase)[0, 1]) < 0.08


def test_shapes_and_types():
    drawn = episode(sinusoids(split="val"), SPEC, seed=0, index=0)
    for part, count in ((drawn.support, 10), (drawn.query, 30)):
        assert part.inputs.shape == part.targets.shape == (count, 1)
        assert part.inputs.dtype == part.targets.dtype == np.float32
        assert part.mask.tolist() == [True] * count
        assert part.class_mask is None


def test_splits_give_different_tasks_for_one_seed():
    drawn = [
        episode_batch(sinusoids(split=split), SPEC, seed=0, start=0, count=50).query.inputs
        for split in ("train", "val", "test")
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.isin(drawn[one], drawn[other]).mean() < 0.01  # of 2**24 numbers, a few meet by chance


def test_shots_of_random_number():
    batch = episode_batch(sinusoids(), EpisodeSpec(1, (3, 6), 4), seed=0, start=0, count=4000)
    shots = batch.support.mask.sum(axis=1)
    assert stats.chisquare(np.bincount(shots, minlength=7)[3:]).pvalue > 1e-3
    assert (np.diff(batch.support.mask.astype(int), axis=1) <= 0).all(), "examples come before padding"
    assert not batch.support.inputs[~batch.support.mask].any()
    assert batch.query.mask.all()


def test_bad_input():
    with pytest.raises(ValueError, match=r"ways must be 1 for sinusoids .*, got 5"):
        sinusoids().check(EpisodeSpec(5, 1, 1))
    with pytest.raises(ValueError, match=r"shots must be a number or a pair for sinusoids"):
        sinusoids().check(EpisodeSpec(1, Imbalanced(), 1))
    with pytest.raises(ValueError, match=r"hierarchical must be False for sinusoids"):
        sinusoids().check(EpisodeSpec(1, 1, 1, hierarchical=True))
    with pytest.raises(ValueError, match=r"split must be one of 'train', 'val', 'test', got 'all'"):
        sinusoids(split="all")
    assert not isinstance(sinusoids(), tuple)
    assert (sinusoids().name, sinusoids(split="test").split) == ("sinusoids", "test")
