"""From a config to the parts that an experiment is made of, and from a run folder to a trained learner."""

from __future__ import annotations

import functools
import json
import pathlib
import string
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metajax import adapters, data, hypergrad, learners, models, pretrained
from metajax.core import _tree, _validate
from metajax.core._types import Hypergrad, Learner, Model, Params
from metajax.data.readers._tokens import load_tokenizer
from metajax.strategies._contrast import TRAINED, contrastive
from metajax.strategies._curriculum import Stage
from metajax.training import _checkpoint, _data
from metajax.training._beginning import begin_with
from metajax.training._stages import stages

Config = Mapping[str, Any]
LEARNERS = ("maml", "meta_sgd", "reptile", "bayesian", "prototypical", "finetune", "in_context", "moco", "simclr")
_GRADIENT = ("maml", "meta_sgd", "reptile", "bayesian")
_CONTRASTIVE = ("moco", "simclr")
_REMAT = {"none": False, "block": True, "example": "example"}
_IDENTITY = Model(lambda key, inputs: {}, lambda params, inputs: inputs)
ESTIMATORS = (  # those that need no argument
    "displacement", "finite_difference", "first_order", "forward_mode", "implicit", "mixed_mode", "sama", "unrolled"
)  # fmt: skip


class Experiment(NamedTuple):
    """What a config describes.

    Attributes:
      learner: the learner that is evaluated and deployed.
      trained: the learner that is meta-trained; differs from `learner` for the transfer-learning baseline.
      hypergrad: the estimator.
      optimizer: the outer optax transform.
      spec: size of an episode in validation and evaluation.
      train_spec: size of an episode in training.
      eval_steps: inner steps in evaluation, None where as many as in training.
      trainable: path regex of the meta-parameters that are trained, None for all.
      transform: what `augment` does to the training images, None for nothing.
      start: `(inputs) -> meta_params` to begin with, from pretrained weights, and an example of the inputs `[n, ...]`;
        None where the learner makes them.
      batches: whether training takes batches of examples of all classes (`metajax.data.batches`), and no episodes.
      average: share that stays in a step of the average of the meta-parameters (`metajax.strategies.averaged`), which
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
    eval_steps: int | None
    trainable: str | None
    transform: data.Transform | None
    start: Callable[[Any], Params] | None = None
    batches: bool = False
    average: float = 0.0
    stages: tuple[Stage, ...] = ()
    beside: bool = False

    def split(self, params: Params) -> tuple[Params, Params]:
        """Meta-parameters as those of the state and the frozen base, which is None where there is none."""
        return _tree.split(params, self.trainable, name="outer.trainable") if self.beside else (params, None)


def build(config: Config, *, num_classes: int | None = None) -> Experiment:
    """Builds what `config` describes; every field is checked before anything is computed.

    Args:
      config: a mapping of the fields that `experiments/configs` document.
      num_classes: base classes of the training source, which only `finetune` needs to train.

    Raises:
      ValueError: a field is out of range; the error names the field, its value and what is accepted.

    >>> from experiments.configs import prototypical_glyphs
    >>> build(prototypical_glyphs.get_config()).spec
    EpisodeSpec(ways=5, shots=1, queries=15, hierarchical=False, buckets=())
    """
    episode, train = config["episode"], config["train_episode"]
    spec = _episode_spec(episode)
    train_spec = _episode_spec({name: train[name] or episode[name] for name in episode})
    learner, trained = _learners(config, spec, num_classes)
    for section, field in (("log", "every"), ("validation", "every"), ("checkpoint", "every")):
        _validate.positive_int(f"{section}.{field}", config[section][field])
    for section in ("validation", "evaluation"):
        _validate.int_at_least(f"{section}.episodes", config[section]["episodes"], 2)
    sampler = config["data"].get("sampler", "pipeline")  # runs of old do not have it
    name = config["learner"]["name"]
    batches = _data.on_batches(config)
    if _validate.one_of("data.sampler", sampler, ("pipeline", "device")) == "device" and batches:
        raise ValueError(f"data.sampler must be 'pipeline' for {name}, which trains on no episodes, got 'device'")
    _validate.int_at_least("seed", config["seed"], 0)
    _validate.int_at_least("evaluation.seed", config["evaluation"]["seed"], 0)
    estimator = _validate.one_of("hypergrad.name", config["hypergrad"]["name"], ESTIMATORS)
    if name == "meta_sgd" and estimator in ("displacement", "implicit"):
        raise ValueError(f"hypergrad.name must be one that trains the rates of meta_sgd, got {estimator!r}")
    start = functools.partial(_start, config, spec, num_classes) if _begins_pretrained(config) else None
    average = _validate.below_one("outer.average", config["outer"].get("average", 0.0))  # runs of old do not have it
    eval_steps = _validate.int_at_least("inner.eval_steps", config["inner"]["eval_steps"], 0) or None
    return Experiment(
        learner, trained, getattr(hypergrad, estimator)(), _outer_optimizer(config["outer"]),
        spec, train_spec, eval_steps,
        config["outer"].get("trainable", "") or (TRAINED if name in _CONTRASTIVE else None), _transform(config), start,
        batches, average, stages(config, train_spec, batches), _data.base_is_beside(config),
    )  # fmt: skip


def _episode_spec(config: Config) -> data.EpisodeSpec:
    ways, shots = config["ways"], config["shots"]
    if config["imbalanced"]:
        if config["max_shots"]:
            raise ValueError(f"max_shots must be 0 where episodes are imbalanced, got {config['max_shots']}")
        shots = data.Imbalanced(config["imbalanced"])
    elif config["max_shots"]:
        shots = (shots, config["max_shots"])
    ways = (ways, config["max_ways"]) if config["max_ways"] else ways
    return data.EpisodeSpec(ways, shots, config["queries"], config["hierarchical"])


def _start(config: Config, spec: data.EpisodeSpec, num_classes: int | None, inputs: Any) -> Params:
    """Meta-parameters over pretrained weights, with new heads and adapters."""
    trained = _learners(config, spec, num_classes, weights=True)[1]
    return trained.init(jax.random.key(config["seed"]), inputs)


def _learners(
    config: Config, spec: data.EpisodeSpec, num_classes: int | None, *, weights: bool = False
) -> tuple[Learner, Learner]:
    """The learner that is evaluated and the one that is trained; with `weights`, `init` gives pretrained ones."""
    learner, inner, source, kind = config["learner"], config["inner"], config["data"]["name"], _data.kind_of(config)
    name = _validate.one_of("learner.name", learner["name"], LEARNERS)
    for inputs, made in (("text", "pretrained"), ("tokens", "decoder")):
        if (kind.inputs == inputs) != (config["model"]["name"] == made):
            served = ", ".join(name for name, other in _data.KINDS.items() if other.inputs == inputs)
            raise ValueError(
                f"model.name must be {made!r} for {served} and for nothing else, got {config['model']['name']!r} for "
                f"{source!r}"
            )
    if ("span" in kind.task.heads) != (config["model"].get("head") == "span"):
        served = ", ".join(name for name, other in _data.KINDS.items() if "span" in other.task.heads)
        raise ValueError(
            f"model.head must be 'span' for {served} and for nothing else, got {config['model'].get('head')!r} for "
            f"{source!r}"
        )
    outputs, network = _outputs(config, spec.max_ways), functools.partial(_model, config, weights=weights)
    if name == "in_context":
        if not _begins_pretrained(config) or kind.inputs != "text" or not kind.task.classes:
            raise ValueError(
                "learner.name must not be 'in_context' but for text and a pretrained model that is not frozen, got "
                f"{name!r} for {source!r}"
            )
        built = learners.in_context(network(None), **_prompts(config, spec.max_ways))
        return built, built
    steps = _validate.positive_int("inner.steps", inner["steps"])
    _validate.positive_float("inner.rate", inner["rate"])
    rate = _validate.non_negative_float("inner.eval_rate", inner.get("eval_rate", 0.0))  # runs of old have none
    if rate and name not in ("maml", "reptile", "bayesian", "finetune"):
        raise ValueError(
            "inner.eval_rate must be 0 but for maml, reptile, bayesian and finetune, whose inner loops have one rate, "
            f"got {rate} for {name}"
        )
    if name in _GRADIENT:
        model = network(outputs)
        trained = _gradient(config, model, inner["rate"])
        return _gradient(config, model, rate) if rate else trained, trained
    if not kind.task.classes:
        raise ValueError(
            f"learner.name must be 'maml', 'meta_sgd', 'reptile' or 'bayesian' for {source}, which has no classes, got "
            f"{name!r}"
        )
    features = network(None)
    if name in _CONTRASTIVE:
        built = _contrastive(config, features)
        return built, built
    if name == "prototypical":
        built = _prototypical(config, features)
        return built, built
    head, rule = learner["head"], _inner_rule(inner, rate or inner["rate"])
    return learners.finetune(features, rule, steps, head=head), learners.pretrain(features, num_classes or 1, head=head)


def _gradient(config: Config, model: Model, rate: float) -> Learner:
    """A learner with an inner loop of this rate."""
    learner, inner = config["learner"], config["inner"]
    steps, rule = inner["steps"], _inner_rule(inner, rate)
    options: dict[str, Any] = {"adapts": learner["adapts"] or None, "task": _data.kind_of(config).task}
    if learner["name"] == "maml":
        return learners.maml(model, rule, steps, proximal=learner["proximal"], **options)
    if learner["name"] == "reptile":
        return learners.reptile(model, rule, steps, batch_size=learner["batch_size"] or None, **options)
    if learner["name"] == "meta_sgd":
        _validate.one_of("learner.rates", learner["rates"], ("weight", "array"))
        options |= {"per": learner["rates"], "each_step": learner["each_step"], "inner": _inner_rule(inner, 1.0)}
        return learners.meta_sgd(model, rate, steps, **options)
    options |= {"beta": learner["beta"], "scale": learner["deviation"], "samples": learner["samples"]}
    return learners.bayesian(model, rule, steps, **options)


def _prototypical(config: Config, features: Model) -> Learner:
    fields = config["learner"]
    return learners.prototypical(features, distance=fields["distance"], scale=fields.get("scale") or None)


def _outputs(config: Config, ways: int) -> int | None:
    """Outputs of the model of a learner with a head."""
    return None if _data.scores_tokens(config) else _data.kind_of(config).outputs(config["data"], ways)


def _prompts(config: Config, ways: int) -> dict[str, Any]:
    """The texts of a prompt as tokens."""
    fields = config["learner"]
    names = tuple(fields["labels"]) or tuple(string.ascii_uppercase)
    if len(names) < ways:
        raise ValueError(f"learner.labels must name each of the {ways} classes of an episode, got {len(names)} labels")
    encoder = load_tokenizer(
        config["data"]["tokenizer"] or config["model"]["path"], config["data"]["length"], user="in_context"
    )

    def tokens(text: str) -> list[int]:
        return encoder.encode(text, add_special_tokens=False).ids

    known = [tokens(f" {name}") or tokens(name) for name in names]
    width = max(map(len, known))
    return {
        "labels": [[*label, *[-1] * (width - len(label))] for label in known],
        "separator": tokens(fields["separator"]), "end": tokens(fields["end"]),
        "content_free": tokens(fields["content_free"]) or None,
    }  # fmt: skip


def _contrastive(config: Config, features: Model) -> Learner:
    if _data.kind_of(config).inputs == "text":
        raise ValueError(f"learner.name must be one that learns from text, got {config['learner']['name']!r}")
    options = dict(config["contrast"])
    if config["learner"]["name"] == "simclr":
        options |= {"momentum": None, "queue": 0}
    return contrastive(features, **options)


def _model(config: Config, outputs: int | None, *, weights: bool = False) -> Model:
    """The network; with `weights`, its `init` gives those of a pretrained one."""
    fields = config["model"]
    name = _validate.one_of("model.name", fields["name"], ("conv4", "resnet12", "vit", "mlp", "decoder", "pretrained"))
    if not fields["hidden"]:
        raise ValueError(f"model.hidden must hold at least one width, got {fields['hidden']!r}")
    adapter = config.get("adapter", {"name": ""})  # runs of old do not have it
    if _is_frozen(config):
        if name != "pretrained" or adapter["name"]:
            raise ValueError(
                f"model.frozen must be False for {adapter['name'] or name}, which holds what is trained, got True"
            )
        return _IDENTITY if outputs is None else models.mlp(outputs, hidden=())
    if name == "pretrained":
        options = _pretrained_options(config, outputs)
        choices = "score" in _data.kind_of(config).task.heads
        one_by_one = choices and options["remat"] == "example"
        if one_by_one:  # an example is a question: its choices go through a block together
            options["remat"] = True
        opened = pretrained.open_model(pathlib.Path(fields["path"]), **options)[2]
        model = _hiding(config, _adapted(opened, adapter))
        model = models.score_choices(model, remat=one_by_one) if choices else model
        return model._replace(init=lambda key, inputs: _pretrained_params(config, outputs)) if weights else model
    if adapter["name"] and name not in ("vit", "decoder"):
        raise ValueError(
            f"adapter.name must be empty for {name}, whose layers take no adapter, got {adapter['name']!r}"
        )
    if name in ("vit", "decoder"):
        sizes = {size: fields[size] for size in ("width", "depth", "heads")}
        dtype = jnp.dtype(_validate.one_of("model.dtype", fields["dtype"], ("float32", "bfloat16")))
        if name == "vit":
            return _adapted(models.vit(outputs, patch=fields["patch"], dtype=dtype, **sizes), adapter)
        return _adapted(models.decoder(outputs or 1, dtype=dtype, **sizes), adapter)
    if name == "mlp":
        return models.mlp(outputs or fields["hidden"][-1], hidden=tuple(fields["hidden"]))
    if name == "resnet12":
        return models.resnet12(
            outputs, widths=_resnet_widths(fields["width"], fields["depth"]), normalisation=fields["normalisation"]
        )
    return models.conv4(
        outputs, width=fields["width"], depth=fields["depth"], pool=fields["pool"],
        normalisation=fields["normalisation"],
    )  # fmt: skip


def _resnet_widths(width: int, depth: int) -> tuple[int, ...]:
    """The first `depth` blocks of ResNet-12 in the published ratio; 64 and 4 are the published network."""
    _validate.positive_int("model.width", width)
    if _validate.positive_int("model.depth", depth) > 4:
        raise ValueError(f"model.depth must be at most 4 for resnet12, got {depth}")
    return tuple(width * half // 2 for half in (2, 5, 10, 20)[:depth])


def _is_pretrained(config: Config) -> bool:
    return config["model"]["name"] == "pretrained"


def _is_frozen(config: Config) -> bool:
    """Whether the sources give features of the pretrained model, which is then no part of what is trained."""
    return config["model"].get("frozen", False)  # runs of old do not have it


def _begins_pretrained(config: Config) -> bool:
    return _is_pretrained(config) and not _is_frozen(config)


def _pretrained_options(config: Config, outputs: int | None) -> dict[str, Any]:
    dtype = _validate.one_of("model.dtype", config["model"]["dtype"], ("float32", "bfloat16"))
    remat = config["model"]["remat"]  # runs of old have True or False
    return {
        "head": _data.pretrained_head(config),
        "outputs": outputs,
        "dtype": jnp.dtype(dtype),
        "remat": remat if isinstance(remat, bool) else _REMAT[_validate.one_of("model.remat", remat, tuple(_REMAT))],
    }


def _pretrained_params(config: Config, outputs: int | None) -> Params:
    """Pretrained weights, with a new head of `outputs` where the model has one, and new adapters."""
    head_key, adapter_key = jax.random.split(jax.random.key(config["seed"]))
    loaded = pretrained.load_pretrained_model(
        config["model"]["path"], key=head_key, **_pretrained_options(config, outputs)
    )
    if not config["adapter"]["name"]:
        return loaded.params
    return adapters.attach(_adapted(loaded.model, config["adapter"]), loaded.params, key=adapter_key)


def _adapted(model: Model, config: Config) -> Model:
    if not config["name"]:
        return model
    where = {"where": config["where"]} if config["where"] else {}
    sizes: dict[str, dict[str, Any]] = {  # the argument that adapter.rank gives
        "lora": {"rank": config["rank"]}, "ia3": {}, "bitfit": {}, "bottleneck": {"size": config["rank"]},
        "prefix": {"length": config["rank"]}, "prompt": {"length": config["rank"]},
    }  # fmt: skip
    name = _validate.one_of("adapter.name", config["name"], tuple(sizes))
    return getattr(adapters, name)(model, **sizes[name], **where)


def _hiding(config: Config, model: Model) -> Model:
    share = _validate.below_one("augment.words", config["augment"].get("words", 0.0))  # runs of old do not have it
    return models.hide_tokens(model, share) if share else model


def _transform(config: Config) -> data.Transform | None:
    fields, kind = config["augment"], _data.kind_of(config)
    bounds: dict[str, Any] = {name: _validate.non_negative_float(f"augment.{name}", fields[name]) for name in fields}
    words = bounds.pop("words", 0.0)
    if words and (kind.inputs != "text" or "score" in kind.task.heads or _is_frozen(config)):
        raise ValueError(f"augment.words must be 0 but for texts and a model that is not frozen, got {words}")
    if words and config["learner"]["name"] == "in_context":
        raise ValueError(f"augment.words must be 0 for in_context, whose prompts would lose labels too, got {words}")
    if not any(bounds.values()):
        return None
    if kind.inputs != "image":
        raise ValueError(f"augment must be all 0 but for images, got {bounds} for {config['data']['name']}")
    return data.random_affine(**bounds)


def _inner_rule(config: Config, rate: float) -> optax.GradientTransformation:
    name = _validate.one_of("inner.optimizer", config["optimizer"], ("sgd", "adam"))
    # without a first moment it is the rule of Reptile's paper; eps_root keeps second-order gradients finite
    return optax.sgd(rate) if name == "sgd" else optax.adam(rate, b1=0.0, eps_root=1e-8)


def _outer_optimizer(config: Config) -> optax.GradientTransformation:
    rate = _validate.positive_float("outer.rate", config["rate"])
    steps = _validate.positive_int("outer.steps", config["steps"])
    _validate.positive_int("outer.meta_batch", config["meta_batch"])
    clip = _validate.non_negative_float("outer.clip", config["clip"])
    name = _validate.one_of("outer.optimizer", config["optimizer"], ("adam", "sgd"))
    kind = _validate.one_of("outer.schedule", config["schedule"], ("constant", "cosine", "linear"))
    schedule: Any = {
        "constant": rate,
        "cosine": optax.cosine_decay_schedule(rate, steps),
        "linear": optax.linear_schedule(rate, 0.0, steps),
    }[kind]
    rule = optax.adam(schedule) if name == "adam" else optax.sgd(schedule)
    return optax.chain(optax.clip_by_global_norm(clip), rule) if clip else rule


def normalisation(config: Config) -> str:
    """The normalisation policy of the model, "none" for one without.

    >>> normalisation({"model": {"name": "mlp"}})
    'none'
    """
    return config["model"]["normalisation"] if config["model"]["name"] in ("conv4", "resnet12") else "none"


def on_features(
    config: Config, learner: Learner, params: Params, *sources: Any
) -> tuple[Learner, Params, tuple[Any, ...]]:
    """A trained learner and sources for its evaluation, where what its model makes of an example never changes.

    Prototypes do not adapt the model. Each text is then put through a pretrained one once, and not in every episode
    that draws it.

    Args:
      config: of the run.
      learner: as `load_run` gives it, or `build`.
      params: its meta-parameters.
      *sources: of labelled texts; None stays None.

    Returns:
      `(learner, params, sources)`: as given, or of the features, on which the learner predicts the same.

    >>> from experiments.configs import prototypical_glyphs
    >>> on_features(prototypical_glyphs.get_config(), "learner", "params", "source")  # an image's depend on its batch
    ('learner', 'params', ('source',))
    """
    if config["learner"]["name"] != "prototypical" or not _begins_pretrained(config):
        return learner, params, sources
    model = _model({**config, "augment": {}}, None)  # without a key, all tokens are seen
    found = tuple(source and pretrained.features(model, params, source, cache=False) for source in sources)
    return _prototypical(config, _IDENTITY), {}, found


def load_config(workdir: str | pathlib.Path) -> dict[str, Any]:
    """Reads the resolved config of a run folder.

    Raises:
      ValueError: the folder holds no run.

    >>> load_config("no such folder")
    Traceback (most recent call last):
    ValueError: workdir must be the folder of a run, with a config.json in it, got 'no such folder'
    """
    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        raise ValueError(f"workdir must be the folder of a run, with a config.json in it, got {str(workdir)!r}")
    return json.loads(path.read_text(encoding="utf-8"))


def load_run(
    workdir: str | pathlib.Path, *, checkpoint: str = "last", config: Config | None = None, inputs: Any = None
) -> tuple[Learner, Params]:
    """Loads a trained learner.

    Args:
      workdir: a run folder of `experiments.train`.
      checkpoint: "last" or "best" (by validation), or "start": the pretrained weights that the run began with, or what
        it took of the run that `init` names.
      config: instead of that of the run; what is changed must leave the parameters as they are, but for "start".
      inputs: an example of them `[n, ...]`, from which "start" makes the parameters over a frozen model.

    Returns:
      The learner and its meta-parameters (NumPy arrays), ready for `learner.adapt(params, support)`.

    Raises:
      ValueError: the folder holds no run or no such checkpoint, or a frozen model has other weights than in training.

    >>> load_run("no such folder")
    Traceback (most recent call last):
    ValueError: workdir must be the folder of a run, with a config.json in it, got 'no such folder'
    """
    _validate.one_of("checkpoint", checkpoint, ("last", "best", "start"))
    config = load_config(workdir) if config is None else config
    experiment = build(config)
    if checkpoint == "start":
        if inputs is None and (_is_frozen(config) or config["learner"]["name"] == "finetune"):
            raise ValueError("inputs must be given for the start of a frozen model or of finetune, got None")
        if _is_frozen(config):
            params = experiment.learner.init(jax.random.key(config["seed"]), inputs)
        elif experiment.start is not None:
            params = experiment.start(inputs)
        else:
            raise ValueError("checkpoint must be 'last' or 'best' for a run on no pretrained weights, got 'start'")
        if config.get("init"):
            params = begin_with(config["init"], params, base=_data.weights_sha256(config)).params
        return experiment.learner, jax.tree.map(np.asarray, params)
    _data.check_base(workdir, config)
    own = load_config(workdir)  # as it was trained, but for the place of its weights
    own["model"] = {**own["model"], "path": config["model"].get("path", "")}
    base = _data.base_sha256(own)
    params, _ = _checkpoint.restore_params(pathlib.Path(workdir) / "checkpoints", kind=checkpoint, base=base)
    begun = build(own)
    if begun.beside and begun.start is not None:
        params = _tree.merge(params, jax.tree.map(np.asarray, begun.split(begun.start(inputs))[1]))
    return experiment.learner, params
