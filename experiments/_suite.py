"""One run across sources of images: its own, the built-in characters, and those that are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

NAMED = ("glyphs", "omniglot", "cifar_fs", "fc100", "mini_imagenet", "tiered_imagenet", "cub")


def parse(given: Sequence[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Paths of sources by name, from `NAME=PATH`.

    Raises:
      ValueError: an entry of another form, a name that stands twice, or a run on no images.
    """
    from metajax.training._data import kind_of

    if kind_of(config).inputs != "image":
        raise ValueError(f"suite must be of a run on images, got one on {config['data']['name']}")
    paths: dict[str, str] = {}
    for entry in given:
        name, equals, path = entry.partition("=")
        if not (name and equals and path) or name in paths:
            raise ValueError(f"suite_data must be NAME=PATH,... with names of their own, got {entry!r}")
        paths[name] = path
    return paths


def evaluate(
    config: Mapping[str, Any], learner: Any, params: Any, own: Any, spec: Any, paths: Mapping[str, str],
    options: dict[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """Accuracy on the test classes of each source, all with images like those of the run.

    Args:
      config: of the run.
      learner: of the run.
      params: of the run.
      own: the run's own source, which is in the domain.
      spec: size of the episodes.
      paths: by name, one of `NAMED`; any other name is of a folder `CLASS/NAME.png`, a fifth of whose classes counts.
      options: of `metajax.evaluation.evaluate`.

    Returns:
      A row for each source.
    """
    import metajax

    height, _, channels = metajax.data.episode(own, spec, seed=0, index=0).query.inputs.shape[1:]
    flat = dataclasses.replace(spec, hierarchical=False)
    sources = {config["data"]["name"]: (own, spec)}
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
    """The rows as text."""
    lines = [f"{'suite':<13}  {'domain':6}  accuracy, %"]
    for row in rows:
        domain = "in" if row["in_domain"] else "out"
        accuracy = f"{100 * row['accuracy_mean']:.2f} +- {100 * row['accuracy_ci95']:.2f}"
        lines.append(f"{row['source']:<13}  {domain:6}  {accuracy}")
    return "\n".join(lines)


def _open(name: str, path: str, size: int, channels: int) -> Any:
    from experiments.configs import _base
    from metajax import training

    config = _base.base()
    config.data.update(name=name if name in NAMED else "image_folder", path=path, size=size, channels=channels)
    return training.open_source(config, "test")


def _like(source: Any, channels: int, spec: Any) -> Any:
    """The source with images of so many channels: grey ones are repeated, colours become their mean."""
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
