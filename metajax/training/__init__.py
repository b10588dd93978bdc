"""The meta step, the loop around it, and runs on disk."""

from metajax.training._augment import augment
from metajax.training._beginning import Beginning, begin_with
from metajax.training._callbacks import Progress, Recorder, Saving, Validation, read_metrics
from metajax.training._checkpoint import CheckpointError, Checkpoints, params_sha256, warm_start
from metajax.training._data import image_options, input_form, open_out_of_scope, open_source
from metajax.training._device_loop import fit_on_device
from metajax.training._divergence import LossSpike, Rollback, SkipLimit, Spikes, skip_nonfinite
from metajax.training._experiment import Experiment, build, load_config, load_run, normalisation, on_features
from metajax.training._loop import NonFiniteError, fit
from metajax.training._outer import choose_task_batching, outer_update
from metajax.training._watch import Heartbeat, Preempted, Preemption, Profile, Stall, Throughput

__all__ = [
    "Beginning",
    "CheckpointError",
    "Checkpoints",
    "Experiment",
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
    "Stall",
    "Throughput",
    "Validation",
    "augment",
    "begin_with",
    "build",
    "choose_task_batching",
    "fit",
    "fit_on_device",
    "image_options",
    "input_form",
    "load_config",
    "load_run",
    "normalisation",
    "on_features",
    "open_out_of_scope",
    "open_source",
    "outer_update",
    "params_sha256",
    "read_metrics",
    "skip_nonfinite",
    "warm_start",
]
