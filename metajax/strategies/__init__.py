"""Strategies of training: curricula from simple tasks to hard ones, and networks that grow."""

from metajax.strategies._curriculum import Passed, Stage, competence, curriculum, paced
from metajax.strategies._growth import Growth, deepen, grow_state, stack_blocks, widen
from metajax.strategies._progressive import progressive_column

__all__ = [
    "Growth",
    "Passed",
    "Stage",
    "competence",
    "curriculum",
    "deepen",
    "grow_state",
    "paced",
    "progressive_column",
    "stack_blocks",
    "widen",
]
