"""Means and 95 % intervals for figures over several seeds."""

from __future__ import annotations

from typing import Any


def interval(values: Any) -> tuple[Any, Any]:
    """Returns the means of `[seeds, n]` and the half widths of their intervals, both `[n]`."""
    import numpy as np

    return values.mean(0), 1.96 * values.std(0, ddof=1) / np.sqrt(len(values))


def band(axes: Any, x: Any, values: Any, label: str) -> None:
    """Draws the means of `[seeds, n]` over `x` `[n]` as a line, and their intervals as a band around it."""
    mean, half = interval(values)
    line = axes.plot(x, mean, label=label)[0]
    axes.fill_between(x, mean - half, mean + half, alpha=0.2, color=line.get_color(), lw=0)
