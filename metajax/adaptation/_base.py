"""A pretrained model with what adapts in it: low-rank paths in its attention, or all of it where it has none."""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metajax import adapters, learners, models
from metajax.adaptation._proto_maml import proto_maml
from metajax.core import _tree, _validate
from metajax.core._types import Learner, Model, Params
from metajax.pretrained import PretrainedModel
from metajax.pretrained._architectures import ARCHITECTURES

_ATTENTION = "(query|value)/kernel"
_ADAPTERS = "lora_(a|b)$"
_HEAD = "^head/"  # of one output, which is made anew
LEARNERS = ("prototypical", "proto_maml")  # of models of features; the first is the default
CHOICE_LEARNERS = ("maml",)  # of models that score choices


class Adaptable(NamedTuple):
    """A model and what adapts in it.

    Attributes:
      model: with adapters, where there are some.
      where: path regex of the leaves that adapt, None for all.
      choices: whether its tasks are questions with choices, which it scores; else classes, of its features.
      one_by_one: whether questions go through it one after the other, which saves memory.
    """

    model: Model
    where: str | None
    choices: bool
    one_by_one: bool = False


def adaptable(base: PretrainedModel, rank: int) -> Adaptable:
    """Equal for the same model and rank: its functions are the key of what is compiled.

    Raises:
      ValueError: `base` is none, its outputs are neither features `[n, d]` nor scores of choices, or `rank` does not
        fit.
    """
    _validate.instance("model", base, PretrainedModel)
    _validate.positive_int("rank", rank)
    attention = any(re.search(_ATTENTION, path) for path in _tree.paths(base.params))
    model = _with_adapters(base.model, rank) if attention else base.model
    shape, one_by_one = _output_shape(base, model), base.options.get("remat") == "example"
    if len(shape) == 2 and (shape[1] > 1 or base.kind == "image"):
        return Adaptable(model, _ADAPTERS if attention else None, False)
    if len(shape) == 2:
        return Adaptable(model, f"{_ADAPTERS}|{_HEAD}" if attention else None, True, one_by_one)
    if len(shape) == 3 and _is_decoder(base) and base.options.get("head") == "tokens":
        return Adaptable(model, _ADAPTERS if attention else None, True, one_by_one)
    raise ValueError(
        "model must give features [n, d], such as load_pretrained_model(path, head='mean') of an encoder or "
        "head='features' of a decoder; or, for questions with choices, logits of tokens (head='tokens' of a decoder) "
        f"or one number (outputs=1); got outputs of shape {shape}"
    )


def _is_decoder(base: PretrainedModel) -> bool:
    return "features" in ARCHITECTURES[base.config["model_type"]](base.config).heads


def _output_shape(base: PretrainedModel, model: Model) -> tuple[int, ...]:
    """Of two examples."""
    inputs = example_inputs(base)
    outputs = jax.eval_shape(
        lambda params, inputs: model.apply(params, inputs, **dict.fromkeys(model.needs)), abstract(base, model), inputs
    )
    return (outputs[0] if "stats" in model.needs else outputs).shape


@functools.lru_cache(maxsize=32)
def _with_adapters(model: Model, rank: int) -> Model:
    return adapters.lora(model, rank=rank, where=_ATTENTION)


def example_inputs(base: PretrainedModel) -> Any:
    """Two examples, of zeros."""
    if base.kind == "text":
        return {"tokens": np.zeros([2, 4], np.int32), "mask": np.ones([2, 4], bool)}
    return np.zeros([2, *(base.image or ())], np.uint8)


def abstract(base: PretrainedModel, model: Model) -> Params:
    """The shapes of the parameters of a model that reads the inputs of `base`."""
    return jax.eval_shape(model.init, jax.random.key(0), example_inputs(base))


def start(base: PretrainedModel, made: Adaptable, seed: int) -> Params:
    """The parameters on the device, with new adapters, which change no output yet."""
    params = jax.tree.map(jnp.asarray, base.params)
    if made.where is None:
        return params
    return adapters.attach(made.model, params, key=jax.random.key(seed))


@functools.lru_cache(maxsize=64)
def learner_of(made: Adaptable, name: str, steps: int, rate: float) -> Learner:
    """The same learner for the same arguments. `steps` is 0 only where `adapt(num_steps=0)` is called."""
    if name == "prototypical":
        return learners.prototypical(made.model, distance="cosine")
    if name == "proto_maml":
        return proto_maml(made.model, optax.adam(rate), steps, adapts=made.where)
    scores = models.score_choices(made.model, remat=made.one_by_one)
    return learners.maml(scores, optax.adam(rate), max(steps, 1), adapts=made.where)


def fast_learner(made: Adaptable, steps: int, rate: float) -> Learner:
    """What adapts to a new task in a few steps."""
    return learner_of(made, "maml" if made.choices else "proto_maml", steps, rate)
