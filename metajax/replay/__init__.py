"""Memories of earlier examples, tasks and sequences, and meta steps that replay them."""

from metajax.replay._memory import Memory, Reservoirs, Sample, balanced, prioritised, remember, reservoir
from metajax.replay._recurrent import burn_in, sequence_priority, sequences
from metajax.replay._replay import Experience, ReplayState, replayed, with_experience

__all__ = [
    "Experience",
    "Memory",
    "ReplayState",
    "Reservoirs",
    "Sample",
    "balanced",
    "burn_in",
    "prioritised",
    "remember",
    "replayed",
    "reservoir",
    "sequence_priority",
    "sequences",
    "with_experience",
]
