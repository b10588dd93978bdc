"""A simulated vehicle on a road that turns slippery, and a lane-keeping controller."""

from experiments.vehicle._control import LaneKeeper, lane_keeper
from experiments.vehicle._dynamics import (
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
    "LaneKeeper",
    "Motion",
    "Vehicle",
    "dynamics_loss",
    "lane_keeper",
    "lane_rates",
    "lateral_accelerations",
    "linear_tyre",
    "motion_example",
    "motion_features",
    "pacejka",
    "random_vehicle",
    "residual_dynamics",
    "vehicle_step",
]
