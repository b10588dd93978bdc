"""Measures the cost of changes for a learner on a stream."""

from __future__ import annotations

from typing import Any

import numpy as np

from metajax.core import _validate


def cumulative_regret(losses: Any, reference: Any = 0.0) -> np.ndarray:
    """Computes the cumulative loss above a reference, such as the best fixed learner in hindsight.

    Args:
      losses: `[..., steps]`, the loss of each item before the learner learned from it.
      reference: the losses of the reference, with the same shape or one that broadcasts to it.

    Returns:
      float64 `[..., steps]`. A loss that is not finite makes the rest of its row not finite.

    Raises:
      ValueError: there is no step, or the shapes do not fit.

    Source: Zinkevich 2003, Online Convex Programming and Generalized Infinitesimal Gradient Ascent; for
    meta-learners, Finn et al. 2019, arXiv:1902.08438.

    >>> cumulative_regret([3.0, 2.0, 1.0], [1.0, 1.0, 1.0]).tolist()
    [2.0, 3.0, 3.0]
    """
    losses, reference = np.asarray(losses, np.float64), np.asarray(reference, np.float64)
    if not losses.ndim or not losses.shape[-1]:
        raise ValueError(f"losses must be [..., steps] of at least one step, got the shape {losses.shape}")
    try:
        reference = np.broadcast_to(reference, losses.shape)
    except ValueError as error:
        raise ValueError(f"reference must fit losses {losses.shape}, got the shape {reference.shape}") from error
    return np.cumsum(losses - reference, axis=-1)


def recovery_time(
    errors: Any, change: int, *, window: int = 1, tolerance: float = 0.0, level: float | None = None
) -> float:
    """Computes how long errors stay above their earlier level after a change.

    Errors are averaged over all `window` consecutive steps before the change, and over all those after it. The level is
    the highest average before the change. Recovery is the first step from which no average exceeds the level.

    Args:
      errors: `[steps]`, one series.
      change: the first step under the new conditions, from `window` to `steps - window`.
      window: number of steps in an average, at least 1.
      tolerance: how far above the level still counts as recovered, as a fraction of the level.
      level: replaces the level of the steps before the change, in the unit of the errors.

    Returns:
      The number of steps from the change to the beginning of the first average from which all averages stay at or below
      the level: 0 if nothing was lost, and infinity if the last average is above the level or not finite.

    Raises:
      ValueError: `errors` is not a series, `change` is out of its range, or a number is out of its range.

    >>> recovery_time([0.1, 0.1, 0.9, 0.5, 0.1, 0.1], 2)
    2.0
    >>> recovery_time([0.1, 0.1, 0.9, 0.5, 0.4, 0.4], 2)
    inf
    """
    errors = np.asarray(errors, np.float64)
    _validate.positive_int("window", window)
    _validate.non_negative_float("tolerance", tolerance)
    if errors.ndim != 1:
        raise ValueError(f"errors must be one series [steps], got the shape {errors.shape}")
    _validate.int_at_least("change", change, window)
    if change > len(errors) - window:
        raise ValueError(
            f"change must leave {window} of the {len(errors)} steps on either side, got {change}: "
            f"from {window} to {len(errors) - window} is accepted"
        )
    if level is None:
        level = float(np.max(_averages(errors[:change], window)))
    else:
        _validate.non_negative_float("level", level)
    # a negated <=, not >: an average that is NaN has not recovered
    above = np.flatnonzero(~(_averages(errors[change:], window) <= level * (1 + tolerance)))
    if not above.size:
        return 0.0
    first = int(above[-1]) + 1
    return float(first) if first + window <= len(errors) - change else float("inf")


def _averages(values: np.ndarray, window: int) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(values, window).mean(axis=-1)
