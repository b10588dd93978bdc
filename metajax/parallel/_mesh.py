"""The device mesh."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from metajax.core import _validate

# in this order, so that the devices along the axis that communicates most are closest to each other
AXES = ("task", "fsdp", "model")


def make_mesh(task: int = -1, fsdp: int = 1, model: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Creates a mesh with three axes.

    One of the three sizes may be -1; it is then inferred from the number of devices.

    Args:
      task: number of devices that hold the same parameters and compute different tasks (data parallel).
      fsdp: number of devices that compute different tasks and divide parameters and optimizer state among themselves
        (Zhao et al. 2023, arXiv:2304.11277).
      model: number of devices that compute the same tasks and divide the computation of each task (tensor parallel;
        Shoeybi et al. 2019, arXiv:1909.08053).
      devices: devices of the mesh; by default all devices of all processes.

    Raises:
      ValueError: a size is neither -1 nor positive, two sizes are -1, or the product of the sizes is not the number of
        devices.

    >>> make_mesh(task=1, devices=jax.devices()[:1]).axis_names
    ('task', 'fsdp', 'model')
    """
    chosen = jax.devices() if devices is None else list(devices)
    sizes = dict(zip(AXES, (task, fsdp, model), strict=True))
    for name, size in sizes.items():
        if size != -1:
            _validate.positive_int(f"mesh.{name}", size)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh must leave at most one axis at -1, got {_told(sizes)}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and len(chosen) % fixed == 0:
        sizes[free[0]] = len(chosen) // fixed
    if math.prod(sizes.values()) != len(chosen):
        raise ValueError(f"mesh must divide the {len(chosen)} devices into its axes, got {_told(sizes)}")
    return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * 3, devices=chosen)


def _told(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())
