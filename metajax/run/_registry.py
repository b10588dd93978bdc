"""Sections of a config: a section names a factory and holds its arguments.

A factory is a public function whose return annotation is the type of the section. Its signature says which fields the
section has, of which types, with which defaults. No list of factories is kept by hand.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import optax

from metajax import adapters, data, hypergrad, inner, learners, models, pretrained, replay
from metajax.core import Features, Hypergrad, Learner, Model, TaskType
from metajax.run import _values

INJECTED = (Model, Features, TaskType, Learner)  # types of arguments that other sections make
KNOWN = "@"  # begins a value that is known only when a run is built: "@steps"


class Kind(NamedTuple):
    """A kind of section.

    Attributes:
      types: what its factories return, or subclasses of it.
      rooms: modules whose public functions are looked through, the first one that has a name decides.
      wraps: whether the factories take what they return, such as adapters of a model.

    >>> KINDS["learner"].types[0].__name__
    'Learner'
    """

    types: tuple[Any, ...]
    rooms: tuple[types.ModuleType, ...]
    wraps: bool = False


KINDS = {
    "learner": Kind((Learner,), (learners,)),
    "hypergrad": Kind((Hypergrad,), (hypergrad,)),
    "model": Kind((Model,), (models, pretrained)),
    "wrap": Kind((Model,), (adapters, models), wraps=True),
    "source": Kind((data.Source, data.ClassSource), (data,)),
    "transform": Kind((data.Transform,), (data,)),
    "memory": Kind((replay.Memory,), (replay,)),
    # of a learner; the rules that can be differentiated twice come first
    "inner": Kind((optax.GradientTransformation,), (inner, optax, optax.contrib)),
    "optimizer": Kind((optax.GradientTransformation,), (optax, optax.contrib)),
    "schedule": Kind((optax.Schedule,), (optax,)),
}


class Argument(NamedTuple):
    """An argument of a factory.

    Attributes:
      type: its annotation.
      default: `inspect.Parameter.empty` where it must be given.

    >>> arguments(learners.maml)["num_steps"].default
    1
    """

    type: Any
    default: Any


@functools.cache
def factories(kind: str) -> dict[str, Callable[..., Any]]:
    """The factories of a kind by name; names that two modules share are also there as "module.name".

    >>> "maml" in factories("learner"), "maml" in factories("model")
    (True, False)
    """
    found: dict[str, Callable[..., Any]] = {}
    for room in KINDS[kind].rooms:
        for name in getattr(room, "__all__", list(vars(room))):
            function = vars(room).get(name)  # not what a module only gives with a warning
            if name.startswith("_") or not inspect.isfunction(function) or not _makes(function, KINDS[kind]):
                continue
            found.setdefault(name, function)
            found[f"{room.__name__.rpartition('.')[2]}.{name}"] = function
    return found


def _makes(function: Callable[..., Any], kind: Kind) -> bool:
    return _is_of(_hints(function).get("return"), kind) and (not kind.wraps or _wrapped(function) is not None)


def _is_of(annotation: Any, kind: Kind) -> bool:
    """Whether a type is one of a kind, or a subclass of one (also of a protocol that it does not check)."""
    return any(annotation == each or each in getattr(annotation, "__mro__", ()) for each in kind.types)


def _wrapped(function: Callable[..., Any]) -> str | None:
    """The argument of a factory that wraps a model: its first one, if it is a model."""
    first = next(iter(arguments(function).items()), None)
    return first[0] if first is not None and first[1].type in (Model, Features) else None


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The resolved annotations; `Any` for one that cannot be resolved."""
    hints: dict[str, Any] = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        one = types.SimpleNamespace(__annotations__={name: annotation})
        try:
            found = typing.get_type_hints(one, getattr(function, "__globals__", {}), include_extras=True)
        except (AttributeError, NameError, TypeError):
            found = {name: Any}
        hints |= found
    return hints


@functools.cache
def arguments(function: Callable[..., Any]) -> dict[str, Argument]:
    """The arguments of a factory by name, in order; those of `*parts` are the entry "*"."""
    hints = _hints(function)
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        starred = parameter.kind is inspect.Parameter.VAR_POSITIONAL
        found["*" if starred else name] = Argument(hints.get(name, Any), parameter.default)
    return found


def factory(kind: str, name: Any, where: str) -> Callable[..., Any]:
    """The factory that a section names: one of the kind, or "module:function" of the user's own.

    Raises:
      ValueError: there is none.

    >>> factory("learner", "mamml", "learner")
    Traceback (most recent call last):
    ValueError: learner.name must be one of bayesian, ... or MODULE:FUNCTION, got 'mamml'; did you mean 'maml'?
    """
    known = factories(kind)
    if isinstance(name, str) and name in known:
        return known[name]
    if isinstance(name, str) and ":" in name:
        return _values.load(name, f"{where}.name")
    plain = sorted(each for each in known if "." not in each)
    raise ValueError(
        f"{where}.name must be one of {', '.join(plain)}, or MODULE:FUNCTION, got {name!r}{nearest(name, plain)}"
    )


def nearest(name: Any, known: Sequence[str]) -> str:
    """What errors add where a known name is near.

    >>> nearest("mamml", ["maml", "reptile"])
    "; did you mean 'maml'?"
    """
    close = difflib.get_close_matches(str(name), known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def fields(kind: str, section: Mapping[str, Any], where: str) -> dict[str, Argument]:
    """The fields that a section may have beside its name: arguments that are not given by other sections.

    Raises:
      ValueError: it has others, or names no factory; the error has the nearest name.
    """
    section = _values.plain(section)
    if not isinstance(section, Mapping) or "name" not in section:
        raise ValueError(f"{where} must be a section with the name of a factory, got {section!r}")
    function = factory(kind, section["name"], where)
    taken = {name: argument for name, argument in arguments(function).items() if name != "name"}
    if KINDS[kind].wraps:
        del taken[typing.cast(str, _wrapped(function))]
    taken = {name: argument for name, argument in taken.items() if name != "split" and argument.type is not Learner}
    for name in section:
        if name != "name" and name not in taken and "*" not in taken:
            raise ValueError(
                f"{where}.{name} is no argument of {section['name']}, which takes "
                f"{', '.join(sorted(taken)) or 'none'}, got {section[name]!r}{nearest(name, list(taken))}"
            )
    return taken


def make(kind: str, section: Mapping[str, Any], where: str, known: Mapping[Any, Any]) -> Any:
    """Calls the factory that a section names.

    Args:
      kind: of the section.
      section: `{"name": ..., **arguments}`. None leaves an argument at its default; a text "@name" is a value of
        `known`; a mapping with a name is a section itself.
      where: what errors call the section.
      known: values that are known only when a run is built, by name, and those that other sections make, by type. An
        argument that the section leaves out is taken from there.

    Raises:
      ValueError: the section does not fit the factory, or the factory refuses a value; the error names the field.

    >>> make("learner", {"name": "prototypical", "distance": "cosine"}, "learner", {Features: models.mlp(4)}).problem
    >>> make("learner", {"name": "maml"}, "learner", {Model: models.mlp(4)})
    Traceback (most recent call last):
    ValueError: learner.inner must be given for maml
    """
    section = _values.plain(section)
    taken = fields(kind, section, where)
    function = factory(kind, section["name"], where)
    given: dict[str, Any] = {}
    if KINDS[kind].wraps:
        given[typing.cast(str, _wrapped(function))] = known[Model]
    if "split" in arguments(function):
        given["split"] = known["split"]
    for name, argument in taken.items():
        if name == "*":
            continue
        value = section.get(name)
        if value is None:
            value = _found(name, argument, known)
        else:
            value = convert(argument.type, value, f"{where}.{name}", known, kind)
        if value is not None:
            given[name] = value
        elif argument.default is inspect.Parameter.empty:
            raise ValueError(f"{where}.{name} must be given for {section['name']}")
    parts = [
        convert(taken["*"].type, value, f"{where}.{name}", known, kind)
        for name, value in section.items()
        if "*" in taken and name not in ("name", *taken) and value is not None
    ]
    try:
        return function(*parts, **given)
    except ValueError as error:
        message = str(error)
        named = message.split(" ", 1)[0] in given
        raise ValueError(f"{where}.{message}" if named else f"{where}: {message}") from error


def _found(name: str, argument: Argument, known: Mapping[Any, Any]) -> Any:
    """What another section, or the run, gives an argument that a section leaves out."""
    for option in _values.options(argument.type):
        if option in (Model, Features, TaskType) and option in known:
            return known[option]
    return known.get(name)


def reads_features(kind: str, section: Mapping[str, Any], where: str) -> bool:
    """Whether the factory of a section takes a model whose outputs are features, and not those of the task.

    >>> reads_features("learner", {"name": "prototypical"}, ""), reads_features("learner", {"name": "maml"}, "")
    (True, False)
    """
    return any(
        option is Features or option == Features
        for argument in arguments(factory(kind, section["name"], where)).values()
        for option in _values.options(argument.type)
    )


def kind_of(annotation: Any, parent: str | None = None) -> str | None:
    """The kind of a section that stands in the place of an argument of this type; None where it takes none.

    >>> kind_of(optax.ScalarOrSchedule), kind_of(int), kind_of(optax.GradientTransformation, "optimizer")
    ('schedule', None, 'optimizer')
    """
    for option in _values.options(annotation):
        option = Model if option == Features else option
        for name, kind in KINDS.items():
            if not kind.wraps and _is_of(option, kind):
                return parent if parent is not None and KINDS[parent].types == kind.types else name
    return None


def convert(annotation: Any, value: Any, where: str, known: Mapping[Any, Any], parent: str | None = None) -> Any:
    """A value of a config as an argument of this type.

    Raises:
      ValueError: it is of another type.

    >>> convert(float | None, 1, "learner.scale", {}), convert(tuple[int, ...], [1, 2], "model.hidden", {})
    (1.0, (1, 2))
    """
    if isinstance(value, str) and value.startswith(KNOWN):
        if value[1:] not in known:
            names = sorted(f"{KNOWN}{name}" for name in known if isinstance(name, str))
            raise ValueError(f"{where} must be a value or one of {', '.join(names)}, got {value!r}")
        return known[value[1:]]
    kind = kind_of(annotation, parent) if isinstance(value, Mapping) else None
    if kind is not None:
        return make_list(kind, value, where, known)
    if isinstance(value, Mapping) and "name" in value:
        raise ValueError(f"{where} must be {_values.described(annotation)}, got a section {dict(value)}")
    item = _values.item_of(annotation)
    if item is not None and isinstance(value, list | tuple) and any(isinstance(part, Mapping) for part in value):
        return tuple(convert(item, part, f"{where}[{place}]", known, parent) for place, part in enumerate(value))
    return _values.converted(annotation, value, where)


def make_list(kind: str, section: Mapping[str, Any], where: str, known: Mapping[Any, Any]) -> Any:
    """Makes a section, or a list of sections of optax as `optax.chain`.

    >>> parts = {"clip": {"name": "clip", "max_delta": 1.0}, "sgd": {"name": "sgd", "learning_rate": 0.1}}
    >>> isinstance(make_list("optimizer", parts, "optimizer", {}), optax.GradientTransformation)
    True
    """
    section = _values.plain(section)
    if "name" in section:
        return make(kind, section, where, known)
    return optax.chain(
        *(make(kind, part, f"{where}.{name}", known) for name, part in parts(section) if part is not None)
    )


def parts(section: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The sections of a list, by name, in order; a part that a flag set to None is left out.

    >>> parts({"order": ("clip", "sgd"), "sgd": 2, "clip": 1})
    [('clip', 1), ('sgd', 2)]
    """
    names = section.get("order") or [name for name in section if name != "order"]
    return [(name, section[name]) for name in names if name in section]
