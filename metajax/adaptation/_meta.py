"""Meta-trains a pretrained model on one task after another."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metajax import data, hypergrad
from metajax.adaptation import _base
from metajax.core import _tree, _validate
from metajax.core._types import Episode, Learner, MetaState, OuterUpdate, Params
from metajax.pretrained import PretrainedModel
from metajax.training import NonFiniteError, fit, outer_update

_WAYS = 5  # default, at most
_EPISODES = 4  # in an outer step
_INNER_STEPS, _INNER_RATE = 3, 2e-3  # of "proto_maml" and "maml"


@dataclasses.dataclass(frozen=True)
class MetaTrainedModel:
    """A pretrained model with meta-trained adapters; `adapt_model` returns it and can continue to train it.

    Attributes:
      base: the pretrained model, shared by all models made from it.
      learner: the learner that adapts in an episode.
      rank: rank of the adapters.
      options: other settings of the meta step: the name of the learner and the outer rate.
      state: the trained parameters, the state of the outer optimizer, the number of steps and the key, without the
        frozen base.
      frozen: the base on the device, with None for leaves that are in `state.params`; None if the whole model is
        trained.
      history: metrics of each outer step of the last call, by name: `loss` and `accuracy` `[steps]`, and others.

    >>> MetaTrainedModel.__name__
    'MetaTrainedModel'
    """

    base: PretrainedModel
    learner: Learner = dataclasses.field(repr=False)
    rank: int
    options: tuple[str, float]
    state: MetaState = dataclasses.field(repr=False)
    frozen: Params = dataclasses.field(repr=False)
    history: dict[str, np.ndarray] = dataclasses.field(repr=False)

    @property
    def params(self) -> Params:
        """All parameters, including the adapters."""
        return _tree.merge(self.state.params, self.frozen)


def adapt_model(
    model: PretrainedModel | MetaTrainedModel,
    task: Any,
    *,
    steps: int = 100,
    ways: int | None = None,
    shots: int = 5,
    queries: int = 5,
    learner: Literal["prototypical", "proto_maml", "maml"] | None = None,
    rank: int | None = None,
    outer_rate: float | None = None,
    seed: int = 0,
) -> MetaTrainedModel:
    """Meta-trains a pretrained model on a task: from episodes it learns to tell new classes from few examples.

    It trains low-rank adapters (LoRA) in the queries and values of attention; the base is frozen and shared. A model
    without attention (Conv4, ResNet-12) is trained as a whole. Pass the result of a call to train it further. Tasks
    with the same ways, shots, queries and input form share one compilation.

    A model that scores texts learns to answer questions with choices (see `metajax.models.score_choices`): a decoder
    with token logits (`load_pretrained_model(path, head="tokens")`), or a model with one output, `outputs=1`, whose new
    layer is trained too. Its tasks are kinds of questions, and an episode has questions of one kind.

    Args:
      model: the result of `load_pretrained_model`, or of an earlier call.
      task: a folder or zip of `CLASS/NAME.png`; a file of texts with the columns `text` and `label` (.jsonl, .csv,
        .tsv, or .json lists; see `metajax.data.text`); a pair `(inputs, labels)` of uint8 images `[n, height, width,
        channels]` or a list of texts, and labels that are texts or integers; a source of `metajax.data` with classes;
        or a list of these, sampled at random. Texts are cut at 128 tokens. For questions: a .jsonl file in the format
        of `metajax.data.multiple_choice` or a folder of such files, a pair `(questions, answers)` of dicts
        `{"question": ..., "choices": [...], "context": ...}` and the indices or texts of the right choices, or a source
        of that function.
      steps: outer steps, with 4 episodes each.
      ways: classes of an episode; by default 5, or all classes if a task has fewer. Questions have 1.
      shots: support examples of each class, or support questions.
      queries: query examples of each class, or query questions.
      learner: "prototypical" (cosine; the default), or "proto_maml", three first-order inner steps from prototypes. For
        questions it is "maml", three first-order inner steps. The first call sets it.
      rank: rank of the adapters, 8 by default; the first call sets it.
      outer_rate: learning rate of Adam, 1e-3 by default; the first call sets it.
      seed: seed of the new adapters and of the episodes.

    Returns:
      A `MetaTrainedModel`; `model` is not changed.

    Raises:
      ValueError: `task` is not a task, does not fit the kind of the model, has only one class, an empty text (reported
        by its index), images of another size, or an answer that is not a choice; a class has fewer examples than
        `shots + queries`; there are fewer than 2 ways, or more than classes; the learner, rank or rate differs from the
        first call; an argument is out of range.

    Sources: Snell et al. 2017, arXiv:1703.05175; Hu et al. 2022 (LoRA), arXiv:2106.09685; Triantafillou et al. 2020
    (Proto-MAML), arXiv:1903.03096; Finn et al. 2017 (MAML), arXiv:1703.03400.

    >>> import pathlib, tempfile, jax, jax.numpy as jnp, metajax
    >>> folder, options = pathlib.Path(tempfile.mkdtemp()) / "model", {"width": 8, "normalisation": "layer"}
    >>> params = metajax.models.conv4(**options).init(jax.random.key(0), jnp.zeros([1, 28, 28, 1]))
    >>> metajax.save_pretrained_model(folder, params, factory="conv4", options=options, image=(28, 28, 1))
    >>> model = metajax.load_pretrained_model(folder)
    >>> for task in [metajax.data.glyphs("train"), metajax.data.glyphs("val")]:
    ...     model = adapt_model(model, task, steps=2)
    >>> int(model.state.step), model.history["loss"].shape
    (4, (2,))
    """
    _validate.positive_int("steps", steps)
    if not isinstance(model, MetaTrainedModel):
        model = _first(model, learner, rank, outer_rate, seed)
    name, rate = model.options
    chosen = {"learner": (learner, name), "rank": (rank, model.rank), "outer_rate": (outer_rate, rate)}
    for argument, (value, first) in chosen.items():
        if value not in (None, first):
            raise ValueError(f"{argument} must be that of the first call, {first!r}, got {value!r}")
    tasks = task if isinstance(task, list) else [task]
    if not tasks:
        raise ValueError("task must be a task or a list of them, got an empty list")
    program = _base.adaptable(model.base, model.rank).program
    sources: list[Any] = _base.read_sources(model.base, program, tasks)
    spec = data.EpisodeSpec(_ways(ways, program, sources), shots, queries)
    source = sources[0] if len(sources) == 1 else data.mixture(sources)
    begun, told = int(model.state.step), list[dict[str, Any]]()
    episodes = (
        data.episode_batch(source, spec, seed=seed, start=step * _EPISODES, count=_EPISODES)
        for step in range(begun, begun + steps)
    )
    state = jax.tree.map(jnp.copy, model.state)  # the call consumes its state, and `model` must not change
    try:
        state = fit(
            _outer(model.learner, rate), state, episodes, steps=begun + steps, frozen=model.frozen,
            callbacks=[lambda step, state, metrics: told.append(metrics)],
        )  # fmt: skip
    except NonFiniteError as error:
        raise ValueError(
            f"outer_rate must be low enough for a finite loss, got {rate}: the loss is not finite"
        ) from error
    history = {key: np.stack([np.asarray(metrics[key]) for metrics in told]) for key in told[0]}
    return dataclasses.replace(model, state=state, history=history)


def _ways(ways: int | None, program: _base.Program, sources: list[Any]) -> int:
    """Returns the ways of an episode."""
    if program.episode_ways is not None:
        if ways not in (None, program.episode_ways):
            raise ValueError(
                f"ways must be {program.episode_ways} for questions, which bring their choices, got {ways!r}"
            )
        return program.episode_ways
    classes = min(getattr(source, "num_classes", _WAYS) for source in sources)
    return min(_WAYS, classes) if ways is None else _validate.int_at_least("ways", ways, 2)


def _first(
    base: PretrainedModel, learner: str | None, rank: int | None, outer_rate: float | None, seed: int
) -> MetaTrainedModel:
    rate = _validate.positive_float("outer_rate", 1e-3 if outer_rate is None else outer_rate)
    rank = 8 if rank is None else rank
    made = _base.adaptable(base, rank)
    known = made.program.learners
    name = _validate.one_of("learner", known[0] if learner is None else learner, known)
    adapters_key, key = jax.random.split(jax.random.key(_validate.int_at_least("seed", seed, 0)))
    trained, frozen = _tree.split(_base.start(base, made, adapters_key), made.where)
    frozen = frozen if made.where is not None else None
    made_learner = _base.learner_of(made, name, _INNER_STEPS, _INNER_RATE)
    support = _base.example_support(base, ("a", "b") if made.program.task.classes else (), 2)
    state = _outer(made_learner, rate).init(key, Episode(support, support), trained, frozen=frozen)
    return MetaTrainedModel(base, made_learner, rank, (name, rate), state, frozen, {})


def scores_choices(model: PretrainedModel | MetaTrainedModel, rank: int) -> bool:
    """Whether the tasks of a model are questions with choices.

    Raises:
      ValueError: the model adapts to no task type, or `rank` does not fit.
    """
    base, rank = (model.base, model.rank) if isinstance(model, MetaTrainedModel) else (model, rank)
    return not _base.adaptable(base, rank).program.task.classes


@functools.lru_cache(maxsize=32)
def _outer(learner: Learner, rate: float) -> OuterUpdate:
    """Returns the same meta step for the same arguments, because it is the key of compiled programs."""
    return outer_update(learner, optax.adam(rate), hypergrad=hypergrad.first_order(), before=False)
