"""Configs: which sections there are, what stands in them by default, and how a config file is read."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import pathlib
import traceback
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict

from metajax.core import Dtype
from metajax.run import _registry, _values

VERSION = 1
# sections of a factory, and the kind of it; one that may be None has None as its default
KINDS = {
    "data": "source", "augment": "transform", "model": "model", "wrap": "wrap", "learner": "learner",
    "deployed": "learner", "hypergrad": "hypergrad", "optimizer": "optimizer",
}  # fmt: skip


def defaults() -> dict[str, Any]:
    """Every section and field, before what a config file says.

    >>> defaults()["training"]["steps"]
    1000
    """
    episode = {"ways": 5, "shots": 1, "queries": 15, "hierarchical": False}
    return {
        "config_version": VERSION,
        "seed": 0,
        # run folder whose network this run begins with; heads that do not fit are made anew
        "init": _text(),
        "data": {"name": "glyphs"},
        # arguments of the source that differ in the splits of validation and test
        "val_data": {},
        "test_data": {},
        # who draws what is trained on: "pipeline" (tf.data on the host), "device", or "batches" (of examples of all
        # classes, for learners that train on no episodes)
        "sampler": "pipeline",
        "min_examples": 0,  # classes of fewer examples are left out
        "augment": None,  # a transform of training images, or a list of them
        # whether a pretrained model is not trained: its features of the data are computed once, and kept
        "frozen": False,
        "model": {"name": "conv4", "pool": False},
        "wrap": {},  # what stands around the model, the first one inside: adapters, hidden words
        "learner": {"name": "prototypical"},
        # the learner that is evaluated and deployed, where it is another one: a section, or arguments that differ
        "deployed": None,
        "hypergrad": {"name": "mixed_mode"},
        "optimizer": [
            {"name": "clip_by_global_norm", "max_norm": 10.0},
            {
                "name": "adam",
                "learning_rate": {"name": "cosine_decay_schedule", "init_value": 1e-3, "decay_steps": "@steps"},
            },
        ],
        "episode": episode,  # of validation and evaluation; (5, 20) draws a number
        "train_episode": {name: _any() for name in episode},  # None: as episode
        "training": {
            "steps": 1000,
            "meta_batch": 4,  # tasks in a step; examples where the sampler gives batches
            "average": 0.0,  # share that stays in a step of an average of the meta-parameters, which is evaluated
            "trainable": _text(),  # path regex of what is meta-trained
            "task_batching": "auto",  # how a device runs its tasks: auto, vmap, scan, or tasks at a time, as "4"
        },
        # stages before the last one: until=(200, 500) ways=(5, 10) takes 5 classes until step 200 and 10 until 500
        "curriculum": {"until": (), "ways": (), "shots": (), "size": ()},
        # count tasks of earlier steps come again in each step, from a memory of capacity tasks (0: none): a sample
        # of all so far, or with by_loss the newest, those of higher loss more often
        "replay": {"capacity": 0, "count": 4, "by_loss": False},
        # devices: that take different tasks, that divide parameters as well, that divide the work of a task; -1: what
        # is left. rules: pairs such as ("dense/kernel", (None, "fsdp")). A run may go on with other ones.
        "mesh": {"task": -1, "fsdp": 1, "model": 1, "rules": ()},
        "watch": {
            "nonfinite": "stop",  # a step whose loss or hypergradient is not finite: stop, or skip
            "skip_limit": 100,  # skipped steps in a row that end the run
            "spike": "off",  # a loss far above those before: off, count, stop, rollback (to the last checkpoint)
            "window": 100,  # losses before it that it is compared with
            "factor": 10.0,  # spreads above their median
            "rollbacks": 3,  # spikes after which a run is given up
            "heartbeat": 10.0,  # seconds between writings of heartbeat.json
            "stall": 0.0,  # seconds without a step that end a process; 0: 1800 among several processes, else never
        },
        "log": {"every": 20, "before": False},  # before: also measure the query before adaptation
        "validation": {"every": 500, "episodes": 100},
        "evaluation": {"episodes": 600, "seed": 0, "num_steps": config_dict.placeholder(int)},
        "checkpoint": {"every": 500},
    }


def _text() -> Any:
    return config_dict.placeholder(str)


def _any() -> Any:
    return config_dict.placeholder(object)


def complete(given: Mapping[str, Any], select: str = "") -> ConfigDict:
    """A whole config: defaults, what a file gives, and the sections that `select` names, each with all its fields.

    Args:
      given: sections and fields. A section without a name changes fields of the default one.
      select: such as "learner=maml,learner.inner=sgd": sections by path, with the name of the factory.

    Raises:
      ValueError: there is no such section, factory or argument; the error has the nearest name.

    >>> complete({"learner": {"name": "maml"}}, "learner.inner=sgd").learner.num_steps
    1
    """
    whole = defaults()
    parts: dict[str, Any] = _values.plain(given)
    version = parts.pop("config_version", VERSION)
    if version != VERSION:
        raise ValueError(f"config_version must be {VERSION}, the version of this metajax, got {version!r}")
    for name, value in parts.items():
        if name not in whole:
            raise ValueError(f"config has no section {name!r}{_registry.nearest(name, list(whole))}")
        if name in KINDS and name != "deployed" and whole[name] and _is_change(value):
            whole[name] = merged(_values.plain(ConfigDict(expand(KINDS[name], whole[name], name))), value, name)
            continue
        if name in KINDS or name in ("val_data", "test_data") or not isinstance(whole[name], dict):
            whole[name] = value
            continue
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} must be a section, got {value!r}")
        for field, part in value.items():
            if field not in whole[name]:
                raise ValueError(f"{name} has no field {field!r}{_registry.nearest(field, list(whole[name]))}")
            whole[name][field] = part
    for choice in filter(None, select.split(",")):
        _select(whole, choice)
    for name, kind in KINDS.items():
        if name == "deployed" and isinstance(whole[name], Mapping) and "name" not in whole[name]:
            continue  # arguments that differ
        if whole[name] is not None:
            whole[name] = expand(kind, whole[name], name)
    for name in ("val_data", "test_data"):
        whole[name] = {field: _any() if value is None else value for field, value in whole[name].items()}
    return ConfigDict(whole, convert_dict=True)


def merged(section: dict[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A section with other values of some of its fields, nested ones too.

    Raises:
      ValueError: it has no such field.

    >>> merged({"name": "maml", "inner": {"name": "sgd", "learning_rate": 0.4}}, {"inner": {"learning_rate": 1.0}}, "")
    {'name': 'maml', 'inner': {'name': 'sgd', 'learning_rate': 1.0}}
    """
    for name, value in changes.items():
        if name not in section:
            raise ValueError(f"{where} has no field {name!r}{_registry.nearest(name, list(section))}")
        nested = isinstance(value, Mapping) and "name" not in value and isinstance(section[name], dict)
        section = section | {name: merged(section[name], value, f"{where}.{name}") if nested else value}
    return section


def _kind_at(whole: Mapping[str, Any], path: Sequence[str]) -> str | None:
    """The kind of the section at a path, None where no section may stand.

    Raises:
      ValueError: there is nothing at the path.
    """
    kind, section = KINDS.get(path[0]), whole.get(path[0])
    for place, name in enumerate(path[1:], 1):
        where = ".".join(path[:place])
        if kind is None or not isinstance(section, Mapping | list):
            raise ValueError(f"config has no section {where}, got {'.'.join(path)!r}")
        if isinstance(section, Mapping) and not is_list(section):
            taken = _registry.fields(kind, section, where)
            if name not in taken:
                raise ValueError(
                    f"{where}.{name} is no argument of {section['name']}, which takes {', '.join(sorted(taken))}"
                    f"{_registry.nearest(name, list(taken))}"
                )
            kind = _registry.kind_of(taken[name].type, kind)
        section = section.get(name) if isinstance(section, Mapping) else None
    return kind


def _select(whole: dict[str, Any], choice: str) -> None:
    path, equals, name = choice.partition("=")
    *parents, last = path.split(".")
    section: Any = whole
    for parent in parents:
        section = section.get(parent) if isinstance(section, dict) else None
    if not equals or not isinstance(section, dict) or _kind_at(whole, path.split(".")) is None:
        raise ValueError(f"config must be FILE:SECTION=NAME,... with sections of {', '.join(KINDS)}, got {choice!r}")
    section[last] = [{"name": name}] if path == "wrap" else {"name": name}


def expand(kind: str, section: Any, where: str) -> dict[str, Any]:
    """A section with all its fields; a list of sections as a mapping by their names, with their `order`.

    Fields are the arguments that a text can give. A default that is none of a config (a function) is None there.

    Raises:
      ValueError: as `metajax.run` says of a section.

    >>> sorted(expand("hypergrad", {"name": "mixed_mode"}, "hypergrad"))
    ['every', 'name', 'step_weights', 'unroll']
    """
    if isinstance(section, list | tuple):
        named: dict[str, Any] = {}
        for part in section:
            if not isinstance(part, Mapping) or "name" not in part:
                raise ValueError(f"{where} must be a list of sections with names, got {part!r}")
            key = part["name"].rpartition(".")[2].rpartition(":")[2]
            while key in named:
                key += "_"
            named[key] = part
        section = named
    if is_list(section):
        parts = {name: part and expand(kind, part, f"{where}.{name}") for name, part in _registry.parts(section)}
        return {"order": tuple(parts), **parts}
    taken = _registry.fields(kind, section, where)
    found: dict[str, Any] = {"name": section["name"]}
    for name, argument in taken.items():
        if name == "*":
            continue
        nested = _registry.kind_of(argument.type, kind)
        value = section.get(name)
        if isinstance(value, Mapping | list) and nested and (isinstance(value, list) or _has_sections(value)):
            found[name] = expand(nested, value, f"{where}.{name}")
        elif name in section:
            found[name] = _field(argument, value)
        elif not _given(argument):
            found[name] = _field(argument, None)
    return found


def value_of(text: Any) -> Any:
    """A text of a flag as the Python literal that it is, or as it stands.

    >>> value_of("(5, 20)"), value_of("none of these")
    ((5, 20), 'none of these')
    """
    try:
        return ast.literal_eval(text)
    except (SyntaxError, TypeError, ValueError):
        return text


def changed(config: ConfigDict, settings: Sequence[str]) -> ConfigDict:
    """A config with other values of some fields; another name of a factory brings its own fields.

    Args:
      config: a whole config.
      settings: texts such as "learner.num_steps=5", "learner.name=finetune", "learner.inner=adam", "wrap.lora=None".

    Raises:
      ValueError: a text is no such setting, or the config has no such field.

    >>> changed(complete({}), ["learner.distance=cosine"]).learner.distance
    'cosine'
    """
    for setting in settings:
        raw, (path, equals, text) = _values.plain(config), setting.partition("=")
        path = path.removesuffix(".name")
        *parents, last = path.split(".")
        section: Any = raw
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if not equals or not isinstance(section, dict) or last not in section:
            raise ValueError(f"override must be FIELD=VALUE of a field of the run's config, got {setting!r}")
        value, plain = value_of(text), len(parents) and parents[0] not in KINDS
        if isinstance(value, str) and ":" not in value and not plain and _kind_at(raw, [*parents, last]) is not None:
            value = {"name": value}
        section[last] = value
        config = complete(raw)
    return config


def is_list(section: Any) -> bool:
    """Whether a section is a list of sections, kept as a mapping by their names.

    >>> is_list({"sgd": {"name": "sgd"}}), is_list({"name": "sgd"})
    (True, False)
    """
    return isinstance(section, Mapping) and "name" not in section


def _is_change(value: Any) -> bool:
    """Whether what a file gives for a section changes fields of the default one."""
    return isinstance(value, Mapping) and bool(value) and not _has_sections(value)


def _has_sections(value: Mapping[str, Any]) -> bool:
    return "name" in value or any(isinstance(part, Mapping) and "name" in part for part in value.values())


def _given(argument: _registry.Argument) -> bool:
    """Whether other sections always give an argument."""
    return any(option in _registry.INJECTED for option in _values.options(argument.type))


def _field(argument: _registry.Argument, value: Any) -> Any:
    """A field with the type of an argument, so that a flag can set it also where it is None."""
    default = None if argument.default is inspect.Parameter.empty else argument.default
    if argument.type == Dtype:
        default = None if default is None else getattr(default, "__name__", str(default))
        return config_dict.FieldReference(value if value is not None else default, field_type=str)
    default = default if isinstance(default, bool | int | float | str | tuple) else None
    value = default if value is None else value
    options = [option for option in _values.options(argument.type) if option is not type(None)]
    plain = options[0] if len(options) == 1 else object
    if typing.get_origin(plain) is typing.Literal:
        kinds = {type(each) for each in typing.get_args(plain)}
        plain = kinds.pop() if len(kinds) == 1 else object
    if typing.get_origin(plain) in (tuple,) or _values.item_of(plain) is not None:
        plain, value = tuple, tuple(value) if isinstance(value, list) else value
    known = isinstance(value, str) and value.startswith(_registry.KNOWN)
    if isinstance(value, Mapping):
        return dict(value)
    if plain not in (bool, int, float, str, tuple) or known or not isinstance(value, plain | type(None)):
        plain = object
    return config_dict.FieldReference(value, field_type=plain)


def load(path: str | pathlib.Path, select: str = "") -> ConfigDict:
    """Reads a config file: a Python file with a function `get_config()` that returns sections.

    Modules beside the file can be imported, so that a section may name a part of the user's own as "module:function".

    Raises:
      ValueError: there is no such file, it has a syntax error or no `get_config`, or that raises; or its config does
        not fit.

    >>> load("no/such/file.py")
    Traceback (most recent call last):
    ValueError: config must be a Python file, got 'no/such/file.py'
    """
    file = pathlib.Path(path)
    if not file.is_file() or file.suffix != ".py":
        raise ValueError(f"config must be a Python file, got {str(path)!r}")
    _values.beside(file.resolve().parent)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"config file {str(path)!r} cannot be read: {_told(error, file)}") from error
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ValueError(f"config file {str(path)!r} must have a function get_config() that returns sections")
    variants = len(inspect.signature(get_config).parameters) > 0
    chosen = [part for part in select.split(",") if part]
    variant = [part for part in chosen if "=" not in part]
    if variant and not variants:
        raise ValueError(f"config file {str(path)!r} has no variants, got {variant[0]!r}")
    try:
        given = get_config(*variant[:1]) if variants else get_config()
    except Exception as error:
        raise ValueError(f"get_config of {str(path)!r} failed: {_told(error, file)}") from error
    if not isinstance(given, Mapping | ConfigDict):
        raise ValueError(f"get_config of {str(path)!r} must return sections by name, got {given!r}")
    return complete(given, ",".join(part for part in chosen if "=" in part))


def _told(error: Exception, file: pathlib.Path) -> str:
    """An error of a config file in one line, with the line of the file."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    place = f"line {lines[-1]}: " if lines else ""
    return f"{place}{type(error).__name__}: {error}"


def resolved(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """A config as JSON holds it: tuples are lists.

    >>> resolved(complete({}))["training"]["steps"]
    1000
    """
    return json.loads(json.dumps(_values.plain(config)))
