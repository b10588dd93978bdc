"""Strategies around meta-training: how it begins, what it remembers, how it grows, streams, and which to choose."""

from metajax.strategies._curriculum import Passed, Stage, competence, curriculum, paced
from metajax.strategies._growth import Growth, deepen, grow_state, stack_blocks, widen
from metajax.strategies._memory import Memory, Reservoirs, Sample, balanced, prioritised, remember, reservoir
from metajax.strategies._progressive import progressive_column
from metajax.strategies._recurrent_replay import burn_in, sequence_priority, sequences
from metajax.strategies._replay import Experience, Remembering, replayed, with_experience

__all__ = [
    "Experience",
    "Growth",
    "Memory",
    "Passed",
    "Remembering",
    "Reservoirs",
    "Sample",
    "Stage",
    "balanced",
    "burn_in",
    "competence",
    "curriculum",
    "deepen",
    "grow_state",
    "paced",
    "prioritised",
    "progressive_column",
    "remember",
    "replayed",
    "reservoir",
    "sequence_priority",
    "sequences",
    "stack_blocks",
    "widen",
    "with_experience",
]
