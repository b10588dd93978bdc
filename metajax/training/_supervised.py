"""Supervised pre-training on all base classes, then meta-training, then fine-tuning on each task."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any, NamedTuple

import jax
import optax

from metajax import data, hypergrad, learners
from metajax.core import _tree, _validate
from metajax.core._types import Learner, Model, Params
from metajax.learners import proto_maml
from metajax.training._loop import fit
from metajax.training._outer import outer_update


class Supervised(NamedTuple):
    """The result of `supervised`.

    Attributes:
      learner: the learner to deploy: nearest class means, fine-tuned on each task if `inner_steps` is above 0.
      params: its meta-parameters, which are the parameters of the model.
      pretrained: the parameters after the first phase, for comparison.

    >>> Supervised._fields
    ('learner', 'params', 'pretrained')
    """

    learner: Learner
    params: Params
    pretrained: Params


def supervised(
    model: Model,
    source: data.Source,
    spec: data.EpisodeSpec,
    *,
    steps: tuple[int, int] = (1000, 1000),
    rates: tuple[float, float] = (1e-3, 1e-4),
    batch: int = 128,
    meta_batch: int = 4,
    inner: optax.GradientTransformation | None = None,
    inner_steps: int = 0,
    adapts: _tree.Where = None,
    seed: int = 0,
) -> Supervised:
    """Pre-trains on all base classes, then meta-trains on their episodes, and returns a learner that may fine-tune.

    The first phase is `learners.pretrain` on `data.batches`. The second phase is `learners.prototypical` with cosine
    distances on episodes. Without fine-tuning this is Meta-Baseline (with a scale that is not learned). With
    fine-tuning it is P>M>F: in each task, a linear head initialized from the prototypes and the parameters selected by
    `adapts` take `inner_steps` steps.

    Args:
      model: a network from inputs to features `[n, d]`.
      source: the base classes.
      spec: size of the episodes.
      steps: optimizer steps of the first and of the second phase.
      rates: initial Adam learning rates of the two phases, with cosine decay to 0.
      batch: examples per step of the first phase.
      meta_batch: tasks per step of the second phase.
      inner: optimizer of fine-tuning; None is `optax.sgd(0.01)`.
      inner_steps: fine-tuning steps on each task; 0 does not fine-tune.
      adapts: path regex or predicate of the parameters that fine-tuning changes in addition to the head. None is all.
      seed: seed of initialization, batches and episodes.

    Returns:
      The learner, its meta-parameters, and those after the first phase.

    Raises:
      ValueError: an argument is out of range, or the source has no classes or is too small for `spec`.
      ImportError: TensorFlow, which draws the batches, is not installed.

    Sources: Chen et al. 2021, Meta-Baseline, arXiv:2003.04390; Hu et al. 2022, Pushing the Limits of Simple Pipelines
    for Few-Shot Learning (P>M>F), arXiv:2204.07305.

    >>> import metajax
    >>> model, spec = metajax.models.mlp(8, hidden=()), metajax.data.EpisodeSpec(ways=5, shots=1, queries=3)
    >>> found = supervised(model, metajax.data.glyphs("val"), spec, steps=(2, 1), batch=8)
    >>> sorted(found.params)
    ['head']
    """
    _validate.instance("model", model, Model)
    for name, value in (("steps", steps), ("rates", rates)):
        if len(value) != 2:
            raise ValueError(f"{name} must be a pair, for pre-training and meta-training, got {value!r}")
    for count, rate in zip(steps, rates, strict=True):
        _validate.positive_int("steps", count)
        _validate.positive_float("rates", rate)
    _validate.int_at_least("inner_steps", inner_steps, 0)
    num_classes = getattr(source, "num_classes", None)
    if num_classes is None:
        raise ValueError(f"source must have classes, got {source.name} ({source.split})")
    last = proto_maml(model, optax.sgd(0.01) if inner is None else inner, inner_steps, adapts=adapts)
    keys = jax.random.split(jax.random.key(seed))

    def phase(place: int, learner: Learner, stream: Any, params: Params | None) -> Params:
        rule = optax.adam(optax.cosine_decay_schedule(rates[place], steps[place]))
        outer = outer_update(learner, rule, hypergrad=hypergrad.unrolled(), before=False)
        with contextlib.closing(stream):
            first = next(stream)
            state = outer.init(keys[place], jax.tree.map(lambda leaf: leaf[0], first), params)
            return fit(outer, state, itertools.chain([first], stream), steps=steps[place]).params

    batches = data.batches(source, batch, seed)
    pretrained = phase(0, learners.pretrain(model, num_classes), batches, None)["backbone"]
    episodes = data.episodes(source, spec, batch=meta_batch, seed=seed)
    params = phase(1, learners.prototypical(model, distance="cosine"), episodes, pretrained)
    return Supervised(last, params, pretrained)
