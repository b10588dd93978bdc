"""Callbacks that monitor a run: heartbeats, stalls, throughput, profiler traces and preemption."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from metajax.core import _validate
from metajax.core._types import MetaState


class Heartbeat:
    """A callback that regularly rewrites a small JSON file during training, for an external supervisor.

    The file holds `step`, `time` (seconds since 1970), `pid`, `host`, `process` (the process index in the job) and
    `steps_per_second` since the previous write (0 at first). It is replaced atomically, so a reader never sees a
    partial file. A run hangs or is dead if `time` is older than the longest pause between steps (validation, or
    compilation before the first step).

    Args:
      path: the file, one for each process. Its folder is created if it does not exist.
      every: minimum number of seconds between two writes.

    Raises:
      ValueError: `every` is not above 0.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     heartbeat = Heartbeat(folder + "/heartbeat.json")
    ...     heartbeat(1, None, {})
    ...     heartbeat.close()
    ...     json.loads(pathlib.Path(folder, "heartbeat.json").read_text())["step"]
    1
    """

    def __init__(self, path: str | pathlib.Path, *, every: float = 10.0):
        self._path = pathlib.Path(path)
        # not named `every`, which the loops read as an interval in steps
        self._seconds = _validate.positive_float("every", every)
        self._step: int | None = None
        self._written: tuple[int, float] | None = None

    def __call__(self, step: int, state: MetaState, metrics: dict[str, Any]) -> None:
        """Writes the file if it is due, without waiting for the device."""
        self._step = step
        if self._written is None or time.monotonic() - self._written[1] >= self._seconds:
            self._write()

    def _write(self) -> None:
        step, now = self._step, time.monotonic()
        if step is None:
            return
        last_step, last = self._written or (step, now)
        rate = (step - last_step) / (now - last) if now > last else 0.0
        beat = {
            "step": step, "time": time.time(), "pid": os.getpid(), "host": socket.gethostname(),
            "process": jax.process_index(), "steps_per_second": rate,
        }  # fmt: skip
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(self._path.name + ".tmp")
        temporary.write_text(json.dumps(beat) + "\n", encoding="utf-8")
        os.replace(temporary, self._path)
        self._written = step, now

    def close(self) -> None:
        """Writes the file with the last step."""
        self._write()


class Stall:
    """A callback that ends the process if no step is taken for too long, for example because another process hangs.

    If a process dies, JAX notifies the others and the job ends. If a process is alive but hangs (in a file system or an
    endless loop), the others wait in a collective forever. The thread of this callback then writes a line to standard
    error and ends the process, even if the main thread is blocked.

    Args:
      seconds: time without a step after which the process ends. It must be longer than the longest pause between steps:
        compilation, validation, or the copy of a checkpoint.
      status: exit status of the process.

    Raises:
      ValueError: `seconds` is not above 0.

    >>> with Stall(3600.0) as stall:
    ...     stall(1, None, {})
    """

    def __init__(self, seconds: float, *, status: int = 70):
        self._seconds, self._status = _validate.positive_float("seconds", seconds), status
        self._step: int | None = None
        self._last, self._closed = time.monotonic(), threading.Event()
        threading.Thread(target=self._watch, name="stall", daemon=True).start()

    def __call__(self, step: int, state: MetaState, metrics: dict[str, Any]) -> None:
        """Records that a step was taken."""
        self._step, self._last = step, time.monotonic()

    def _watch(self) -> None:
        while True:
            left = self._last + self._seconds - time.monotonic()
            if left <= 0:
                break
            if self._closed.wait(left):
                return
        after = "before the first step" if self._step is None else f"after step {self._step}"
        sys.stderr.write(f"error: nothing came {after} for {self._seconds:g} s; this process ends\n")
        sys.stderr.flush()
        os._exit(self._status)

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()

    def __enter__(self) -> Stall:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Throughput:
    """Measures speed and memory use between two calls with a state. `Recorder` adds the result to its lines.

    Args:
      meta_batch: tasks per step.
      start: number of steps already taken.

    Raises:
      ValueError: `meta_batch` is below 1.

    >>> import jax.numpy as jnp, metajax
    >>> throughput = Throughput(meta_batch=4)
    >>> state = metajax.MetaState((), (), (), jnp.array(10, jnp.int32), jax.random.key(0))
    >>> found = throughput(state)
    >>> round(found["tasks_per_second"] * found["step_seconds"])
    4
    """

    def __init__(self, meta_batch: int, *, start: int = 0):
        self._meta_batch = _validate.positive_int("meta_batch", meta_batch)
        self._step, self._time = start, time.monotonic()

    def __call__(self, state: MetaState) -> dict[str, float]:
        """Returns the means since the previous call. Waits for the device.

        `step_seconds` and `tasks_per_second` are wall-clock times, including compilation, validation and checkpoints
        between the calls. They are left out if no step was taken. `device_bytes_in_use` and `device_peak_bytes` are the
        maxima over the local devices. They are left out if devices do not report them (the CPU).
        """
        # uses the step of the state: callbacks see the steps of one program one by one after all have ended
        step, now = int(state.step), time.monotonic()
        steps, seconds = step - self._step, now - self._time
        found: dict[str, float] = {}
        if steps > 0 and seconds > 0:
            found = {"step_seconds": seconds / steps, "tasks_per_second": self._meta_batch * steps / seconds}
            self._step, self._time = step, now
        told = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
        for name, ours in (("bytes_in_use", "device_bytes_in_use"), ("peak_bytes_in_use", "device_peak_bytes")):
            values = [stats[name] for stats in told if name in stats]
            if values:
                found[ours] = float(max(values))
        return found


class Profile:
    """A callback that traces a few steps for xprof and TensorBoard.

    The callback waits for the device before the trace starts and before it stops, so that the trace holds exactly
    these steps. With `fit_on_device` the trace starts and stops at the ends of chunks, at the first ones that are not
    too early.

    Args:
      steps: "STEP:COUNT", to trace `COUNT` steps starting with step `STEP`. Step 1, in which programs are compiled, is
        never traced. A run that resumes too late for `STEP` traces from its second step.
      folder: folder of the trace, which is written under `plugins/profile/`. Use one folder for each run. Each host
        writes its own file.

    Raises:
      ValueError: `steps` is not of this form, or one of its numbers is below 1.

    >>> Profile("5", "traces")
    Traceback (most recent call last):
    ValueError: profile must be STEP:COUNT, two integers of at least 1 such as '10:5', got '5'
    """

    def __init__(self, steps: str, folder: str | pathlib.Path):
        found = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", steps) if isinstance(steps, str) else None
        first, count = map(int, found.groups()) if found else (0, 0)
        if first < 1 or count < 1:
            raise ValueError(f"profile must be STEP:COUNT, two integers of at least 1 such as '10:5', got {steps!r}")
        self._folder, self._count = pathlib.Path(folder), count
        self._due, self._tracing, self._done = first - 1, False, False

    def __call__(self, step: int, state: MetaState, metrics: dict[str, Any]) -> None:
        """Starts or stops the trace if it is due."""
        # `state.step` comes last, because reading it waits for the device
        if self._done or step < self._due or int(state.step) != step:
            return
        jax.block_until_ready(state)
        if self._tracing:
            self.close()
        else:
            jax.profiler.start_trace(self._folder)
            self._tracing, self._due = True, step + self._count

    def close(self) -> None:
        """Stops and writes the trace if the run ends during tracing."""
        if self._tracing:
            self._tracing, self._done = False, True
            jax.profiler.stop_trace()


class Preempted(Exception):
    """Raised after SIGTERM, once the state is saved so that the run can resume.

    Attributes:
      step: the saved step.

    >>> str(Preempted(7))
    'preempted; step 7 is saved'
    """

    def __init__(self, step: int):
        super().__init__(f"preempted; step {step} is saved")
        self.step = step


class Preemption:
    """A callback that handles SIGTERM: it saves after the step in which the signal arrives and ends the run.

    The signal handler only sets a flag. The callback, which should be the last one, then calls `save` and raises
    `Preempted`. With `fit_on_device`, it does so at the end of the chunk.

    In a job of several processes, the signal may reach only some of them, and at different times. JAX's preemption
    service then handles the signal. It finds a step that no process has passed, and all processes save after that step,
    about a second later (one or two chunks later with `fit_on_device`). Call `jax.distributed.initialize` before
    creating this object, and call the object in all processes for all steps.

    The handler is installed when the object is created. `close` (or the end of a `with`) restores the previous handler.
    A single process can handle signals only in its main thread. In other threads this object does nothing.

    Args:
      save: `(step, state)`, which returns once everything is written. All processes call it with the same step.

    Attributes:
      received: whether the signal arrived; in a job of several processes, whether all processes know of it.

    Raises:
      ValueError: there are several processes without the preemption service.

    >>> import jax.numpy as jnp, metajax
    >>> state = metajax.MetaState((), (), (), jnp.array(7, jnp.int32), jax.random.key(0))
    >>> with Preemption(lambda step, state: None) as preemption:
    ...     preemption(6, state, {})
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     preemption(7, state, {})
    Traceback (most recent call last):
    metajax.training._watch.Preempted: preempted; step 7 is saved
    """

    def __init__(self, save: Callable[[int, MetaState], None]):
        self._save, self.received = save, False
        self._together = jax.process_count() > 1
        self._installed, self._before = False, None  # type: tuple[bool, Any]
        if self._together:
            # our own handler would take the signal away from the service
            service: bool = jax.config.jax_enable_preemption_service  # type: ignore[attr-defined]
            if not (service and jax.distributed.is_initialized()):
                raise ValueError(
                    "jax_enable_preemption_service must be on before jax.distributed.initialize where there are "
                    f"several processes, got {jax.process_count()} processes without it"
                )
        elif threading.current_thread() is threading.main_thread():
            self._before, self._installed = signal.signal(signal.SIGTERM, self._receive), True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def __call__(self, step: int, state: MetaState, metrics: dict[str, Any]) -> None:
        """Saves and raises `Preempted` if the signal has arrived."""
        if self._together and multihost_utils.reached_preemption_sync_point(step):
            self.received = True
        if self.received and int(state.step) == step:
            self._save(step, state)
            raise Preempted(step)

    def close(self) -> None:
        """Restores the previous signal handler."""
        if self._installed:
            self._installed = False
            # None: the previous handler was not installed from Python and cannot be restored
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)

    def __enter__(self) -> Preemption:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
