"""Strategies of a learner's life: streams whose task drifts or switches without notice."""

from metajax.strategies._change_points import ChangeState, change_points, run_length_init, run_length_update
from metajax.strategies._control import LaneKeeper, lane_keeper
from metajax.strategies._online import (
    LeaderState,
    Online,
    RecentState,
    follow_the_meta_leader,
    recent,
    run_online,
)
from metajax.strategies._recurrent import recurrent
from metajax.strategies._regret import cumulative_regret, recovery_time
from metajax.strategies._streams import character_stream
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
    "ChangeState",
    "LaneKeeper",
    "LeaderState",
    "Motion",
    "Online",
    "RecentState",
    "Vehicle",
    "change_points",
    "character_stream",
    "cumulative_regret",
    "dynamics_loss",
    "follow_the_meta_leader",
    "lane_keeper",
    "lane_rates",
    "lateral_accelerations",
    "linear_tyre",
    "motion_example",
    "motion_features",
    "pacejka",
    "random_vehicle",
    "recent",
    "recovery_time",
    "recurrent",
    "residual_dynamics",
    "run_length_init",
    "run_length_update",
    "run_online",
    "vehicle_step",
]
