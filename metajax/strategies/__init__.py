"""Strategies around meta-training: how it begins, what it remembers, how it grows, streams, and which to choose."""

from metajax.strategies._averaging import Averaged, averaged, averaged_params, greedy_soup, soup
from metajax.strategies._change_points import ChangeState, change_points, run_length_init, run_length_update
from metajax.strategies._contrast import contrastive, encoder_params, moco, random_view, simclr
from metajax.strategies._control import LaneKeeper, lane_keeper
from metajax.strategies._curriculum import Passed, Stage, competence, curriculum, paced
from metajax.strategies._growth import Growth, deepen, grow_frozen, grow_state, stack_blocks, widen
from metajax.strategies._memory import Memory, Reservoirs, Sample, balanced, prioritised, remember, reservoir
from metajax.strategies._online import LeaderState, Online, RecentState, follow_the_meta_leader, recent, run_online
from metajax.strategies._progressive import progressive_column
from metajax.strategies._recurrent import recurrent
from metajax.strategies._recurrent_replay import burn_in, sequence_priority, sequences
from metajax.strategies._regret import cumulative_regret, recovery_time
from metajax.strategies._replay import Experience, Remembering, replayed, with_experience
from metajax.strategies._select import Candidate, Selection, select
from metajax.strategies._streams import character_stream
from metajax.strategies._supervised import Supervised, supervised
from metajax.strategies._vehicle import (
    Motion,
    Vehicle,
    dynamics_loss,
    lane_rates,
    lateral_accelerations,
    linear_tyre,
    motion_example,
    motion_features,
    pacejka,
    random_vehicle,
    residual_dynamics,
    vehicle_step,
)

__all__ = [
    "Averaged",
    "Candidate",
    "ChangeState",
    "Experience",
    "Growth",
    "LaneKeeper",
    "LeaderState",
    "Memory",
    "Motion",
    "Online",
    "Passed",
    "RecentState",
    "Remembering",
    "Reservoirs",
    "Sample",
    "Selection",
    "Stage",
    "Supervised",
    "Vehicle",
    "averaged",
    "averaged_params",
    "balanced",
    "burn_in",
    "change_points",
    "character_stream",
    "competence",
    "contrastive",
    "cumulative_regret",
    "curriculum",
    "deepen",
    "dynamics_loss",
    "encoder_params",
    "follow_the_meta_leader",
    "greedy_soup",
    "grow_frozen",
    "grow_state",
    "lane_keeper",
    "lane_rates",
    "lateral_accelerations",
    "linear_tyre",
    "moco",
    "motion_example",
    "motion_features",
    "paced",
    "pacejka",
    "prioritised",
    "progressive_column",
    "random_vehicle",
    "random_view",
    "recent",
    "recovery_time",
    "recurrent",
    "remember",
    "replayed",
    "reservoir",
    "residual_dynamics",
    "run_length_init",
    "run_length_update",
    "run_online",
    "select",
    "sequence_priority",
    "sequences",
    "simclr",
    "soup",
    "stack_blocks",
    "supervised",
    "vehicle_step",
    "widen",
    "with_experience",
]
