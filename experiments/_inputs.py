"""Inputs from elsewhere: how they are read, and whether they fit the parameters of a run."""

from __future__ import annotations

import ast
from typing import Any


def check_inputs(name: str, inputs: Any, learner: Any, params: Any) -> None:
    """Raises a ValueError where a learner that is made for `inputs` has other parameters than `params`.

    Args:
      name: what the error calls the inputs.
      inputs: leaves `[n, ...]`.
      learner: of the run.
      params: of the run; it may hold more than the learner uses.
    """
    import jax
    import numpy as np

    needed = jax.eval_shape(learner.init, jax.random.key(0), jax.tree.map(lambda leaf: np.asarray(leaf)[:1], inputs))
    there = {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in jax.tree.leaves_with_path(params)}
    for path, leaf in jax.tree.leaves_with_path(needed):
        found = there.get(jax.tree_util.keystr(path))
        if found != leaf.shape:
            shape = jax.tree.map(lambda leaf: np.shape(leaf)[1:], inputs)
            raise ValueError(
                f"{name} holds inputs of shape {shape}, which do not fit this run: they need "
                f"{jax.tree_util.keystr(path)} of shape {leaf.shape}, but the run has {found}"
            )


def check_steps(steps: int | None, config: dict[str, Any]) -> None:
    """Raises a ValueError where inner steps are given for a learner that takes none."""
    name = config["learner"]["name"]
    if steps is not None and name in ("prototypical", "in_context"):
        raise ValueError(f"steps must not be given for {name}, which takes no inner steps, got {steps}")


def with_columns(config: dict[str, Any], text: str | None, label: str | None) -> dict[str, Any]:
    """The config with the columns of texts that flags name.

    Raises:
      ValueError: a column is given for a run on something else.
    """
    given = {name: column for name, column in (("text", text), ("label", label)) if column is not None}
    if given and config["data"]["name"] != "text":
        name, column = next(iter(given.items()))
        raise ValueError(f"{name}_column must not be given for a run on {config['data']['name']}, got {column!r}")
    return {**config, "data": {**config["data"], **given}}


def with_names(config: dict[str, Any], split: str, names: list[str]) -> dict[str, Any]:
    """The config with some of the classes or domains of a split alone.

    Raises:
      ValueError: the config of the run does not name them.
    """
    fields = config["data"]
    known = fields.get("names", {}).get(split) or ()
    unknown = [name for name in names if isinstance(known, int | float) or name not in known]
    if unknown:
        raise ValueError(f"names must be among those that the run's config has for {split}, {known}, got {unknown}")
    return {**config, "data": {**fields, "names": {**fields["names"], split: names}}}


def with_fields(config: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """The config with other values of some fields.

    Args:
      config: of a run.
      settings: texts such as "inner.rate=2e-3".

    Raises:
      ValueError: a text is no such setting, the config has no such field, or the value is of another type.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        section, _, field = path.partition(".")
        fields = config.get(section)
        if not equals or not isinstance(fields, dict) or field not in fields:
            raise ValueError(f"override must be FIELD=VALUE of a field of the run's config, got {setting!r}")
        known = config[section][field]
        try:
            value = text if isinstance(known, str) else ast.literal_eval(text)
        except (SyntaxError, ValueError):
            value = text
        value = float(value) if isinstance(known, float) and type(value) is int else value
        value = list(value) if isinstance(known, list) and isinstance(value, tuple) else value
        if type(value) is not type(known):
            raise ValueError(f"override must be of type {type(known).__name__} for {path}, got {setting!r}")
        config = {**config, section: {**config[section], field: value}}
    return config
