"""How learners go on learning: what they start from, remember, and grow."""

from metajax.strategies._memory import Memory, Reservoirs, Sample, balanced, prioritised, remember, reservoir
from metajax.strategies._recurrent_replay import burn_in, sequence_priority, sequences
from metajax.strategies._replay import Experience, Remembering, replayed, with_experience

__all__ = [
    "Experience",
    "Memory",
    "Remembering",
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
