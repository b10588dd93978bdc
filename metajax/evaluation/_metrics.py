"""Means and intervals over episodes, and other statistics that are computed on the host."""

from __future__ import annotations

from typing import Any

import numpy as np


def mean_and_interval(values: Any) -> tuple[float, float]:
    """Returns the mean of per-episode values and the half width of its 95 % interval, `1.96 s / sqrt(n)`.

    s is the sample standard deviation (divisor n - 1). If a value is not finite, neither result is finite.

    Args:
      values: `[n]` numbers, at least two.

    Raises:
      ValueError: there are fewer than two values, or more than one axis.

    >>> mean, ci95 = mean_and_interval([0.0, 1.0])
    >>> mean, round(ci95, 4)
    (0.5, 0.98)
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"values must be a list of at least 2 numbers, got an array of shape {values.shape}")
    with np.errstate(invalid="ignore", over="ignore"):
        mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    return mean, 1.96 * deviation / float(np.sqrt(len(values)))


def auroc(scores: Any, positive: Any) -> float:
    """Computes the area under the ROC curve: how often a positive example scores above a negative one; ties count half.

    Args:
      scores: `[n]` numbers. Infinite scores are allowed. If a score is NaN, the result is NaN.
      positive: `[n]` bool, with at least one True and one False.

    Returns:
      A number in [0, 1]: 1 if all positive examples score above all negative ones, 0.5 if scores are uninformative.

    Raises:
      ValueError: the shapes differ, `positive` is not of type bool, or all examples are of one kind.

    Source: Hanley and McNeil 1982, The Meaning and Use of the Area under a ROC Curve. The area is the Mann-Whitney U
      statistic divided by the number of pairs.

    >>> auroc([0.9, 0.4, 0.4, 0.1], np.array([True, True, False, False]))
    0.875
    """
    scores, positive = np.asarray(scores, np.float64), np.asarray(positive)
    if scores.ndim != 1 or scores.shape != positive.shape or positive.dtype != bool:
        raise ValueError(
            f"positive must be a line of bool, one for each of the scores {scores.shape}, got {positive.dtype} of "
            f"shape {positive.shape}"
        )
    found = int(positive.sum())
    if not 0 < found < len(positive):
        raise ValueError(f"positive must hold True and False, got {found} True in {len(positive)}")
    if np.isnan(scores).any():
        return float("nan")
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[place]  # tied scores get the mean of their ranks
    pairs = found * (len(positive) - found)
    return float((ranks[positive].sum() - found * (found + 1) / 2) / pairs)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the probabilities `[n, ways]` of logits, in the same precision, with NaN in rows that are not finite.

    >>> softmax(np.array([[0.0, 0.0], [np.inf, 0.0]])).tolist()
    [[0.5, 0.5], [nan, nan]]
    """
    with np.errstate(invalid="ignore"):
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)
