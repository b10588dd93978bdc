"""Communication between the processes of one job, and the part of a batch that each process provides."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metajax.parallel._spmd import require_divided, task_sharding


def exchange(value: Any) -> list[Any]:
    """Sends a JSON value to all processes of the job, and returns the values of all processes, in process order.

    All processes must call it, and wait for the slowest one. In a job of one process it does not communicate.

    Raises:
      TypeError, ValueError: `value` is not a JSON value.

    >>> exchange({"process": jax.process_index()})
    [{'process': 0}]
    """
    text = json.dumps(value).encode()
    if jax.process_count() == 1:
        return [json.loads(text)]
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.frombuffer(text.ljust(int(lengths.max())), np.uint8)
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]


def from_first(function: Callable[[], Any]) -> Any:
    """Calls `function` in process 0 only, and returns its JSON value in all processes.

    Raises:
      ValueError: `function` raised a ValueError; every process then raises one with its text.

    >>> from_first(lambda: jax.process_index())
    0
    """
    return agree(function if jax.process_index() == 0 else lambda: None)[0]


def agree(function: Callable[[], Any]) -> list[Any]:
    """Calls `function` in every process, and returns the JSON values of all processes, in process order.

    If `function` raises a ValueError in one process, all processes raise it, so that no process waits for one that has
    ended.

    Raises:
      ValueError: `function` raised a ValueError; the error names the process if the job has several.

    >>> agree(lambda: 7)
    [7]
    """
    if jax.process_count() == 1:
        return exchange(function())
    value, refused = None, None
    try:
        value = function()
    except ValueError as error:
        refused = str(error)
    told = exchange([value, refused])
    for process, (_, text) in enumerate(told):
        if text is not None:
            raise ValueError(f"process {process}: {text}")
    return [value for value, _ in told]


def process_block(mesh: Mesh, num_tasks: int) -> tuple[int, int]:
    """Returns the block of a global batch of episodes that this process provides, and the number of blocks.

    Processes whose devices hold the same tasks (along `model`) provide the same block. Pass the two numbers to
    `metajax.data.episodes` as `process_index` and `process_count`, with a `batch` of `num_tasks // count`.

    Args:
      mesh: mesh from `make_mesh`.
      num_tasks: number of tasks in the global batch.

    Raises:
      ValueError: the number of tasks is not a multiple of the number of device groups, or a process shares some but not
        all of its tasks with another process.

    >>> from metajax.parallel import make_mesh
    >>> process_block(make_mesh(), 8 * len(jax.devices()))
    (0, 1)
    """
    require_divided(mesh, num_tasks)
    held: dict[int, set[int]] = {}
    places: dict[Any, Any] = task_sharding(mesh).devices_indices_map((num_tasks,))  # type: ignore[assignment]
    for device, (index, *_) in places.items():
        held.setdefault(device.process_index, set()).update(range(*index.indices(num_tasks)))
    blocks = sorted({tuple(sorted(tasks)) for tasks in held.values()})
    if sum(map(len, blocks)) != num_tasks or len({*map(len, blocks)}) > 1:
        raise ValueError(f"mesh must give each two processes the same tasks or others, got {held}")
    return blocks.index(tuple(sorted(held[jax.process_index()]))), len(blocks)


def to_host(tree: Any) -> Any:
    """Returns the leaves of a tree as full NumPy arrays in every process, however they are sharded.

    All processes of a job must call it. Leaves that this process holds in full are not communicated.

    >>> to_host({"w": jax.numpy.ones(2)})["w"].tolist()
    [1.0, 1.0]
    """

    def fetch(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            mesh = leaf.sharding.mesh  # type: ignore[attr-defined]
            leaf = jax.jit(lambda whole: whole, out_shardings=NamedSharding(mesh, PartitionSpec()))(leaf)
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)
