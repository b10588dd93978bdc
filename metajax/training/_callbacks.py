"""Callbacks of the training loops: progress, logs, validation and checkpoints."""

from __future__ import annotations

import json
import operator
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from metajax.core import _tree
from metajax.core._types import MetaState, Params
from metajax.training import _loop
from metajax.training._checkpoint import Checkpoints
from metajax.training._watch import Throughput

Score = Callable[[Any], dict[str, float]]


def _scalars(metrics: dict[str, Any]) -> dict[str, float]:
    """Returns metrics as floats. Of metrics with one value for each inner step, it returns the last value."""
    return {name: float(np.ravel(value)[-1]) for name, value in metrics.items() if np.size(value)}


class Progress:
    """A progress bar on standard error that shows loss, accuracy and tasks per second.

    Args:
      steps: total number of steps.
      meta_batch: tasks per step.
      start: number of steps already taken.

    >>> import io
    >>> bar = Progress(2, meta_batch=4, file=io.StringIO())
    >>> bar(1, None, {"loss": 0.5})
    >>> bar.close()
    """

    def __init__(self, steps: int, *, meta_batch: int, start: int = 0, file: Any = None):
        from tqdm import tqdm

        self._bar = tqdm(total=steps, initial=start, file=file, unit="step", mininterval=1.0, smoothing=0.1)
        self._meta_batch, self._looked = meta_batch, 0.0

    def __call__(self, step: int, state: MetaState, metrics: dict[str, Any]) -> None:
        """Advances the bar and reads the metrics at most once per second."""
        now = time.monotonic()
        if now - self._looked > 1.0:
            self._looked = now
            told = {"loss": f"{float(metrics['loss']):.4f}"}
            if "accuracy" in metrics:
                told["accuracy"] = f"{100 * float(metrics['accuracy']):.1f}%"
            rate = self._bar.format_dict.get("rate")
            if rate:
                told["tasks/s"] = f"{rate * self._meta_batch:.0f}"
            self._bar.set_postfix(told, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Draws the bar a last time and closes it."""
        self._bar.close()


class Recorder:
    """Writes metrics as JSON lines and TensorBoard events every few steps, and validation scores after each validation.

    A line holds `step`, `seconds` of training, and the metrics. Training metrics are means over the steps since the
    previous line; validation metrics are not averaged. The means leave out the steps that `skip_nonfinite` skipped, and
    `skipped` counts them. Lines after step `start`, which an interrupted run may have written, are removed.

    Args:
      folder: the run folder, which receives `metrics.jsonl` and `tensorboard/`. With None, the recorder writes nothing
        and only measures `seconds`, as in all processes of a job except one.
      every: steps between lines.
      start: number of steps already taken.
      seconds: seconds that the steps before `start` took.
      tensorboard: whether to write events. No events are written if TensorFlow is not installed.
      waiting: the value of `waiting` when the checkpoint was saved from which the run resumes. The first line is then
        the same as in a run that was not interrupted.
      meta_batch: tasks per step. If given, lines also hold `step_seconds` and `tasks_per_second` since the previous
        line, in wall-clock time (including compilation, validation and checkpoints), and the maxima over the local
        devices of `device_bytes_in_use` and `device_peak_bytes`, if devices report them.

    Attributes:
      tensorboard: whether events are written.
      waiting: the metrics of the steps since the last line, to be saved with a checkpoint.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     recorder = Recorder(folder, every=1, tensorboard=False)
    ...     recorder(1, None, {"loss": 0.5})
    ...     recorder.close()
    ...     read_metrics(folder)[0]["loss"]
    0.5
    """

    def __init__(
        self, folder: str | pathlib.Path | None, *, every: int, start: int = 0, seconds: float = 0.0,
        tensorboard: bool = True, waiting: Sequence[dict[str, float]] = (), meta_batch: int | None = None,
    ):  # fmt: skip
        self._throughput = None if meta_batch is None else Throughput(meta_batch, start=start)
        self._begin, self._step = time.monotonic() - seconds, start
        self._every, self._waiting = every, list(waiting)  # type: tuple[int, list[dict[str, Any]]]
        self._file, self._events, self.tensorboard = None, None, False  # type: Any, Any, bool
        if folder is None:
            return
        folder = pathlib.Path(folder)
        kept = [line for line in read_metrics(folder) if line["step"] <= start and "partial" not in line]
        path = folder / "metrics.jsonl"
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 closed in close
        self._events = _event_writer(folder / "tensorboard") if tensorboard else None
        self.tensorboard = self._events is not None

    @property
    def seconds(self) -> float:
        """Seconds of training so far, including the seconds before a resume."""
        return time.monotonic() - self._begin

    @property
    def waiting(self) -> list[dict[str, float]]:
        """The metrics of the steps since the last line, to be saved with a checkpoint."""
        return [_scalars(line) for line in self._waiting]

    def __call__(self, step: int, state: MetaState, metrics: dict[str, Any]) -> None:
        """Stores the metrics of a step and writes their mean when a line is due."""
        if self._file is None:
            return
        self._waiting.append(metrics)
        self._step = step
        if step % self._every == 0 or step == 1:
            self._write_waiting({} if self._throughput is None else self._throughput(state))

    def _write_waiting(self, more: dict[str, float]) -> None:
        lines = [_scalars(waiting) for waiting in self._waiting]
        self._waiting = []
        kept = [line for line in lines if not line.get("skipped")]
        values = {name: float(np.mean([line[name] for line in kept])) for name in lines[0]} if kept else {}
        if "skipped" in lines[0]:
            values["skipped"] = float(len(lines) - len(kept))
        self.write(self._step, values | more)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one line."""
        if self._file is None:
            return
        line = {"step": step, "seconds": round(self.seconds, 3), **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._events is not None:
            self._events(step, values)

    def close(self) -> None:
        """Writes the mean over the steps since the last line, with `partial` as their number, and closes the file."""
        if self._file is None:
            return
        if self._waiting:
            self._write_waiting({"partial": len(self._waiting)})
        self._file.close()


def _event_writer(folder: pathlib.Path) -> Callable[[int, dict[str, float]], None] | None:
    from metajax.data import tensorflow

    try:
        tf = tensorflow()
    except ImportError:
        return None
    writer = tf.summary.create_file_writer(str(folder))

    def write(step: int, values: dict[str, float]) -> None:
        with writer.as_default():
            for name, value in values.items():
                tf.summary.scalar(name, value, step=step)
        writer.flush()

    return write


def read_metrics(folder: str | pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's `metrics.jsonl`, without a last line that a kill left incomplete.

    >>> read_metrics("there is no such folder")
    []
    """
    path = pathlib.Path(folder) / "metrics.jsonl"
    lines: list[dict[str, Any]] = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


class Validation:
    """Scores the meta-parameters every few steps, records the scores, and saves the best checkpoint.

    Args:
      score: `(params) -> metrics`, such as a call of `metajax.evaluation.evaluate` on validation episodes.
      recorder: writes the metrics.
      every: steps between validations, also an attribute.
      checkpoints: saves the best checkpoint.
      better: the metric to compare and its sign, 1 if higher is better.
      steps: total number of steps. The last step is always validated.
      best: the best value so far.
      of: returns the parameters of a state to score, such as `metajax.training.averaged_params`. None scores its
        `params`.
      frozen: the frozen base, which is merged with these parameters, or None.

    >>> Validation.__name__
    'Validation'
    """

    def __init__(
        self, score: Score, recorder: Recorder, *, every: int, checkpoints: Checkpoints, better: tuple[str, int],
        best: float | None = None, steps: int | None = None, of: Callable[[MetaState], Params] | None = None,
        frozen: Params = None,
    ):  # fmt: skip
        self._steps, self._of, self._frozen = steps, of or operator.attrgetter("params"), frozen
        self._score, self._recorder, self.every, self._checkpoints = score, recorder, every, checkpoints
        self._name, self._sign = better
        self.best = best

    def __call__(self, step: int, state: MetaState, metrics: dict[str, Any]) -> None:
        """Validates if a validation is due."""
        if step % self.every and step != self._steps:
            return
        _loop.require_finite_loss(step, metrics)
        found = self._score(_tree.merge(self._of(state), self._frozen))
        self._recorder.write(step, found)
        value = found[self._name]
        if np.isfinite(value) and (self.best is None or self._sign * value > self._sign * self.best):
            self.best = value
            self._checkpoints.save(step, state, {"best": value}, kind="best")

    def close(self) -> None:
        """Waits for the checkpoint that is being written."""
        self._checkpoints.wait()


class Saving:
    """Saves a checkpoint of kind `last` every few steps and after the last step, while training continues.

    Args:
      checkpoints: saves the checkpoints.
      every: steps between checkpoints, also an attribute.
      steps: total number of steps.
      extra: returns the JSON values to store with the state.

    >>> Saving.__name__
    'Saving'
    """

    def __init__(self, checkpoints: Checkpoints, *, every: int, steps: int, extra: Callable[[], dict[str, Any]]):
        self._checkpoints, self.every, self._steps, self._extra = checkpoints, every, steps, extra

    def __call__(self, step: int, state: MetaState, metrics: dict[str, Any]) -> None:
        """Saves if a checkpoint is due. Raises an error instead of saving a state that is not finite."""
        if step % self.every and step != self._steps:
            return
        _loop.require_finite_loss(step, metrics)
        self._save(step, state)

    def _save(self, step: int, state: MetaState) -> None:
        _loop.require_finite_params(step, state)
        self._checkpoints.save(step, state, self._extra())

    def save_now(self, step: int, state: MetaState) -> None:
        """Saves at any step and returns when the checkpoint is sealed, as `Preemption` requires."""
        self._save(step, state)
        self._checkpoints.wait()

    def close(self) -> None:
        """Waits for the checkpoint that is being written."""
        self._checkpoints.wait()
