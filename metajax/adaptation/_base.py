"""A pretrained model and the leaves that adapt: low-rank paths in its attention, or all leaves if it has none."""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metajax import adapters, learners, models, tasks
from metajax.core import _tree, _validate
from metajax.core._types import Examples, Learner, Model, Params, PyTree, TaskType
from metajax.data import ClassSource, Source, check_type
from metajax.data.readers import Form, Reader, Reading, reader_of, to_length, with_choices
from metajax.learners import proto_maml
from metajax.pretrained import PretrainedModel

_ATTENTION = "(query|value)/kernel"
_ADAPTERS = "lora_(a|b)$"
_HEAD = "^head/"  # a newly initialised head
MAX_TOKENS = 128  # maximum length of a text; longer texts are cut at the end
_LENGTHS = (8, 16, 32, 64, 128)
_WAYS = 8  # the number of classes is rounded up to a multiple of this


class Program(NamedTuple):
    """How to learn the tasks of a task type.

    Attributes:
      task: the task type.
      learners: names of the learners for meta-training, the default first.
      fast: name of the learner that adapts to a new task.
      episode_ways: ways of an episode, None if the task has classes to choose from.
      head: whether a newly initialised head adapts too.
    """

    task: TaskType
    learners: tuple[str, ...]
    fast: str
    episode_ways: int | None
    head: bool


# the task types that a pretrained model can adapt to
PROGRAMS = (
    Program(tasks.classification, ("prototypical", "proto_maml"), "proto_maml", None, False),
    Program(tasks.multiple_choice, ("maml",), "maml", 1, True),
)


class Adaptable(NamedTuple):
    """A model and the leaves of it that adapt.

    Attributes:
      model: the model, with adapters if it has attention.
      where: path regex of the leaves that adapt, None for all.
      program: how to learn its tasks.
      one_by_one: whether questions go through the model one after the other, which saves memory.
    """

    model: Model
    where: str | None
    program: Program
    one_by_one: bool = False


def adaptable(base: PretrainedModel, rank: int) -> Adaptable:
    """Finds what adapts in a model. Equal for the same model and rank, because its functions are compilation keys.

    Raises:
      ValueError: `base` has the wrong type, serves no task type that models adapt to, or `rank` does not fit.
    """
    _validate.instance("model", base, PretrainedModel)
    _validate.positive_int("rank", rank)
    program = next((program for program in PROGRAMS if program.task in base.tasks), None)
    if program is None:
        raise ValueError(
            "model must give features [n, d], such as load_pretrained_model(path, head='mean') of an encoder or "
            "head='features' of a decoder; or, for questions with choices, logits of tokens (head='tokens' of a "
            f"decoder) or one number (outputs=1); got head={base.options.get('head')!r}, which serves "
            f"{', '.join(task.name for task in base.tasks) or 'no task type'}"
        )
    attention = any(re.search(_ATTENTION, path) for path in _tree.paths(base.params))
    model = _with_adapters(base.model, rank) if attention else base.model
    new_head = program.head and base.options.get("outputs") is not None
    where = (f"{_ADAPTERS}|{_HEAD}" if new_head else _ADAPTERS) if attention else None
    return Adaptable(model, where, program, base.options.get("remat") == "example")


@functools.lru_cache(maxsize=32)
def _with_adapters(model: Model, rank: int) -> Model:
    return adapters.lora(model, rank=rank, where=_ATTENTION)


def reader(base: PretrainedModel, program: Program) -> Reader:
    """Returns the reader for the tasks of a model."""
    return reader_of(program.task, base.kind)


def form_of(base: PretrainedModel) -> Form:
    """Returns the input form of a model. Text lengths are static, so that a new text seldom causes a compilation."""
    if base.kind == "image":
        return Form("image", image=base.image)
    most = min(base.max_length or MAX_TOKENS, MAX_TOKENS)
    lengths = (*(length for length in _LENGTHS if length < most), most)
    return Form("text", base.tokenizer, lengths, vocabulary=base.params["embed"]["embedding"].shape[0])


def read_task(base: PretrainedModel, program: Program, task: Any) -> Reading:
    """Reads the examples of a task.

    Raises:
      ValueError: `task` is not a task, does not fit the kind of the model, or has only one class.
    """
    found = reader(base, program).read(form_of(base), task)
    if program.task.classes and len(found.classes) < 2:
        raise ValueError(f"task must have two classes at least, got {len(found.classes)} in {found.name}")
    return found


def read_sources(base: PretrainedModel, program: Program, given: list[Any]) -> list[Source]:
    """Returns episode sources of tasks, all in one form. A `metajax.data` source other than `ClassSource` is kept.

    Raises:
      ValueError: as `read_task`.
    """
    ready = [hasattr(task, "draw") and not isinstance(task, ClassSource) for task in given]
    if program.episode_ways is not None and any(ready):
        raise ValueError(f"task must be {reader(base, program).forms}, got {given[ready.index(True)]!r}")
    found = [None if own else read_task(base, program, task) for task, own in zip(given, ready, strict=True)]
    choices = max((one.inputs["mask"].shape[1] for one in found if one and one.groups is not None), default=0)
    sources: list[Source] = []
    for task, reading in zip(given, found, strict=True):
        if reading is None:
            check_type(task)
            sources.append(task)
        else:
            sources.append(_source(base, program, reading, choices))
    return sources


def _source(base: PretrainedModel, program: Program, reading: Reading, choices: int) -> ClassSource:
    assert reading.targets is not None  # a task has labels
    inputs, options = reading.inputs, dict[str, Any]()
    if reading.lengths is not None:
        lengths = form_of(base).lengths
        axis = 1 if reading.groups is None else 2
        options = {"lengths": reading.lengths, "length_buckets": lengths, "length_axis": axis}
        inputs = inputs if reading.groups is None else with_choices(inputs, choices)
        inputs = to_length(inputs, lengths[-1], lengths)
    if reading.groups is not None:
        options |= {"targets": reading.targets, "task": program.task}
        return ClassSource(reading.name, "train", inputs, reading.groups, reading.group_names, **options)
    names, families = tuple(map(str, reading.classes)), reading.families
    return ClassSource(reading.name, "train", inputs, reading.targets, names, families=families, **options)


def example_inputs(base: PretrainedModel) -> Any:
    """Returns two examples of zeros."""
    if base.kind == "text":
        return {"tokens": np.zeros([2, 4], np.int32), "mask": np.ones([2, 4], bool)}
    return np.zeros([2, *(base.image or ())], np.uint8)


def abstract(base: PretrainedModel, model: Model) -> Params:
    """Returns the parameter shapes of a model that reads the inputs of `base`."""
    return jax.eval_shape(model.init, jax.random.key(0), example_inputs(base))


def example_support(base: PretrainedModel, classes: tuple[Any, ...], ways: int) -> Examples:
    """Returns a support set of two examples of zeros."""
    inputs: PyTree = example_inputs(base)
    if not classes:
        inputs = jax.tree.map(lambda leaf: np.stack([leaf, leaf], axis=1), inputs)
        inputs |= {"types": np.zeros_like(inputs["tokens"]), "choice": inputs["mask"]}
    return Examples(inputs, np.zeros(2, int), np.ones(2, bool), class_mask(classes, ways))


def class_mask(classes: tuple[Any, ...], ways: int | None = None) -> np.ndarray | None:
    """Returns which ways a task uses, None for questions. By default the ways are the classes, rounded up."""
    ways = -(-len(classes) // _WAYS) * _WAYS if ways is None else ways
    return np.arange(ways) < len(classes) if classes else None


def start(base: PretrainedModel, made: Adaptable, key: jax.Array) -> Params:
    """Puts the parameters on the device, with new adapters, which do not change any output yet."""
    params = jax.tree.map(jnp.asarray, base.params)
    return params if made.where is None else adapters.attach(made.model, params, key=key)


@functools.lru_cache(maxsize=64)
def learner_of(made: Adaptable, name: str, steps: int, rate: float) -> Learner:
    """Returns the same learner for the same arguments. `steps` is 0 only if `adapt(num_steps=0)` is called."""
    return _LEARNERS[name](made, steps, rate)


def _prototypical(made: Adaptable, steps: int, rate: float) -> Learner:
    del steps, rate
    return learners.prototypical(made.model, distance="cosine")


def _proto_maml(made: Adaptable, steps: int, rate: float) -> Learner:
    return proto_maml(made.model, optax.adam(rate), steps, adapts=made.where)


def _maml(made: Adaptable, steps: int, rate: float) -> Learner:
    scores = models.score_choices(made.model, remat=made.one_by_one)
    rule = optax.adam(rate)
    return learners.maml(scores, rule, max(steps, 1), adapts=made.where, task=tasks.multiple_choice)


_LEARNERS = {"prototypical": _prototypical, "proto_maml": _proto_maml, "maml": _maml}


def fast_learner(made: Adaptable, steps: int, rate: float) -> Learner:
    """Returns the learner that adapts to a new task in a few steps."""
    return learner_of(made, made.program.fast, steps, rate)
