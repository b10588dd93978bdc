"""What the processes of one job tell each other, and which part of a batch each of them brings."""

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
    """Tells a JSON value to all processes of the job, and gives what each of them told, in their order.

    All processes call it, and wait for the slowest. In a job of one process it costs nothing.

    Raises:
      TypeError, ValueError: `value` is no JSON value.

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
    """The JSON value of `function()`, which process 0 alone calls, in all processes.

    Raises:
      ValueError: `function` raised one, with its text, in every process.

    >>> from_first(lambda: jax.process_index())
    0
    """
    return agree(function if jax.process_index() == 0 else lambda: None)[0]


def agree(function: Callable[[], Any]) -> list[Any]:
    """Calls `function` in every process, and gives the JSON values that it returned, in the order of the processes.

    Where it raises a ValueError in one process, it does in all: none goes on and waits for one that has ended.

    Raises:
      ValueError: `function` raised one; the error names the process where the job has several.

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
    """Which block of a global batch of episodes this process brings, and how many blocks there are.

    Processes whose devices hold the same tasks (along `model`) bring the same block. The two numbers are what
    `metajax.data.episodes` takes as `process_index` and `process_count`, with a `batch` of `num_tasks // count`.

    Args:
      mesh: of `make_mesh`.
      num_tasks: tasks of the global batch.

    Raises:
      ValueError: the devices do not divide the tasks, or a process shares some but not all of its tasks with another.

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
    """The leaves of a tree as NumPy arrays, whole in every process, wherever their parts lie.

    All processes of a job call it; what this process holds whole is not communicated.

    >>> to_host({"w": jax.numpy.ones(2)})["w"].tolist()
    [1.0, 1.0]
    """

    def fetch(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            mesh = leaf.sharding.mesh  # type: ignore[attr-defined]
            leaf = jax.jit(lambda whole: whole, out_shardings=NamedSharding(mesh, PartitionSpec()))(leaf)
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)
