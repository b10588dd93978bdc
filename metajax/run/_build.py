"""From a config to the parts that an experiment is made of, and from a run folder to a trained learner."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from metajax import data, learners, models, pretrained, tasks, training
from metajax.core import Features, Hypergrad, Learner, Model, TaskType, _tree, _validate
from metajax.core._types import Params
from metajax.data import readers
from metajax.run import _config, _registry, _sources, _values
from metajax.run._sources import Config, Facts
from metajax.run._stages import stages

_IDENTITY = Model(lambda key, inputs: {}, lambda params, inputs: inputs)


class Experiment(NamedTuple):
    """What a config describes.

    Attributes:
      learner: the learner that is evaluated and deployed.
      trained: the learner that is meta-trained; differs from `learner` where the config has a section `deployed`.
      hypergrad: the estimator.
      optimizer: the outer optax transform.
      spec: size of an episode in validation and evaluation.
      train_spec: size of an episode in training.
      num_steps: inner steps in evaluation, None where as many as in training.
      trainable: path regex of the meta-parameters that are trained, None for what the learner says.
      transforms: what `augment` does to the training images.
      start: `(inputs) -> meta_params` to begin with, from pretrained weights, and an example of the inputs `[n, ...]`;
        None where the learner makes them.
      batches: whether training takes batches of examples of all classes (`metajax.data.batches`), and no episodes.
      average: share that stays in a step of the average of the meta-parameters (`metajax.training.averaged`), which
        is then evaluated instead of them; 0 for none.
      stages: of training, the last one on episodes of `train_spec`.
      beside: whether what `trainable` does not pick stands beside the state, as a frozen base.

    >>> Experiment._fields[0]
    'learner'
    """

    learner: Learner
    trained: Learner
    hypergrad: Hypergrad
    optimizer: optax.GradientTransformation
    spec: data.EpisodeSpec
    train_spec: data.EpisodeSpec
    num_steps: int | None
    trainable: str | None
    transforms: tuple[data.Transform, ...]
    start: Callable[[Any], Params] | None = None
    batches: bool = False
    average: float = 0.0
    stages: tuple[training.Stage, ...] = ()
    beside: bool = False

    def split(self, params: Params) -> tuple[Params, Params]:
        """Meta-parameters as those of the state and the frozen base, which is None where there is none."""
        return _tree.split(params, self.trainable, name="training.trainable") if self.beside else (params, None)


def build(config: Config, facts: Facts) -> Experiment:
    """Builds what a config describes; every field is checked before anything is computed.

    Args:
      config: a whole config, see `complete`.
      facts: what is known of the data, see `facts_of`.

    Raises:
      ValueError: a field is out of range; the error names the field, its value and what is accepted.

    >>> from metajax.run import complete
    >>> build(complete({}), Facts(tasks.classification, 5, 100)).spec
    EpisodeSpec(ways=5, shots=1, queries=15, hierarchical=False, buckets=())
    """
    spec = episode_spec(config.episode)
    train = {name: config.episode[name] if value is None else value for name, value in config.train_episode.items()}
    train_spec = episode_spec(train)
    for section, field in (("log", "every"), ("validation", "every"), ("checkpoint", "every")):
        _validate.positive_int(f"{section}.{field}", config[section][field])
    for section in ("validation", "evaluation"):
        _validate.int_at_least(f"{section}.episodes", config[section]["episodes"], 2)
    _validate.positive_int("training.steps", config.training.steps)
    _validate.positive_int("training.meta_batch", config.training.meta_batch)
    _validate.one_of("sampler", config.sampler, ("pipeline", "device", "batches"))
    _validate.int_at_least("seed", config.seed, 0)
    _validate.int_at_least("evaluation.seed", config.evaluation.seed, 0)
    if config.evaluation.num_steps is not None:
        _validate.int_at_least("evaluation.num_steps", config.evaluation.num_steps, 0)
    learner, trained = _learners(config, facts)
    tasks.require_same(facts.task, trained.task, name="data", other_name="learner")
    known = _known(config, facts)
    start = functools.partial(_start, config, facts) if _sources.begins_pretrained(config) else None
    return Experiment(
        learner, trained, _registry.make("hypergrad", config.hypergrad, "hypergrad", known),
        _registry.make_list("optimizer", config.optimizer, "optimizer", known), spec, train_spec,
        config.evaluation.num_steps, config.training.trainable or None, _transforms(config, facts), start,
        _sources.on_batches(config), _validate.below_one("training.average", config.training.average),
        stages(config, train_spec, facts), _sources.base_is_beside(config),
    )  # fmt: skip


def episode_spec(fields: Mapping[str, Any]) -> data.EpisodeSpec:
    """The size of episodes; a pair of numbers is a range, `{"support": n}` for shots is the rule of Meta-Dataset.

    >>> episode_spec({"ways": [5, 20], "shots": 1, "queries": 15}).ways
    (5, 20)
    """
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    if isinstance(given.get("shots"), Mapping):
        given["shots"] = data.Imbalanced(**given["shots"])
    return data.EpisodeSpec(**given)


def _known(config: Config, facts: Facts) -> dict[Any, Any]:
    """What is known only when a run is built: by name for "@name" and for arguments of that name, and by type."""
    return {
        "steps": config.training.steps, "outputs": facts.outputs, "num_classes": facts.num_classes, "weights": False,
        TaskType: facts.task, **_encoder(config),
    }  # fmt: skip


def _encoder(config: Config) -> dict[str, Any]:
    """How the run turns a text into tokens, where it has a tokenizer."""
    section = config.data
    if "tokenizer" not in section:
        return {}
    encoder: list[Any] = []

    def encode(text: str) -> list[int]:
        if not encoder:
            path = section.tokenizer or config.model.get("path")
            encoder.append(readers.load_tokenizer(path, section.max_length, user="learner"))
        return encoder[0].encode(text, add_special_tokens=False).ids

    return {"encode": encode}


def _learners(config: Config, facts: Facts, *, weights: bool = False) -> tuple[Learner, Learner]:
    """The learner that is evaluated and the one that is trained; with `weights`, `init` gives pretrained ones."""
    trained = _learner(config, config.learner, "learner", facts, weights)
    if config.deployed is None:
        return trained, trained
    deployed = _values.plain(config.deployed)
    if "name" not in deployed:
        deployed = _config.merged(_values.plain(config.learner), deployed, "deployed")
    return _learner(config, deployed, "deployed", facts, weights), trained


def _learner(config: Config, section: Mapping[str, Any], where: str, facts: Facts, weights: bool) -> Learner:
    features = _registry.reads_features("learner", section, where)
    model = make_model(config, facts, features=features, weights=weights)
    known = {**_known(config, facts), Model: model, Features: model}
    return _registry.make("learner", section, where, known)


def make_model(config: Config, facts: Facts, *, features: bool, weights: bool = False) -> Model:
    """The network of a config.

    Args:
      config: a whole config.
      facts: what is known of the data.
      features: whether its outputs are features, and not those of a task.
      weights: whether its `init` gives pretrained weights, where it has some.
    """
    outputs = None if features else facts.outputs
    wrappers = {name: part for name, part in _registry.parts(_values.plain(config.wrap)) if part is not None}
    if config.frozen:
        if wrappers:
            raise ValueError(f"frozen must be False for {', '.join(wrappers)}, which is trained, got True")
        return _IDENTITY if outputs is None else models.mlp(outputs, hidden=())
    known = {**_known(config, facts), "outputs": outputs, "weights": weights}
    if features:
        known[TaskType] = None
    model = _registry.make("model", config.model, "model", known)
    for name, section in wrappers.items():
        model = _registry.make("wrap", section, f"wrap.{name}", {**known, Model: model})
    return model


def _start(config: Config, facts: Facts, inputs: Any) -> Params:
    """Meta-parameters over pretrained weights, with new heads and adapters."""
    return _learners(config, facts, weights=True)[1].init(jax.random.key(config.seed), inputs)


def _transforms(config: Config, facts: Facts) -> tuple[data.Transform, ...]:
    if config.augment is None:
        return ()
    if facts.image is None:
        raise ValueError("augment must be None but for images, got a transform")
    section = _values.plain(config.augment)
    several = _registry.parts(section) if _config.is_list(section) else [("", section)]
    return tuple(
        _registry.make("transform", part, f"augment.{name}" if name else "augment", {})
        for name, part in several
        if part is not None
    )


def normalisation(config: Config) -> str:
    """The normalisation policy of the model, "none" for one without.

    >>> from metajax.run import complete
    >>> normalisation(complete({}))
    'batch'
    """
    return config.model.get("normalisation", "none")


def on_features(
    config: Config, facts: Facts, learner: Learner, params: Params, *given: Any
) -> tuple[Learner, Params, tuple[Any, ...]]:
    """A trained learner and sources for its evaluation, where what its model makes of an example never changes.

    Prototypes do not adapt the model. Each text is then put through a pretrained one once, and not in every episode
    that draws it.

    Args:
      config: of the run.
      facts: of the run.
      learner: as `load_run` gives it, or `build`.
      params: its meta-parameters.
      *given: sources of labelled texts; None stays None.

    Returns:
      `(learner, params, sources)`: as given, or of the features, on which the learner predicts the same.

    >>> from metajax.run import complete
    >>> on_features(complete({}), None, "learner", "params", "source")  # what an image becomes depends on its batch
    ('learner', 'params', ('source',))
    """
    section = config.learner if config.deployed is None or "name" not in config.deployed else config.deployed
    prototypes = _registry.factory("learner", section["name"], "learner") is learners.prototypical
    if not prototypes or not _sources.begins_pretrained(config):
        return learner, params, given
    model = _deterministic(make_model(config, facts, features=True))
    found = tuple(source and pretrained.features(model, params, source, cache=False) for source in given)
    return _registry.make("learner", section, "learner", {Features: _IDENTITY}), {}, found


def _deterministic(model: Model) -> Model:
    """The model without what a key brings: no token is hidden."""
    return model._replace(
        apply=lambda params, inputs, **needed: model.apply(params, inputs, **needed),
        needs=tuple(name for name in model.needs if name != "key"),
    )


def load_config(workdir: str | pathlib.Path) -> ConfigDict:
    """Reads the config of a run folder.

    Raises:
      ValueError: the folder holds no run, or one of another version of the config.

    >>> load_config("no such folder")
    Traceback (most recent call last):
    ValueError: workdir must be the folder of a run, with a config.json in it, got 'no such folder'
    """
    folder = pathlib.Path(workdir)
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"workdir must be the folder of a run, with a config.json in it, got {str(workdir)!r}")
    told = json.loads(path.read_text(encoding="utf-8"))
    if told.get("config_version") != _config.VERSION:
        raise ValueError(
            f"config_version of the run in {str(workdir)!r} must be {_config.VERSION}, got "
            f"{told.get('config_version')!r}"
        )
    run = _told(folder)
    for name, digest in run.get("own_parts", {}).items():
        _values.beside(pathlib.Path(run["config_folder"]))
        found = _values.own_parts(name)
        if found.get(name) != digest:
            what = "it is not there" if not found else "its file has changed"
            raise ValueError(f"{name} must be the part of the user's own that the run was made with: {what}")
    return _config.complete(told)


def _told(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def load_facts(workdir: str | pathlib.Path) -> Facts:
    """What a run knows of its data.

    Raises:
      ValueError: the folder holds no run.

    >>> load_facts("no such folder")
    Traceback (most recent call last):
    ValueError: workdir must be the folder of a run, with a run.json in it, got 'no such folder'
    """
    told = _told(pathlib.Path(workdir)).get("data")
    if told is None:
        raise ValueError(f"workdir must be the folder of a run, with a run.json in it, got {str(workdir)!r}")
    return Facts.from_json(told)


def load_run(
    workdir: str | pathlib.Path, *, checkpoint: str = "last", config: Config | None = None, inputs: Any = None
) -> tuple[Learner, Params]:
    """Loads a trained learner.

    Args:
      workdir: a run folder of `metajax.run`.
      checkpoint: "last" or "best" (by validation), or "start": the pretrained weights that the run began with, or what
        it took of the run that `init` names.
      config: instead of that of the run; what is changed must leave the parameters as they are, but for "start".
      inputs: an example of them `[n, ...]`, from which "start" makes parameters that are not pretrained.

    Returns:
      The learner and its meta-parameters (NumPy arrays), ready for `learner.adapt(params, support)`.

    Raises:
      ValueError: the folder holds no run or no such checkpoint, or a frozen model has other weights than in training.

    >>> load_run("no such folder")
    Traceback (most recent call last):
    ValueError: workdir must be the folder of a run, with a config.json in it, got 'no such folder'
    """
    _validate.one_of("checkpoint", checkpoint, ("last", "best", "start"))
    own = load_config(workdir)
    config, facts = own if config is None else config, load_facts(workdir)
    experiment = build(config, facts)
    if checkpoint == "start":
        return experiment.learner, _first_params(config, experiment, inputs)
    _sources.check_base(workdir, config)
    if "path" in own.model:  # as it was trained, but for the place of its weights
        own.model.path = config.model.get("path", "")
    base = _sources.base_sha256(own)
    params, _ = training.restore_params(pathlib.Path(workdir) / "checkpoints", kind=checkpoint, base=base)
    begun = build(own, facts)
    if begun.beside and begun.start is not None:
        params = _tree.merge(params, jax.tree.map(np.asarray, begun.split(begun.start(inputs))[1]))
    return experiment.learner, params


def _first_params(config: Config, experiment: Experiment, inputs: Any) -> Params:
    """The parameters of the deployed learner before training, as NumPy arrays."""
    if not _sources.is_pretrained(config):
        raise ValueError("checkpoint must be 'last' or 'best' for a run on no pretrained weights, got 'start'")
    if inputs is None:
        raise ValueError("inputs must be given for the start of a run, got None")
    if experiment.start is None:  # over a frozen model
        params = experiment.learner.init(jax.random.key(config.seed), jax.tree.map(jnp.asarray, inputs))
    else:
        params = experiment.start(inputs)
    if config.init:
        params = training.begin_with(config.init, params, base=_sources.weights_sha256(config)).params
    return jax.tree.map(np.asarray, params)
