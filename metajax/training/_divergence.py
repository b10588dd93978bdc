"""Handling of diverging training: steps that are not finite, and loss spikes."""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from metajax.core import _tree, _validate
from metajax.core._types import Episode, MetaState, OuterUpdate, Params
from metajax.training import _loop


def skip_nonfinite(outer: OuterUpdate) -> OuterUpdate:
    """Skips the steps whose loss or hypergradient is NaN or infinite.

    A skipped step only increments `state.step`, from which the random numbers of the next step are drawn.
    Meta-parameters, optimizer state and estimator state do not change. The metrics of the step are returned unchanged,
    with a `skipped` of 1. `fit` and `fit_on_device` continue, and `Recorder` leaves the step out of its means and
    counts it. The structure of the state does not change, so a run can resume from a checkpoint that was written
    without `skip_nonfinite`.

    `optax.apply_if_finite` around the optimizer does less: it checks only the gradient, protects neither the state of
    the estimator nor running statistics, and applies updates that are not finite after a number of consecutive errors.
    Add `SkipLimit` to the callbacks to stop a run with too many skipped steps.

    Args:
      outer: any meta step, spread over devices or not. Only its metrics `loss` and, if present, `grad_norm` decide
        whether a step is finite. A norm that overflows is not finite.

    Returns:
      An `OuterUpdate` with the same signature and one more metric, `skipped`, 0 or 1.

    Raises:
      ValueError: `outer` is not an `OuterUpdate`.

    >>> import jax, jax.numpy as jnp, metajax
    >>> def update(state, episodes):
    ...     loss = jnp.mean(episodes)
    ...     return state._replace(params=state.params - loss, step=state.step + 1), {"loss": loss}
    >>> outer = metajax.training.skip_nonfinite(metajax.OuterUpdate(lambda key, episode: None, update))
    >>> state = metajax.MetaState(jnp.ones(2), (), (), jnp.zeros([], jnp.int32), jax.random.key(0))
    >>> state, metrics = jax.jit(outer.update)(state, jnp.array([1.0, jnp.inf]))
    >>> state.params.tolist(), int(state.step), float(metrics["skipped"])
    ([1.0, 1.0], 1, 1.0)
    """
    _validate.instance("outer", outer, OuterUpdate)

    def update(state: MetaState, episodes: Episode, frozen: Params = None) -> tuple[MetaState, dict[str, Any]]:
        new, metrics = outer.update(state, episodes, *_tree.given(frozen))
        # checks the metrics and not the parameters, which would keep the old and the new parameters in memory in full
        finite = jnp.isfinite(metrics["loss"])
        if "grad_norm" in metrics:
            finite &= jnp.isfinite(metrics["grad_norm"])
        kept = {
            name: jax.tree.map(lambda after, before: jnp.where(finite, after, before), getattr(new, name), old)
            for name, old in state._asdict().items()
            if name not in ("step", "key")
        }
        return new._replace(**kept), {**metrics, "skipped": 1.0 - finite.astype(jnp.float32)}

    return outer.wrapped(outer.init, update)


class _Late:
    """A callback that reads the metrics of a step one step later, so that the device never waits for the host."""

    def __init__(self, at_once: int | None = None):
        self._at_once = at_once
        self._waiting: tuple[int, dict[str, Any]] | None = None

    def __call__(self, step: int, state: MetaState, metrics: dict[str, Any]) -> None:
        """Reads the metrics of the previous step, and also of this step at multiples of `at_once`."""
        waiting, self._waiting = self._waiting, (step, metrics)
        if waiting is not None:
            self._look(*waiting)
        if self._at_once is not None and step % self._at_once == 0:
            self._waiting = None
            self._look(step, metrics)

    def _look(self, step: int, metrics: dict[str, Any]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Drops the step that was not read yet: after an error its values may be gone."""
        self._waiting = None


class SkipLimit(_Late):
    """A callback that stops a run when `skip_nonfinite` skips too many steps in a row.

    Args:
      limit: number of consecutive skipped steps that stops the run.

    Attributes:
      count: number of skipped steps so far, without those before a resume.

    Raises:
      ValueError: `limit` is below 1.

    The callback raises a `NonFiniteError` one step after the last of `limit` skipped steps.

    >>> limit = SkipLimit(2)
    >>> for step, skipped in enumerate([1.0, 0.0, 1.0, 1.0, 1.0], start=1):
    ...     limit(step, None, {"loss": float("nan"), "skipped": skipped})
    Traceback (most recent call last):
    metajax.training._loop.NonFiniteError: 2 steps in a row up to step 4 had a loss or a hypergradient that is not...
    """

    def __init__(self, limit: int = 100):
        super().__init__()
        self._limit = _validate.positive_int("limit", limit)
        self._row = self.count = 0

    def _look(self, step: int, metrics: dict[str, Any]) -> None:
        skipped = bool(metrics.get("skipped", False))
        self.count += skipped
        self._row = self._row + 1 if skipped else 0
        if self._row >= self._limit:
            raise _loop.NonFiniteError(
                f"{self._row} steps in a row up to step {step} had a loss or a hypergradient that is not finite: "
                f"lower the outer or inner rate, or clip the gradient"
            )


class LossSpike(ValueError):
    """Raised if the loss of a step is far above the losses of earlier steps.

    Attributes:
      step: the step.
      loss: the loss of the step.
      threshold: the largest loss that is not a spike.

    >>> str(LossSpike(7, 3.0, 1.25))
    'the loss of step 7, 3, is above 1.25, where its spread over the steps before put the limit'
    """

    def __init__(self, step: int, loss: float, threshold: float):
        super().__init__(
            f"the loss of step {step}, {loss:.6g}, is above {threshold:.6g}, "
            f"where its spread over the steps before put the limit"
        )
        self.step, self.loss, self.threshold = step, loss, threshold


class Rollback(LossSpike):
    """Raised to request a rollback. If the caller does not handle it, the run stops.

    To handle it, restore the last checkpoint, of step `s`, and open the episodes `(step - s) * meta_batch` later than
    the position in the checkpoint. The run then continues with the batch after the one of the spike.

    >>> Rollback(7, 3.0, 1.25).step
    7
    """


class Spikes(_Late):
    """A callback that detects losses far above those of earlier steps.

    A loss is a spike if it exceeds the median of the last `window` losses by more than `factor` times their spread.
    The spread is 1.4826 times the median absolute deviation from the median (the standard deviation of a normal
    distribution), but at least 1 % of the absolute median and at least 1e-6, so that nearly constant losses do not
    cause spikes. There are no spikes until half of the window is filled. Spikes enter the window too, so a permanent
    level change stops counting as a spike after half a window. Losses that are not finite and losses of skipped steps
    are ignored.

    The loss of a step is read one step later. The last loss of a run is not read.

    Args:
      window: number of losses to compare with.
      factor: number of spreads above the median at which a loss is a spike. Losses over few tasks are skewed; 10 does
        not flag them.
      action: "count", "stop" (raise `LossSpike`), or "rollback" (raise `Rollback`).
      record: called with the step and `spike_loss` and `spike_threshold`, such as the method `write` of a `Recorder`.
      checkpoint_every: steps between checkpoints. The loss of these steps is read immediately, so that a checkpoint
        callback after this one does not save a spike.

    Attributes:
      count: number of spikes so far.

    Raises:
      ValueError: an argument is out of range.

    >>> spikes, losses = Spikes(window=4, action="stop"), [1.0, 1.1, 0.9, 1.0, 9.0, 1.0]
    >>> for step, loss in enumerate(losses, start=1):
    ...     spikes(step, None, {"loss": loss})
    Traceback (most recent call last):
    metajax.training._divergence.LossSpike: the loss of step 5, 9, is above 1.7413, where its spread over the steps ...
    """

    def __init__(
        self, window: int = 100, factor: float = 10.0, action: Literal["count", "stop", "rollback"] = "count", *,
        record: Callable[[int, dict[str, float]], None] | None = None, checkpoint_every: int | None = None,
    ):  # fmt: skip
        if checkpoint_every is not None:
            _validate.positive_int("checkpoint_every", checkpoint_every)
        super().__init__(checkpoint_every)
        self._losses: collections.deque[float] = collections.deque(maxlen=_validate.int_at_least("window", window, 2))
        self._factor = _validate.positive_float("factor", factor)
        self._action = _validate.one_of("action", action, ("count", "stop", "rollback"))
        self._record = record
        self.count = 0

    def _look(self, step: int, metrics: dict[str, Any]) -> None:
        loss = float(metrics["loss"])
        if not math.isfinite(loss) or bool(metrics.get("skipped", False)):
            return
        threshold = self._threshold()
        if loss > threshold:
            self.count += 1
            if self._record is not None:
                self._record(step, {"spike_loss": loss, "spike_threshold": threshold})
            if self._action != "count":
                raise (LossSpike if self._action == "stop" else Rollback)(step, loss, threshold)
        self._losses.append(loss)

    def _threshold(self) -> float:
        window = self._losses.maxlen or 0
        if 2 * len(self._losses) < window:
            return math.inf
        median = statistics.median(self._losses)
        deviation = statistics.median(abs(loss - median) for loss in self._losses)
        return median + self._factor * max(1.4826 * deviation, 0.01 * abs(median), 1e-6)
