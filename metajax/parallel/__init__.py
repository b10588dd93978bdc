"""Devices: the meta step over more than one."""

from metajax.parallel._spmd import shard_tasks

__all__ = ["shard_tasks"]
