"""Checks of external inputs against a run, and config changes for them."""

from __future__ import annotations

from typing import Any


def check_inputs(name: str, inputs: Any, learner: Any, params: Any) -> None:
    """Raises a ValueError if the learner would need other parameters than `params` for `inputs`.

    Args:
      name: name of the inputs in the error message.
      inputs: the inputs, leaves `[n, ...]`.
      learner: learner of the run.
      params: parameters of the run. They may hold more than the learner uses.
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


def check_steps(steps: int | None, config: Any) -> None:
    """Raises a ValueError if inner steps are given for a learner whose factory takes no `num_steps`."""
    section = config.learner if config.deployed is None or "name" not in config.deployed else config.deployed
    if steps is not None and "num_steps" not in section:
        raise ValueError(f"steps must not be given for {section.name}, which takes no inner steps, got {steps}")


def with_columns(config: Any, text: str | None, label: str | None) -> Any:
    """Sets the text and label columns given by flags in the config, and returns it.

    Raises:
      ValueError: a column is given for a run on data without such a column.
    """
    for name, column in (("text", text), ("label", label)):
        if column is None:
            continue
        if name not in config.data:
            raise ValueError(f"{name}_column must not be given for a run on {config.data.name}, got {column!r}")
        config.data[name] = column
    return config


def with_names(config: Any, split: str, names: list[str]) -> Any:
    """Restricts a split in the config to some of its classes or domains, and returns the config.

    Raises:
      ValueError: the config of the run does not have these names.
    """
    known = (config.data.get("splits") or {}).get(split) or ()
    unknown = [name for name in names if isinstance(known, int | float) or name not in known]
    if unknown:
        raise ValueError(
            f"names must be among those that data.splits of the run has for {split}, {tuple(known)}, got {unknown}"
        )
    config.data.splits[split] = names
    return config
