"""Intervals against numbers worked out by hand and by NumPy."""

import numpy as np
import pytest

from metajax.evaluation import mean_and_interval


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
