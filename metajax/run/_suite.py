"""Evaluation of one run on several image sources: its own, the built-in characters, and given ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from metajax.run._registry import factories, fields, make


def parse(given: Sequence[str], config: Any, facts: Any) -> dict[str, str]:
    """Returns the paths of sources by name, from entries `NAME=PATH`.

    Raises:
      ValueError: an entry has another form, a name is repeated, or the run does not use images.
    """
    if facts.image is None:
        raise ValueError(f"suite must be of a run on images, got one on {config.data.name}")
    paths: dict[str, str] = {}
    for entry in given:
        name, equals, path = entry.partition("=")
        if not (name and equals and path) or name in paths:
            raise ValueError(f"suite_data must be NAME=PATH,... with names of their own, got {entry!r}")
        paths[name] = path
    return paths


def evaluate(
    config: Any, learner: Any, params: Any, own: Any, spec: Any, paths: Mapping[str, str],
    options: dict[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """Evaluates accuracy on the test classes of each source, with images converted to the form of the run's images.

    Args:
      config: config of the run.
      learner: learner of the run.
      params: meta-parameters of the run.
      own: the source of the run, which is in the domain.
      spec: size of the episodes.
      paths: paths by name. The name is that of a source such as "omniglot". Any other name is for a folder
        `CLASS/NAME.png`, of which a fifth of the classes is used.
      options: options of `metajax.evaluation.evaluate`.

    Returns:
      A row for each source.
    """
    import metajax

    height, _, channels = metajax.data.episode(own, spec, seed=0, index=0).query.inputs.shape[1:]
    flat = dataclasses.replace(spec, hierarchical=False)
    sources = {config.data.name: (own, spec)}
    for name, path in {"glyphs": "", **paths}.items():
        if name not in sources:
            sources[name] = (_like(_open(name, path, height, channels), channels, flat), flat)
    rows = []
    for name, (source, size) in sources.items():
        found = metajax.evaluation.evaluate(learner, params, source, size, **options)
        rows.append(
            {"source": name, "in_domain": source is own, "accuracy_mean": found.mean, "accuracy_ci95": found.ci95}
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats the rows as a table."""
    lines = [f"{'suite':<13}  {'domain':6}  accuracy, %"]
    for row in rows:
        domain = "in" if row["in_domain"] else "out"
        accuracy = f"{100 * row['accuracy_mean']:.2f} +- {100 * row['accuracy_ci95']:.2f}"
        lines.append(f"{row['source']:<13}  {domain:6}  {accuracy}")
    return "\n".join(lines)


def _open(name: str, path: str, size: int, channels: int) -> Any:
    given: dict[str, Any] = {"path": path or None, "size": size}
    section: dict[str, Any] = {"name": name if name in factories("source") else "image_folder"}
    taken = fields("source", section, "suite_data")
    section |= {field: value for field, value in given.items() if field in taken and value is not None}
    if "channels" in taken:
        section |= {"channels": channels}
    return make("source", section, "suite_data", {"split": "test"})


def _like(source: Any, channels: int, spec: Any) -> Any:
    """Returns the source with images of `channels` channels: gray is repeated, and colors are averaged to gray."""
    import numpy as np

    import metajax

    there = metajax.data.episode(source, spec, seed=0, index=0).query.inputs.shape[-1]
    if there == channels:
        return source

    def apply(images: Any, numbers: Any) -> Any:
        del numbers
        grey = np.asarray(images, np.float32).mean(axis=-1, keepdims=True).round().astype(images.dtype)
        return np.repeat(grey, channels, axis=-1)

    return metajax.data.transformed(source, metajax.data.Transform(0, apply))
