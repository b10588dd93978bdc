"""From simple tasks to hard ones: stages of training, each a compiled phase that goes on with the state of the last."""

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
from metajax.data._episodes import check_source
from metajax.data._transforms import as_transforms
from metajax.strategies._growth import Growth, grow_frozen, grow_state
from metajax.training import _loop


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a curriculum.

    Attributes:
      spec: size of the episodes.
      steps: meta steps, at least 1; with a threshold, at most as many.
      threshold: the score at which the stage ends before that, or None.
      start: the step of the state with which the stage begins, for schedules that are written by step; None is where
        the one before ends.
      resolution: side of the images in pixels; None leaves them as they are.
      augment: transforms of the training images, behind the resizing.
      share: the easiest classes, as a share of all.
      grow: `(params) -> Growth`, what the network becomes before the first step, or None.
      outer: the meta step from this stage on; None is the one before.

    Raises:
      ValueError: an attribute is out of range; a stage without `steps`, which a threshold may never end.

    >>> import metajax
    >>> spec = metajax.data.EpisodeSpec(ways=5)
    >>> metajax.strategies.Stage(spec, 100, resolution=14).threshold is None
    True
    >>> metajax.strategies.Stage(spec, threshold=0.9)
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


class Passed(NamedTuple):
    """What became of a stage.

    Attributes:
      steps: meta steps that it took.
      score: the last score, or None where the stage has no threshold.
      reached: whether the score reached the threshold.

    >>> Passed(40, 0.93, True).reached
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
) -> tuple[MetaState, tuple[Passed, ...]]:
    """Takes meta steps stage after stage.

    A stage is a phase of its own: its episodes have their own size and images, for which the meta step is compiled
    once, and parameters, moments, step and key go on from the stage before. A stage that grows the network edits them
    first (`grow_state`). The batch of a step depends on the stage, the seed and the step alone.

    Args:
      outer: the meta step of the first stage, and of those behind it that bring none.
      state: where to start; consumed. A run that was interrupted goes on with the stages that are left.
      source: of the training episodes.
      stages: in order.
      batch: tasks in a step.
      seed: of the episodes.
      score: `(params, stage) -> score`, higher is better, such as the accuracy of `metajax.evaluation.evaluate` on
        validation episodes; for stages with a threshold.
      every: steps between two looks at the score, which is taken after the last step of a stage too.
      difficulty: `[num_classes]` numbers, higher is harder; for stages that take a share of the classes.
      frozen: the base that stands beside the state, None for none.
      callbacks: as for `metajax.training.fit`.

    Returns:
      The state, and what became of each stage.

    Raises:
      ValueError: no stage; a stage that starts before the one in front has ended, or leaves a gap, or has a start
        where a threshold decides when the one in front ends; a threshold without `score`; a share without
        `difficulty`; a stage whose episodes the source cannot give. All of it before the first step.
      NonFiniteError: as `metajax.training.fit`.

    Source: Bengio et al. 2009, Curriculum Learning; by competence, Platanios et al. 2019, arXiv:1903.09848.

    >>> import jax, optax, metajax
    >>> source, spec = metajax.data.glyphs("val"), metajax.data.EpisodeSpec(ways=5, shots=1, queries=2)
    >>> learner = metajax.learners.prototypical(metajax.models.mlp(8))
    >>> outer = metajax.outer_update(learner, optax.adam(1e-3), hypergrad=metajax.hypergrad.unrolled())
    >>> state = outer.init(jax.random.key(0), metajax.data.episode(source, spec, seed=0, index=0))
    >>> harder = metajax.data.EpisodeSpec(ways=10, shots=1, queries=2)
    >>> stages = [metajax.strategies.Stage(spec, 2), metajax.strategies.Stage(harder, 1)]
    >>> state, passed = metajax.strategies.curriculum(outer, state, source, stages, batch=2)
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
    with _loop.closing(callbacks) as within:  # after the last stage
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
                # the same update function: it is compiled once for the stage
                state = _loop.fit(outer, state, stream, steps=upto, frozen=frozen, callbacks=within)
                if stage.threshold is not None:
                    found = float(score(_tree.merge(state.params, frozen), stage))  # type: ignore[misc]
                    if reached := found >= stage.threshold:
                        break
            stream.close()
            passed.append(Passed(int(state.step) - begun, found, reached))
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
    """The source of a stage: the classes that are easy enough, and their images as the stage wants them."""
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
    """How much of the data a learner is ready for, `(t (1 - c^p) + c^p)^(1/p)`, at most 1.

    Args:
      time: t, the share of the curriculum that is behind.
      initial: c, where it begins.
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
    """Divides a stage into several, whose shares of the easiest classes follow `competence`.

    Args:
      stage: without a threshold or a start.
      count: into how many; from 1 to its steps.
      initial: the share of the first.
      root: of `competence`.

    Raises:
      ValueError: as `competence`; a stage with a threshold or a start, or a count out of range.

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
