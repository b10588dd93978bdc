"""The stages of training that a config describes."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from metajax import data
from metajax.core import _validate
from metajax.run._sources import Facts, on_batches
from metajax.training import Stage


def stages(config: Any, spec: data.EpisodeSpec, facts: Facts) -> tuple[Stage, ...]:
    """Those that the section `curriculum` describes, and the one that is left, on episodes of `spec`.

    Args:
      config: as for `build`.
      spec: of training episodes.
      facts: what is known of the data.

    Raises:
      ValueError: a field is out of range; the error names it.
    """
    fields = config.curriculum
    until, steps = [0, *fields["until"], config.training.steps], []
    for before, end in itertools.pairwise(until):
        if isinstance(end, bool) or not isinstance(end, int) or end <= before:
            raise ValueError(
                "curriculum.until must be ascending meta steps above 0 and below training.steps, "
                f"{until[-1]}, got {tuple(fields['until'])}"
            )
        steps.append(end - before)
    given = {name: tuple(fields.get(name, ())) for name in ("ways", "shots", "size")}
    if (len(steps) > 1) != any(given.values()):
        raise ValueError(
            "curriculum.until must hold the steps until which curriculum.ways, curriculum.shots or curriculum.size are "
            f"others, and be empty where there are none, got {tuple(fields['until'])} and {given}"
        )
    if len(steps) == 1:
        return (Stage(spec, *steps),)
    if on_batches(config):
        raise ValueError("curriculum.until must be empty for the sampler 'batches', which gives no episodes")
    lists = {name: values or (0,) * (len(steps) - 1) for name, values in given.items()}
    for name, values in lists.items():
        if len(values) != len(steps) - 1:
            raise ValueError(
                f"curriculum.{name} must hold a number for each of the {len(steps) - 1} steps of curriculum.until, or "
                f"nothing, got {tuple(values)}"
            )
        for value in values:
            _validate.int_at_least(f"curriculum.{name}", value, 0)
    if any(lists["size"]) and facts.image is None:
        raise ValueError(f"curriculum.size must be 0 but for images, got {tuple(lists['size'])}")
    rows = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
    found = []
    for row, count in zip(rows, steps, strict=False):
        sizes = {name: row[name] for name in ("ways", "shots") if row[name]}
        found.append(Stage(dataclasses.replace(spec, **sizes), count, resolution=row["size"] or None))
    return (*found, Stage(spec, steps[-1]))
