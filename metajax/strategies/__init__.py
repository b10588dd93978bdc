"""Strategies around meta-training: how it begins, what it remembers, how it grows, streams, and which to choose."""

from metajax.strategies._averaging import Averaged, averaged, averaged_params, greedy_soup, soup
from metajax.strategies._contrast import contrastive, encoder_params, moco, random_view, simclr
from metajax.strategies._curriculum import Passed, Stage, competence, curriculum, paced
from metajax.strategies._growth import Growth, deepen, grow_state, stack_blocks, widen
from metajax.strategies._memory import Memory, Reservoirs, Sample, balanced, prioritised, remember, reservoir
from metajax.strategies._progressive import progressive_column
from metajax.strategies._recurrent_replay import burn_in, sequence_priority, sequences
from metajax.strategies._replay import Experience, Remembering, replayed, with_experience
from metajax.strategies._select import Candidate, Selection, select
from metajax.strategies._supervised import Supervised, supervised

__all__ = [
    "Averaged",
    "Candidate",
    "Experience",
    "Growth",
    "Memory",
    "Passed",
    "Remembering",
    "Reservoirs",
    "Sample",
    "Selection",
    "Stage",
    "Supervised",
    "averaged",
    "averaged_params",
    "balanced",
    "burn_in",
    "competence",
    "contrastive",
    "curriculum",
    "deepen",
    "encoder_params",
    "greedy_soup",
    "grow_state",
    "moco",
    "paced",
    "prioritised",
    "progressive_column",
    "random_view",
    "remember",
    "replayed",
    "reservoir",
    "select",
    "sequence_priority",
    "sequences",
    "simclr",
    "soup",
    "stack_blocks",
    "supervised",
    "widen",
    "with_experience",
]
