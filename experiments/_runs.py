"""Helpers of the experiments: the output folder, checks of seeds, and means with intervals."""

from __future__ import annotations

import pathlib
from typing import Any

from metajax.run import write_json

__all__ = ["out_folder", "require_seeds", "told", "write_json"]


def out_folder(value: str) -> pathlib.Path:
    """Returns the folder in `--out`, which need not exist.

    Raises:
      ValueError: the path exists and is not a folder.
    """
    out = pathlib.Path(value)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, got {str(out)!r}")
    return out


def require_seeds(seeds: int, name: str, value: int, at_least: int = 1) -> None:
    """Raises a ValueError if there are too few seeds for an interval, or if the flag `name` is below `at_least`."""
    if seeds < 2 or value < at_least:
        raise ValueError(f"seeds must be at least 2 and {name} at least {at_least}, got {seeds} and {value}")


def told(values: Any, digits: int) -> str:
    """Formats the mean and 95 % interval of values."""
    from metajax import evaluation

    mean, ci95 = evaluation.mean_and_interval(values)
    return f"{mean:.{digits}f} +- {ci95:.{digits}f}"
