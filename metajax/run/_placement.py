"""The device mesh and the placement of parameters, from the section `mesh` of a config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def make_mesh(config: Any, tasks: int, *, devices: Sequence[Any] | None = None) -> Any:
    """Returns the mesh described by `config.mesh`.

    With the default sizes and a single process, the mesh has the largest number of devices that divides the tasks, so
    that a config for eight devices also trains on three. Otherwise the mesh has all devices of all processes.

    Args:
      config: a config with the fields `mesh.task`, `mesh.fsdp` and `mesh.model`.
      tasks: tasks per step.
      devices: the devices; by default those of all processes.

    Raises:
      ValueError: the sizes do not make up the devices, or the devices do not divide the tasks.
    """
    import jax

    from metajax import parallel

    replays = config.replay.capacity > 0
    if replays:  # new and replayed tasks are divided in the same way
        tasks = math.gcd(tasks, config.replay.count)
    sizes = {name: config.mesh[name] for name in ("task", "fsdp", "model")}
    found = jax.devices() if devices is None else list(devices)
    if sizes == {"task": -1, "fsdp": 1, "model": 1} and jax.process_count() == 1:
        found = found[: max(count for count in range(1, len(found) + 1) if tasks % count == 0)]
    mesh = parallel.make_mesh(**sizes, devices=found)
    groups = parallel.num_groups(mesh)
    if tasks % groups:
        name, told = "training.meta_batch", f"{tasks}"
        if replays:
            name, told = (
                "training.meta_batch and replay.count",
                f"{config.training.meta_batch} and {config.replay.count}",
            )
        elif tasks != config.training.meta_batch:
            name = "the tasks in a step of batches"
        raise ValueError(f"{name} must be a multiple of mesh.task * mesh.fsdp, {groups} here, got {told}")
    return mesh


def rules(config: Any, mesh: Any) -> Any:
    """Returns the partition rules for parameters, from `config.mesh.rules`.

    Without rules, each large parameter is divided over `fsdp` along its longest dimension.

    Raises:
      ValueError: a rule is not a pair of an expression and a spec, or the axis `model` has several devices and no rule
        divides anything over it.
    """
    from jax.sharding import PartitionSpec

    from metajax import parallel

    given = config.mesh.rules
    for rule in given:
        if len(rule) != 2 or not isinstance(rule[0], str) or not isinstance(rule[1], list | tuple):
            raise ValueError(f"mesh.rules must be pairs such as ('kernel', (None, 'fsdp')), got {rule!r}")
    if mesh.shape["model"] > 1 and not any("model" in str(spec) for _, spec in given):
        raise ValueError(f"mesh.rules must divide something over 'model', which has {mesh.shape['model']} devices")
    if not given:
        return parallel.largest_axis(mesh.shape["fsdp"])
    return [(pattern, PartitionSpec(*map(_entry, spec))) for pattern, spec in given]


def _entry(entry: Any) -> Any:
    return tuple(entry) if isinstance(entry, list) else entry
