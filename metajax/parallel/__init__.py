"""The meta step on several devices."""

from metajax.parallel._collectives import collective_bytes
from metajax.parallel._mesh import make_mesh
from metajax.parallel._processes import agree, exchange, from_first, process_block, to_host
from metajax.parallel._rules import largest_axis, partition_specs
from metajax.parallel._spmd import frozen_shardings, num_groups, pad_tasks, put, shard, state_shardings, task_sharding

__all__ = [
    "agree",
    "collective_bytes",
    "exchange",
    "from_first",
    "frozen_shardings",
    "largest_axis",
    "make_mesh",
    "num_groups",
    "pad_tasks",
    "partition_specs",
    "process_block",
    "put",
    "shard",
    "state_shardings",
    "task_sharding",
    "to_host",
]
