"""Labels first: pre-training on all base classes, then meta-training, then fine-tuning on each task."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any, NamedTuple

import jax
import optax

from metajax import data, hypergrad, learners
from metajax.adaptation._proto_maml import proto_maml
from metajax.core import _tree, _validate
from metajax.core._types import Learner, Model, Params
from metajax.training._loop import fit
from metajax.training._outer import outer_update


class Supervised(NamedTuple):
    """What `supervised` gives.

    Attributes:
      learner: the learner to deploy: nearest class means, fine-tuned on each task where that was asked for.
      params: its meta-parameters, those of the model.
      pretrained: the same after the first phase, to compare with.

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
    """Pre-trains on all base classes, meta-trains on episodes from there, and fine-tunes on each task.

    The first phase is `learners.pretrain` on `data.batches`, the second `learners.prototypical` with cosine distances
    on episodes. Without a third it is Meta-Baseline (with a scale that is not learned); with it, P>M>F: in each task a
    linear head made of the prototypes and what `adapts` picks take `inner_steps` steps.

    Args:
      model: a network from inputs to features `[n, d]`.
      source: base classes.
      spec: size of the episodes.
      steps: optimizer steps of the first and of the second phase.
      rates: their rates of Adam, at first; they fall to 0 by a cosine.
      batch: examples in a step of the first phase.
      meta_batch: tasks in a step of the second.
      inner: the rule of fine-tuning; None is `optax.sgd(0.01)`.
      inner_steps: steps of fine-tuning on each task; 0 for none.
      adapts: path regex or predicate of the parameters that fine-tuning changes beside the head; None is all.
      seed: of everything.

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
