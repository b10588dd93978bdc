"""Learning from streams of tasks: change points, follow the meta-leader, regret."""

from metajax.online._change_points import ChangeState, change_points, run_length_init, run_length_update
from metajax.online._online import LeaderState, Online, RecentState, follow_the_meta_leader, recent, run_online
from metajax.online._regret import cumulative_regret, recovery_time
from metajax.online._streams import character_stream

__all__ = [
    "ChangeState",
    "LeaderState",
    "Online",
    "RecentState",
    "change_points",
    "character_stream",
    "cumulative_regret",
    "follow_the_meta_leader",
    "recent",
    "recovery_time",
    "run_length_init",
    "run_length_update",
    "run_online",
]
