"""Selection of a strategy: candidates meta-train on the same tasks, and the worse ones stop early."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from metajax.core import _validate
from metajax.core._types import Episode, Learner, MetaState, OuterUpdate, Params
from metajax.data import EpisodeSpec, Source, check_source, episode, episode_batch
from metajax.evaluation import Evaluation, evaluate, predict
from metajax.training import Checkpoints

_NAME = re.compile(r"[\w.+-]+")
_TIMED = 5  # number of timed calls


class Candidate(NamedTuple):
    """One strategy.

    Attributes:
      name: letters, digits and `_ . + -`.
      learner: the learner to deploy.
      outer: trains its meta-parameters: an `outer_update` of this learner or of another one with the same
        meta-parameters.
      num_steps: inner steps in evaluation. None uses the default of the learner.

    >>> Candidate._fields
    ('name', 'learner', 'outer', 'num_steps')
    """

    name: str
    learner: Learner
    outer: OuterUpdate
    num_steps: int | None = None


class Row(NamedTuple):
    """The result of one candidate at the rung where it stopped.

    Attributes:
      name: name of the candidate.
      steps: number of meta steps taken.
      metric: "accuracy" or "mse".
      mean: mean over the validation episodes, which are the same for all candidates.
      ci95: half width of the 95 % interval of the mean.
      adapt_seconds: median time to adapt to one task and predict its query set.
      step_bytes: bytes of temporaries of the compiled meta step, as reported by the compiler.
      by_shots: `(mean, ci95)` by number of shots, for candidates of the last rung.

    >>> Row("maml", 100, "accuracy", 0.9, 0.01, 0.002, 1e6, {1: (0.9, 0.01)}).steps
    100
    """

    name: str
    steps: int
    metric: str
    mean: float
    ci95: float
    adapt_seconds: float
    step_bytes: float
    by_shots: Mapping[int, tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Selection:
    """The result of `select`. Its text is a table, sorted by the last rung that was reached and then by score.

    Attributes:
      winner: the best candidate, to deploy with `params` or to train further from `state`.
      state: its state after the last rung.
      rows: one row for each candidate.
      curves: `(steps, mean, ci95)` after each rung, by name.
      steps: total number of meta steps taken.
      full_steps: number of meta steps to train all candidates for as long as the winner.

    >>> row = Row("maml", 100, "accuracy", 0.9, 0.01, 0.002, 1e6, {1: (0.9, 0.01)})
    >>> print(Selection(None, None, (row, row._replace(name="proto", steps=50, by_shots={})), {}, 150, 200))
    candidate  steps      validation  adapt ms  step MB  1-shot
    maml         100  90.00 +- 1.00 %     2.00      1.0   90.00
    proto         50  90.00 +- 1.00 %     2.00      1.0       -
    150 meta steps, 75 % of those of training all as long
    """

    winner: Candidate
    state: MetaState
    rows: tuple[Row, ...]
    curves: Mapping[str, Sequence[tuple[int, float, float]]]
    steps: int
    full_steps: int

    @property
    def params(self) -> Params:
        """The meta-parameters of the winner."""
        return self.state.params

    def __str__(self) -> str:
        wide = max(9, *(len(row.name) for row in self.rows))
        shots = sorted({count for row in self.rows for count in row.by_shots})
        lines = [
            f"{'candidate':<{wide}}  steps      validation  adapt ms  step MB"
            + "".join(f"{f'{count}-shot':>8}" for count in shots)
        ]
        for row in self.rows:
            unit, suffix, digits = (100, " %", 2) if row.metric == "accuracy" else (1, "", 4)
            told = f"{unit * row.mean:.{digits}f} +- {unit * row.ci95:.{digits}f}{suffix}"
            values = [f"{unit * row.by_shots[n][0]:8.{digits}f}" if n in row.by_shots else f"{'-':>8}" for n in shots]
            lines.append(
                f"{row.name:<{wide}}  {row.steps:5d}  {told:>14}  {1e3 * row.adapt_seconds:7.2f}  "
                f"{row.step_bytes / 1e6:7.1f}" + "".join(values)
            )
        share = 100 * self.steps / self.full_steps
        return "\n".join([*lines, f"{self.steps} meta steps, {share:.0f} % of those of training all as long"])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Plots validation scores against meta steps, and the last rung against shots, with 95 % intervals (PNG)."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for row in self.rows:
            steps, means, errors = zip(*self.curves[row.name], strict=True)
            left.errorbar(steps, means, errors, capsize=3, marker="o", label=row.name)
            if row.by_shots:
                found = np.array(list(row.by_shots.values()))
                right.errorbar(list(row.by_shots), found[:, 0], found[:, 1], capsize=3, marker="o", label=row.name)
        left.set(xlabel="meta steps", ylabel=f"validation {self.rows[0].metric}", xscale="log")
        right.set(xlabel="shots", ylabel=f"validation {self.rows[0].metric}")
        left.legend(fontsize=8)
        figure.savefig(path, format="png", dpi=120)


def select(
    candidates: Sequence[Candidate],
    tasks: tuple[Source, Source],
    budget: int,
    *,
    spec: EpisodeSpec,
    train_spec: EpisodeSpec | None = None,
    meta_batch: int = 4,
    episodes: int = 100,
    shots: Sequence[int] = (),
    factor: int = 2,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Selection:
    """Finds the best candidate by successive halving (Jamieson and Talwalkar 2016).

    The budget is divided equally between rungs. In each rung, the remaining candidates share its part equally, continue
    training, and are evaluated on the same validation episodes. The best fraction `1 / factor` of them continues to the
    next rung. All candidates use the same training episodes from the same seed. At least two candidates reach the last
    rung, and the best of them wins.

    Args:
      candidates: at least two candidates.
      tasks: the sources of training and of validation episodes. Neither may be a test split.
      budget: total number of meta steps of all candidates.
      spec: size of the validation episodes.
      train_spec: size of the training episodes. None uses `spec`.
      meta_batch: tasks per meta step.
      episodes: number of validation episodes, at least 2.
      shots: numbers of shots at which to compare the candidates of the last rung; () for none.
      factor: factor by which the number of candidates decreases in each rung.
      folder: folder for results and checkpoints. Repeating the same call resumes where it stopped. None saves nothing.
      seed: seed of parameters, training and validation episodes.

    Returns:
      A `Selection`; `print` shows the table.

    Raises:
      ValueError: there are fewer than two candidates, two have the same name, a name has other characters, a source is
        a "test" split or too small for the episodes, the budget does not give every candidate a step in the first
        rung, an argument is out of range, or the folder is from a call with other arguments.

    Source: Jamieson and Talwalkar 2016, Non-stochastic Best Arm Identification and Hyperparameter Optimization,
    arXiv:1502.07943.

    >>> import optax, metajax
    >>> model, spec = metajax.models.mlp(8, hidden=()), metajax.data.EpisodeSpec(ways=5, shots=1, queries=3)
    >>> learner = metajax.learners.prototypical(model)
    >>> def candidate(name, rate):
    ...     rule = metajax.hypergrad.unrolled()
    ...     return Candidate(name, learner, metajax.outer_update(learner, optax.sgd(rate), hypergrad=rule))
    >>> tasks = metajax.data.glyphs("train"), metajax.data.glyphs("val")
    >>> found = select([candidate("slow", 1e-9), candidate("fast", 0.05)], tasks, 8, spec=spec, episodes=10)
    >>> sorted(row.name for row in found.rows), found.steps
    (['fast', 'slow'], 8)
    """
    names = [_validate.instance("candidates", candidate, Candidate).name for candidate in candidates]
    if len(names) < 2:
        raise ValueError(f"candidates must be at least 2, got {names}")
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"a name of candidates must be of letters, digits and '_.+-', got {name!r}")
        if names.count(name) > 1:
            raise ValueError(f"candidates must have names of their own, got {name!r} twice")
    train, validation = tasks
    train_spec = spec if train_spec is None else train_spec
    for source, size in ((train, train_spec), (validation, spec)):
        check_source(source, size)
        if source.split == "test":
            raise ValueError(f"tasks must not be test tasks, which are for the winner alone, got {source.name} (test)")
    more = [dataclasses.replace(spec, shots=_validate.positive_int("shots", count)) for count in shots]
    for size in more:
        check_source(validation, size)
    _validate.int_at_least("episodes", episodes, 2)
    rungs = _rungs(len(names), _validate.positive_int("budget", budget), _validate.int_at_least("factor", factor, 2))
    settings = {
        "candidates": names, "tasks": [f"{source.name} ({source.split})" for source in tasks], "budget": budget,
        "spec": repr(spec), "train_spec": repr(train_spec), "shots": list(shots), "factor": factor,
        "episodes": episodes, "meta_batch": _validate.positive_int("meta_batch", meta_batch),
        "seed": _validate.int_at_least("seed", seed, 0),
    }  # fmt: skip
    notes = _Notes(folder, settings)
    key, example = jax.random.key(seed), episode(train, train_spec, seed=seed, index=0)

    def batch(step: int) -> Episode:
        return episode_batch(train, train_spec, seed=seed, start=step * meta_batch, count=meta_batch)

    runs = {
        candidate.name: _Run(candidate, notes.folder, functools.partial(candidate.outer.init, key, example), batch)
        for candidate in candidates
    }
    one = episode(validation, spec, seed=seed, index=0)

    def judge(run: _Run, size: EpisodeSpec) -> Evaluation:
        learner, steps = run.candidate.learner, run.candidate.num_steps
        return evaluate(learner, run.state().params, validation, size, episodes=episodes, seed=seed, num_steps=steps)

    left, found = names, {}
    curves: dict[str, list[tuple[int, float, float]]] = {name: [] for name in names}
    for rung, (count, steps) in enumerate(rungs):
        left = left[:count]
        last = rung == len(rungs) - 1
        for name in left:
            measure = functools.partial(_measure, runs[name], steps, judge, [spec, *(more if last else [])], one)
            found[name] = notes.once(f"rung_{rung}", name, measure)
            curves[name].append((steps, *found[name]["score"]))
        left = sorted(left, key=lambda name: _order(found[name]))
    ranked = sorted(names, key=lambda name: (-len(curves[name]), _order(found[name])))
    rows = tuple(_row(name, curves[name], found[name]) for name in ranked)
    taken = sum(curve[-1][0] for curve in curves.values())
    winner = runs[left[0]]
    return Selection(winner.candidate, winner.state(), rows, curves, taken, len(names) * rungs[-1][1])


def _rungs(count: int, budget: int, factor: int) -> list[tuple[int, int]]:
    """Returns, for each rung, the number of candidates and the steps that each has taken at its end.

    >>> _rungs(8, 48, 2)
    [(8, 2), (4, 6), (2, 14)]
    """
    counts = [count]
    while math.ceil(counts[-1] / factor) > 1:
        counts.append(math.ceil(counts[-1] / factor))
    each = [budget // (len(counts) * one) for one in counts]
    if each[0] < 1:
        raise ValueError(
            f"budget must be at least {len(counts) * count} meta steps, one for each of {count} candidates in the "
            f"first rung of {len(counts)}, got {budget}"
        )
    return list(zip(counts, np.cumsum(each).tolist(), strict=True))


class _Notes:
    """Stores results by rung, in files if there is a folder."""

    def __init__(self, folder: str | os.PathLike[str] | None, settings: dict[str, Any]):
        self.folder = None if folder is None else pathlib.Path(folder)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        there = self._read("settings")
        different = [name for name in settings if there and there.get(name) != settings[name]]
        if different:
            name = different[0]
            raise ValueError(f"folder {str(folder)!r} is of a call with {name}={there[name]}, got {settings[name]}")
        self._write("settings", settings)

    def once(self, rung: str, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns the stored result of a candidate in a rung, or measures and stores it."""
        there = self._read(rung)
        if name not in there:
            there[name] = json.loads(json.dumps(measure()))
            self._write(rung, there)
        return there[name]

    def _read(self, name: str) -> dict[str, Any]:
        path = None if self.folder is None else self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}

    def _write(self, name: str, values: dict[str, Any]) -> None:
        if self.folder is not None:
            temporary = self.folder / f".{name}.json"
            temporary.write_text(json.dumps(values), encoding="utf-8")
            os.replace(temporary, self.folder / f"{name}.json")


class _Run:
    """The training of one candidate. Its state is initialized or restored on first use."""

    def __init__(
        self, candidate: Candidate, folder: pathlib.Path | None, init: Callable[[], MetaState],
        batch: Callable[[int], Episode],
    ):  # fmt: skip
        self.candidate, self.step_bytes = candidate, 0.0
        self._init, self._batch = init, batch
        self._state: MetaState | None = None
        self._folder = None if folder is None else folder / "checkpoints" / candidate.name
        self._programs: dict[Any, Any] = {}  # by the shapes of the episodes

    def state(self) -> MetaState:
        """Returns the current training state."""
        if self._state is None:
            self._state = self._init()
            if self._folder is not None:
                with contextlib.closing(Checkpoints(self._folder, keep=1)) as checkpoints:
                    if checkpoints.latest() is not None:
                        self._state, _ = checkpoints.restore(self._state)
        return self._state

    def train(self, steps: int) -> None:
        """Trains until `steps` steps are taken, and saves."""
        state = self.state()
        for step in range(int(state.step), steps):
            batch = self._batch(step)
            state, _ = self._program(state, batch)(state, batch)
        if not self._programs:  # the training was restored; compile once to measure its memory
            self._program(state, self._batch(steps))
        self._state = state
        if self._folder is not None:
            with contextlib.closing(Checkpoints(self._folder, keep=1)) as checkpoints:
                checkpoints.save(steps, state, {})

    def _program(self, state: MetaState, batch: Episode) -> Any:
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if shapes not in self._programs:
            self._programs[shapes] = jax.jit(self.candidate.outer.update).lower(state, batch).compile()
            used: Any = self._programs[shapes].memory_analysis()
            self.step_bytes = max(self.step_bytes, float(used.temp_size_in_bytes))
        return self._programs[shapes]


def _measure(
    run: _Run, steps: int, judge: Callable[[_Run, EpisodeSpec], Evaluation], sizes: Sequence[EpisodeSpec], one: Episode
) -> dict[str, Any]:
    """Trains to `steps` and evaluates on episodes of the first size, and on the other sizes by their shots."""
    run.train(steps)
    found, seconds = judge(run, sizes[0]), []
    learner, num_steps, (support, query) = run.candidate.learner, run.candidate.num_steps, one
    for _ in range(_TIMED):
        begin = time.perf_counter()
        outputs = predict(learner, run.state().params, support, query.inputs, mask=query.mask, num_steps=num_steps)
        jax.block_until_ready(outputs)
        seconds.append(time.perf_counter() - begin)
    judged = {size.shots: judge(run, size) for size in sizes[1:]}
    return {
        "metric": found.metric, "score": [found.mean, found.ci95], "adapt_seconds": statistics.median(seconds),
        "step_bytes": run.step_bytes, "by_shots": {str(n): [one.mean, one.ci95] for n, one in judged.items()},
    }  # fmt: skip


def _order(found: Mapping[str, Any]) -> float:
    """Returns a sort key: the best first, scores that are not finite last."""
    mean = found["score"][0]
    value = mean if found["metric"] == "mse" else -mean
    return value if math.isfinite(value) else math.inf


def _row(name: str, curve: Sequence[tuple[int, float, float]], found: Mapping[str, Any]) -> Row:
    by_shots = {int(count): (mean, ci95) for count, (mean, ci95) in found["by_shots"].items()}
    steps, mean, ci95 = curve[-1]
    return Row(name, steps, found["metric"], mean, ci95, found["adapt_seconds"], found["step_bytes"], by_shots)
