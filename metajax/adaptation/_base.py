"""A pretrained model with what adapts in it: low-rank paths in its attention, or all of it where it has none."""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metajax import adapters, learners
from metajax.adaptation._proto_maml import proto_maml
from metajax.core import _tree, _validate
from metajax.core._types import Learner, Model, Params
from metajax.pretrained import PretrainedModel

_ATTENTION = "(query|value)/kernel"
LEARNERS = ("prototypical", "proto_maml")


class Adaptable(NamedTuple):
    """A model and what adapts in it.

    Attributes:
      model: with adapters, where there are some.
      where: path regex of the leaves that adapt, None for all.
    """

    model: Model
    where: str | None


def adaptable(base: PretrainedModel, rank: int) -> Adaptable:
    """The same object for the same model and rank: its functions are the key of what is compiled.

    Raises:
      ValueError: `base` is none, its outputs are no features `[n, d]`, or `rank` does not fit.
    """
    _validate.instance("model", base, PretrainedModel)
    _validate.positive_int("rank", rank)
    if any(re.search(_ATTENTION, path) for path in _tree.paths(base.params)):
        made = _with_adapters(base.model, rank)
    else:
        made = Adaptable(base.model, None)
    outputs = jax.eval_shape(
        lambda params, inputs: made.model.apply(params, inputs, **dict.fromkeys(made.model.needs)),
        abstract(base, made), example_inputs(base),
    )  # fmt: skip
    shape = (outputs[0] if "stats" in made.model.needs else outputs).shape
    if len(shape) != 2:
        raise ValueError(
            "model must give features [n, d], such as load_pretrained_model(path, head='mean') of an encoder or "
            f"head='features' of a decoder, got outputs of shape {shape}"
        )
    return made


@functools.lru_cache(maxsize=32)
def _with_adapters(model: Model, rank: int) -> Adaptable:
    return Adaptable(adapters.lora(model, rank=rank, where=_ATTENTION), "lora_(a|b)$")


def example_inputs(base: PretrainedModel) -> Any:
    """Two examples, of zeros."""
    if base.kind == "text":
        return {"tokens": np.zeros([2, 4], np.int32), "mask": np.ones([2, 4], bool)}
    return np.zeros([2, *(base.image or ())], np.uint8)


def abstract(base: PretrainedModel, made: Adaptable) -> Params:
    """The shapes of the parameters."""
    return jax.eval_shape(made.model.init, jax.random.key(0), example_inputs(base))


def start(base: PretrainedModel, made: Adaptable, seed: int) -> Params:
    """The parameters on the device, with new adapters, which change no output yet."""
    params = jax.tree.map(jnp.asarray, base.params)
    if made.where is None:
        return params
    return adapters.attach(made.model, params, key=jax.random.key(seed))


@functools.lru_cache(maxsize=64)
def learner_of(made: Adaptable, name: str, steps: int, rate: float) -> Learner:
    """The same learner for the same arguments."""
    if name == "prototypical":
        return learners.prototypical(made.model, distance="cosine")
    return proto_maml(made.model, optax.adam(rate), steps, adapts=made.where)
