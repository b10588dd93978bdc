"""Regret and recovery, by hand."""

import numpy as np
import pytest

from metajax import online


def test_regret_sums_what_is_above_the_reference():
    losses = np.array([[3.0, 2.0, 1.0], [1.0, 1.0, 4.0]])
    np.testing.assert_array_equal(online.cumulative_regret(losses), [[3, 5, 6], [1, 2, 6]])
    np.testing.assert_array_equal(online.cumulative_regret(losses, [1, 2, 3]), [[2, 2, 0], [0, -1, 0]])
    np.testing.assert_array_equal(online.cumulative_regret(losses, [[1.0], [2.0]]), [[2, 3, 3], [-1, -2, 0]])


def test_a_loss_that_is_not_finite_makes_the_rest_so():
    assert np.isnan(online.cumulative_regret([1.0, np.nan, 1.0])).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("errors", "change", "keywords", "expected"),
    [
        ([1, 2, 9, 3, 2, 1], 2, {}, 2),  # the level is 2; step 4 is the first that stays
        ([1, 2, 1, 1], 2, {}, 0),
        ([1, 2, 9, 1, 9, 1], 2, {}, 3),  # an excursion later on counts
        ([1, 2, 9, 9], 2, {}, np.inf),
        ([1, 2, 2.2, 1], 2, {"tolerance": 0.1}, 0),
        ([1, 2, 9, 3, 2, 1], 2, {"level": 3.0}, 1),
        # means of two steps: 2 and 2 before; 6, 5, 3, 1.5 after, the last of steps 7 and 8
        ([1, 3, 1, 3, 8, 4, 6, 0, 3], 4, {"window": 2}, 3),
        ([0, 0, 0, 0], 2, {}, 0),
        ([1, 2, np.nan, 1], 2, {}, 1),
        ([1, 2, 1, np.nan], 2, {}, np.inf),
    ],
)
def test_recovery_is_counted_from_the_change(errors, change, keywords, expected):
    assert online.recovery_time(errors, change, **keywords) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: online.cumulative_regret([]), r"losses must be .* of at least one step, got the shape \(0,\)"),
        (lambda: online.cumulative_regret(1.0), r"losses must be .* got the shape \(\)"),
        (
            lambda: online.cumulative_regret([1.0, 2.0], [1.0, 2.0, 3.0]),
            r"reference must fit losses \(2,\), got the shape \(3,\)",
        ),
        (lambda: online.recovery_time([[1.0, 2.0]], 1), r"errors must be one series .* got the shape \(1, 2\)"),
        (lambda: online.recovery_time([1.0, 2.0], 0), "change must be an integer of at least 1, got 0"),
        (lambda: online.recovery_time([1.0, 2.0], 2), "change must leave 1 of the 2 steps on either side, got 2"),
        (lambda: online.recovery_time([1.0] * 9, 8, window=3), "change must leave 3 of the 9 steps"),
        (lambda: online.recovery_time([1.0] * 9, 2, window=3), "change must be an integer of at least 3, got 2"),
        (lambda: online.recovery_time([1.0, 2.0], 1, window=0), "window must be an integer of at least 1, got 0"),
        (lambda: online.recovery_time([1.0, 2.0], 1, tolerance=-1), "tolerance must be a finite number of at"),
        (lambda: online.recovery_time([1.0, 2.0], 1, level=-1), "level must be a finite number of at least 0"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
