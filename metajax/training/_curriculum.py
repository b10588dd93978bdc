"""Curricula from simple to hard tasks: stages of training, each a compiled phase that continues from the last state."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from metajax import data
from metajax.core import _tree, _validate
from metajax.core._types import MetaState, OuterUpdate, Params
from metajax.data import as_transforms, check_source
from metajax.models import Growth, grow_frozen, grow_state
from metajax.training import _loop


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a curriculum.

    Attributes:
      spec: size of the episodes.
      steps: number of meta steps, at least 1. With a threshold, the maximum number.
      threshold: the score at which the stage ends early, or None.
      start: the step of the state at which the stage starts, for schedules that are written by step. None starts where
        the previous stage ends.
      resolution: side of the images in pixels. None does not resize them.
      augment: transforms of the training images, applied after resizing.
      share: fraction of the classes to train on, the easiest first.
      grow: `(params) -> Growth`, which grows the network before the first step of the stage, or None.
      outer: the meta step from this stage on. None keeps the previous one.

    Raises:
      ValueError: an attribute is out of range, or `steps` is missing, since a stage with a threshold might never end.

    >>> import metajax
    >>> spec = metajax.data.EpisodeSpec(ways=5)
    >>> metajax.training.Stage(spec, 100, resolution=14).threshold is None
    True
    >>> metajax.training.Stage(spec, threshold=0.9)
    Traceback (most recent call last):
    ValueError: steps must be an integer of at least 1, also where a threshold may end the stage, got None
    """

    spec: data.EpisodeSpec
    steps: int | None = None
    threshold: float | None = None
    start: int | None = None
    resolution: int | None = None
    augment: data.Transform | Sequence[data.Transform] = ()
    share: float = 1.0
    grow: Callable[[Params], Growth] | None = None
    outer: OuterUpdate | None = None

    def __post_init__(self) -> None:
        _validate.instance("spec", self.spec, data.EpisodeSpec)
        if self.steps is None:
            raise ValueError(
                "steps must be an integer of at least 1, also where a threshold may end the stage, got None"
            )
        _validate.positive_int("steps", self.steps)
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"threshold must be a finite number or None, got {self.threshold!r}")
        if self.start is not None:
            _validate.int_at_least("start", self.start, 0)
        if self.resolution is not None:
            _validate.positive_int("resolution", self.resolution)
        as_transforms("augment", self.augment)
        if _validate.positive_float("share", self.share) > 1:
            raise ValueError(f"share must be a number above 0 and at most 1, got {self.share!r}")
        if self.outer is not None:
            _validate.instance("outer", self.outer, OuterUpdate)


class StageResult(NamedTuple):
    """The result of a stage.

    Attributes:
      steps: number of meta steps taken.
      score: the last score, or None if the stage has no threshold.
      reached: whether the score reached the threshold.

    >>> StageResult(40, 0.93, True).reached
    True
    """

    steps: int
    score: float | None
    reached: bool


def curriculum(
    outer: OuterUpdate,
    state: MetaState,
    source: data.Source,
    stages: Sequence[Stage],
    *,
    batch: int,
    seed: int = 0,
    score: Callable[[Params, Stage], float] | None = None,
    every: int = 50,
    difficulty: Any = None,
    frozen: Params = None,
    callbacks: Sequence[_loop.Callback] = (),
) -> tuple[MetaState, tuple[StageResult, ...]]:
    """Trains through the stages of a curriculum in order.

    Each stage has its own size of episodes and images, for which the meta step is compiled once. Parameters, optimizer
    state, step and key continue from the previous stage. A stage that grows the network edits them first
    (`grow_state`). The batch of a step depends only on the stage, the seed and the step.

    Args:
      outer: the meta step of the first stage, and of all later stages until a stage sets its own.
      state: the initial state, which is consumed. To resume an interrupted run, pass the remaining stages.
      source: source of the training episodes.
      stages: the stages in order.
      batch: tasks per step.
      seed: seed of the episodes.
      score: `(params, stage) -> score`, higher is better, such as the accuracy of `metajax.evaluation.evaluate` on
        validation episodes. Required for stages with a threshold.
      every: steps between two scores. The score is also computed after the last step of a stage.
      difficulty: `[num_classes]` numbers, higher is harder. Required for stages with a share below 1.
      frozen: the frozen base, or None.
      callbacks: as for `metajax.training.fit`.

    Returns:
      The state, and the result of each stage.

    Raises:
      ValueError: there is no stage; a stage starts before the previous one has ended, leaves a gap, or has a start
        although a threshold may end the previous one; a threshold without `score`; a share without `difficulty`; or
        the source cannot provide the episodes of a stage. All are raised before the first step.
      NonFiniteError: as for `metajax.training.fit`.

    Source: Bengio et al. 2009, Curriculum Learning; by competence, Platanios et al. 2019, arXiv:1903.09848.

    >>> import jax, optax, metajax
    >>> source, spec = metajax.data.glyphs("val"), metajax.data.EpisodeSpec(ways=5, shots=1, queries=2)
    >>> learner = metajax.learners.prototypical(metajax.models.mlp(8))
    >>> outer = metajax.outer_update(learner, optax.adam(1e-3), hypergrad=metajax.hypergrad.unrolled())
    >>> state = outer.init(jax.random.key(0), metajax.data.episode(source, spec, seed=0, index=0))
    >>> harder = metajax.data.EpisodeSpec(ways=10, shots=1, queries=2)
    >>> stages = [metajax.training.Stage(spec, 2), metajax.training.Stage(harder, 1)]
    >>> state, passed = metajax.training.curriculum(outer, state, source, stages, batch=2)
    >>> int(state.step), [stage.steps for stage in passed]
    (3, [2, 1])
    """
    _validate.instance("outer", outer, OuterUpdate)
    _validate.positive_int("batch", batch)
    _validate.positive_int("every", every)
    stages = tuple(_validate.instance("stages", stage, Stage) for stage in stages)
    _check_schedule(stages, int(state.step), score is not None)
    sources = [_source_of(source, stage, difficulty, f"stages[{index}]") for index, stage in enumerate(stages)]
    passed = []
    with _loop.closing(callbacks) as within:  # closes them after the last stage
        for stage, own in zip(stages, sources, strict=True):
            outer = outer if stage.outer is None else stage.outer
            if stage.grow is not None:
                example = data.episode(own, stage.spec, seed=seed, index=0)
                growth = stage.grow(_tree.merge(state.params, frozen))
                base = None if frozen is None else grow_frozen(state, growth, frozen)
                state, frozen = grow_state(state, growth, outer, example, frozen=frozen), base
            begun, found, reached = int(state.step), None, False
            stream = data.episodes(own, stage.spec, batch=batch, seed=seed, start=begun * batch)
            end = begun + stage.steps  # type: ignore[operator]
            for upto in [end] if stage.threshold is None else [*range(begun + every, end, every), end]:
                # with the same update function, which is compiled once for the stage
                state = _loop.fit(outer, state, stream, steps=upto, frozen=frozen, callbacks=within)
                if stage.threshold is not None:
                    found = float(score(_tree.merge(state.params, frozen), stage))  # type: ignore[misc]
                    if reached := found >= stage.threshold:
                        break
            stream.close()
            passed.append(StageResult(int(state.step) - begun, found, reached))
    return state, tuple(passed)


def _check_schedule(stages: Sequence[Stage], step: int, scored: bool) -> None:
    if not stages:
        raise ValueError("stages must hold at least one stage, got none")
    end: int | None = step
    for index, stage in enumerate(stages):
        name = f"stages[{index}]"
        if stage.threshold is not None and not scored:
            raise ValueError(f"score must be given for the threshold {stage.threshold} of {name}, got None")
        if stage.start is not None and end is None:
            raise ValueError(f"start of {name} must be None behind a stage that a threshold may end, got {stage.start}")
        if stage.start is not None and stage.start != end:
            what = "stages overlap" if stage.start < end else "no stage has the steps between"  # type: ignore[operator]
            raise ValueError(f"start of {name} must be {end}, where the one before ends, got {stage.start}: {what}")
        end = None if stage.threshold is not None or end is None else end + stage.steps  # type: ignore[operator]


def _source_of(source: Any, stage: Stage, difficulty: Any, name: str) -> Any:
    """Returns the source of a stage: the easiest classes, with the transforms of the stage."""
    if stage.share < 1:
        if not isinstance(source, data.ClassSource):
            raise ValueError(f"source must be a ClassSource for the share {stage.share} of {name}, got {source!r}")
        if np.shape(difficulty) != (source.num_classes,):
            raise ValueError(
                f"difficulty must be {source.num_classes} numbers, one for each class, for the share {stage.share} of "
                f"{name}, got an array of shape {np.shape(difficulty)}"
            )
        easiest = np.argsort(difficulty, kind="stable")[: math.ceil(stage.share * source.num_classes)]
        source = source.of_classes(np.sort(easiest))
    transforms = [] if stage.resolution is None else [data.resize(stage.resolution)]
    transforms += as_transforms("augment", stage.augment)
    try:
        check_source(source, stage.spec)
    except ValueError as error:
        raise ValueError(f"spec of {name} must be one that the source can give: {error}") from error
    return data.transformed(source, transforms) if transforms else source


def competence(time: float, *, initial: float = 0.01, root: float = 2.0) -> float:
    """Returns the competence, the fraction of the data to train on: `(t (1 - c^p) + c^p)^(1/p)`, at most 1.

    Args:
      time: t, the fraction of the curriculum that is done.
      initial: c, the initial competence.
      root: p; 1 is linear.

    Raises:
      ValueError: `time` is below 0, `initial` is not in (0, 1], `root` is not above 0.

    Source: Platanios et al. 2019, Competence-based Curriculum Learning for Neural Machine Translation,
      arXiv:1903.09848, equations 5 and 6.

    >>> competence(0.0, initial=0.2), round(competence(0.25, initial=0.6), 4), competence(2.0)
    (0.2, 0.7211, 1.0)
    """
    _validate.non_negative_float("time", time)
    if _validate.positive_float("initial", initial) > 1:
        raise ValueError(f"initial must be a number above 0 and at most 1, got {initial!r}")
    power = initial ** _validate.positive_float("root", root)
    return min(1.0, (time * (1 - power) + power) ** (1 / root))


def paced(stage: Stage, count: int, *, initial: float = 0.2, root: float = 2.0) -> tuple[Stage, ...]:
    """Divides a stage into several stages whose shares of the easiest classes follow `competence`.

    Args:
      stage: a stage without a threshold or a start.
      count: number of stages, from 1 to the steps of `stage`.
      initial: `initial` of `competence`, the share of the first stage relative to that of `stage`.
      root: `root` of `competence`.

    Raises:
      ValueError: as for `competence`; `stage` has a threshold or a start, or `count` is out of range.

    >>> import metajax
    >>> stages = paced(Stage(metajax.data.EpisodeSpec(), 90), 3, initial=0.6)
    >>> [(stage.steps, round(stage.share, 2)) for stage in stages]
    [(30, 0.6), (30, 0.76), (30, 0.89)]
    """
    _validate.instance("stage", stage, Stage)
    if stage.threshold is not None or stage.start is not None:
        raise ValueError(f"stage must have neither a threshold nor a start, got {stage.threshold} and {stage.start}")
    steps: int = stage.steps  # type: ignore[assignment]
    if _validate.positive_int("count", count) > steps:
        raise ValueError(f"count must be at most the {steps} steps of the stage, got {count}")
    bounds = [steps * index // count for index in range(count + 1)]
    parts = []
    for index, (begin, end) in enumerate(itertools.pairwise(bounds)):
        share = stage.share * competence(index / count, initial=initial, root=root)
        first: dict[str, Any] = {} if index == 0 else {"grow": None, "outer": None}
        parts.append(dataclasses.replace(stage, steps=end - begin, share=share, **first))
    return tuple(parts)
