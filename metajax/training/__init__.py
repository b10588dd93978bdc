"""The meta step, training loops, callbacks and checkpoints."""

from metajax.training._augment import augment
from metajax.training._averaging import Averaged, averaged, averaged_params, greedy_soup, soup
from metajax.training._beginning import Beginning, begin_with
from metajax.training._callbacks import Progress, Recorder, Saving, Validation, read_metrics
from metajax.training._checkpoint import CheckpointError, Checkpoints, params_sha256, restore_params, warm_start
from metajax.training._contrastive import encoder_params, moco, simclr
from metajax.training._curriculum import Stage, StageResult, competence, curriculum, paced
from metajax.training._device_loop import fit_on_device
from metajax.training._divergence import LossSpike, Rollback, SkipLimit, Spikes, skip_nonfinite
from metajax.training._loop import NonFiniteError, closing, fit
from metajax.training._outer import choose_task_batching, outer_update
from metajax.training._supervised import Supervised, supervised
from metajax.training._watch import Heartbeat, Preempted, Preemption, Profile, Stall, Throughput

__all__ = [
    "Averaged",
    "Beginning",
    "CheckpointError",
    "Checkpoints",
    "Heartbeat",
    "LossSpike",
    "NonFiniteError",
    "Preempted",
    "Preemption",
    "Profile",
    "Progress",
    "Recorder",
    "Rollback",
    "Saving",
    "SkipLimit",
    "Spikes",
    "Stage",
    "StageResult",
    "Stall",
    "Supervised",
    "Throughput",
    "Validation",
    "augment",
    "averaged",
    "averaged_params",
    "begin_with",
    "choose_task_batching",
    "closing",
    "competence",
    "curriculum",
    "encoder_params",
    "fit",
    "fit_on_device",
    "greedy_soup",
    "moco",
    "outer_update",
    "paced",
    "params_sha256",
    "read_metrics",
    "restore_params",
    "simclr",
    "skip_nonfinite",
    "soup",
    "supervised",
    "warm_start",
]
