"""The meta step and the loop around it."""

from metajax.training._outer import choose_task_batching, outer_update

__all__ = ["choose_task_batching", "outer_update"]
