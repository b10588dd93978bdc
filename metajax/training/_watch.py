"""What watches a run from beside it: signs of life, speed, traces, and the end that a cluster announces."""

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
    """A callback that keeps a small JSON file fresh while steps are taken, for a supervisor outside.

    The file holds `step`, `time` (seconds since 1970), `pid`, `host`, `process` (its index among those of the job) and
    `steps_per_second` since the writing before (0 at first). It is replaced as a whole: a reader never sees half of
    it. A run hangs or is dead when `time` is older than the longest pause between steps (validation, or compilation
    before the first).

    Args:
      path: the file, one for each process; its folder is made where it does not exist.
      every: seconds between two writings at least.

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
        # no attribute `every`: that is the loops' word for an interval in steps
        self._seconds = _validate.positive_float("every", every)
        self._step: int | None = None
        self._written: tuple[int, float] | None = None

    def __call__(self, step: int, state: MetaState, metrics: dict[str, Any]) -> None:
        """Writes when it is due, without a look at what the device computes."""
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
        """Writes the last step."""
        self._write()


class Stall:
    """A callback that ends the process when no step comes for too long, as where another process hangs.

    A process that dies ends the job of itself: JAX tells the others. One that is alive and does not go on (a file
    system that hangs, an endless loop) leaves them in a collective that has no end; this object's thread then writes
    a line to standard error and ends the process, whatever its main thread waits for.

    Args:
      seconds: longer than the longest pause between steps: compilation, validation, the copy of a checkpoint.
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
        """Notes that there was a step."""
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
        """Watches no more."""
        self._closed.set()

    def __enter__(self) -> Stall:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Throughput:
    """Measures speed and memory between two calls with a state; what `Recorder` adds to a line.

    Args:
      meta_batch: tasks of one step.
      start: steps that are already taken.

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
        """The means since the call before; waits for the device.

        `step_seconds` and `tasks_per_second` by the clock on the wall, so with compilation, validation and checkpoints
        between the calls; none where no step was taken. `device_bytes_in_use` and `device_peak_bytes` of the local
        device that has the most in use; none where devices do not tell (the CPU).
        """
        # the state's own number: many steps that ran as one program are seen one by one when all are over
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

    The device is waited for before the trace starts and before it stops: it holds these steps, whole, and no others.
    With `fit_on_device` it starts and stops where chunks end, at the first ends that are late enough.

    Args:
      steps: "STEP:COUNT", `COUNT` steps of which `STEP` is the first. Step 1, in which programs are compiled, is never
        traced; a run that goes on from a later step traces its second step and those after it.
      folder: where the trace goes, under `plugins/profile/`. One for each run; each host writes its own file.

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
        """Starts or stops the trace when it is due."""
        # reading the state's step waits for the device, hence the order
        if self._done or step < self._due or int(state.step) != step:
            return
        jax.block_until_ready(state)
        if self._tracing:
            self.close()
        else:
            jax.profiler.start_trace(self._folder)
            self._tracing, self._due = True, step + self._count

    def close(self) -> None:
        """Writes the trace of a run that ends before its last step."""
        if self._tracing:
            self._tracing, self._done = False, True
            jax.profiler.stop_trace()


class Preempted(Exception):
    """The run was asked to end by SIGTERM, and has saved what it needs to go on.

    Attributes:
      step: the step that was saved.

    >>> str(Preempted(7))
    'preempted; step 7 is saved'
    """

    def __init__(self, step: int):
        super().__init__(f"preempted; step {step} is saved")
        self.step = step


class Preemption:
    """A callback that answers SIGTERM: it saves after the step in whose course the signal came, and ends the run.

    A handler of the signal sets a flag, nothing else. As a callback, best the last, it then calls `save` and raises
    `Preempted`. With `fit_on_device`, it does so at the end of the chunk.

    In a job of several processes the signal may come to some of them, and not at the same time: JAX's preemption
    service, which has the signal then, finds a step that none has passed, and all save after that one, about a second
    later (and one or two chunks later with `fit_on_device`). `jax.distributed.initialize` comes before this object, and
    all processes call it for all steps.

    The handler is there from the start, until `close` (or the end of a `with`) puts back the one before. A single
    process can only handle signals in its main thread: elsewhere, this object does nothing.

    Args:
      save: `(step, state)`; returns when everything is written. All processes call it, with the same step.

    Attributes:
      received: whether the signal came; in a job of several processes, whether all know of it.

    Raises:
      ValueError: several processes without the preemption service.

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
            # a handler of our own would take the signal from the service
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
        """Saves and raises `Preempted` after the signal."""
        if self._together and multihost_utils.reached_preemption_sync_point(step):
            self.received = True
        if self.received and int(state.step) == step:
            self._save(step, state)
            raise Preempted(step)

    def close(self) -> None:
        """Puts back the handler that was there before."""
        if self._installed:
            self._installed = False
            # None: one that Python did not install, and cannot
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)

    def __enter__(self) -> Preemption:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
