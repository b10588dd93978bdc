"""Scores and intervals against numbers worked out by hand and by NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from metajax import Examples
from metajax.evaluation import _metrics, mean_and_interval


def _query(targets, mask=None):
    targets = np.asarray(targets)
    return Examples(np.zeros(len(targets)), targets, np.ones(len(targets), bool) if mask is None else np.array(mask))


def test_accuracy_counts_kept_examples_only():
    logits = jnp.array([[3.0, 1.0], [0.0, 2.0], [5.0, 0.0], [1.0, 0.0]])
    assert float(_metrics.score("accuracy", logits, _query([0, 1, 1, 0]))) == pytest.approx(3 / 4)
    assert float(_metrics.score("accuracy", logits, _query([0, 1, 1, 0], [1, 1, 1, 0]))) == pytest.approx(2 / 3)
    assert float(_metrics.score("accuracy", logits, _query([0, 1, -1, 0]))) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("row", "target", "right"),
    [
        ([np.nan, np.nan, np.nan], 0, False),
        ([1.0, np.nan, 0.0], 0, False),
        ([np.nan, 1.0, 0.0], 0, False),  # argmax alone would pick the NaN
        ([1.0, 0.0, np.inf], 2, False),
        ([-np.inf, -np.inf, -np.inf], 0, False),
        ([-np.inf, 0.0, -np.inf], 1, True),  # a class that is ruled out
    ],
)
def test_an_output_that_is_not_finite_is_wrong(row, target, right):
    assert float(_metrics.score("accuracy", jnp.array([row]), _query([target]))) == float(right)


def test_accuracy_of_token_targets_averages_over_examples():
    logits = jnp.eye(3)[jnp.array([[0, 1], [2, 2]])]  # [2, 2, 3]
    found = _metrics.score("accuracy", logits, _query(np.array([[0, 0], [2, -1]])))
    assert float(found) == pytest.approx((0.5 + 1.0) / 2)


def test_a_span_with_an_end_that_is_not_finite_is_half_right():
    outputs = jnp.zeros([1, 3, 2]).at[0, 1].set(1).at[0, 2, 1].set(jnp.nan)
    assert float(_metrics.score("accuracy", outputs, _query([[1, 1]]))) == 0.5


def test_squared_error_is_the_mean_over_kept_examples_and_keeps_nan():
    outputs = jnp.array([[1.0], [3.0], [9.0]])
    targets = np.zeros([3, 1], np.float32)
    assert float(_metrics.score("mse", outputs, _query(targets, [1, 1, 0]))) == pytest.approx(5.0)
    assert np.isnan(float(_metrics.score("mse", outputs.at[0].set(np.nan), _query(targets))))


def test_shapes_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="outputs"):
        _metrics.score("accuracy", jnp.zeros([2, 3]), _query([0, 1, 2]))
    with pytest.raises(ValueError, match="targets"):
        _metrics.score("mse", jnp.zeros([3]), _query(np.zeros([3, 1])))


def test_interval_is_that_of_the_sample_deviation():
    values = np.array([0.9, 0.8, 1.0, 0.7])
    spread = np.sqrt(np.sum((values - 0.85) ** 2) / 3)
    mean, ci95 = mean_and_interval(values)
    assert mean == pytest.approx(0.85, abs=1e-12)
    assert ci95 == pytest.approx(1.96 * spread / 2, abs=1e-12)


@pytest.mark.parametrize("values", [[], [1.0], [[1.0, 2.0]]])
def test_interval_refuses_fewer_than_two_numbers(values):
    with pytest.raises(ValueError, match="values"):
        mean_and_interval(values)


def test_interval_of_a_value_that_is_not_finite_is_not_finite():
    assert np.isnan(mean_and_interval([np.nan, 1.0])).all()
    assert not np.isfinite(mean_and_interval([np.inf, 1.0])).any()
