"""Values of a config: what an annotation accepts, and parts of the user's own that a text names."""

from __future__ import annotations

import collections.abc
import hashlib
import importlib
import importlib.util
import pathlib
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from metajax.core import Dtype

_NUMBERS = (jax.Array, np.ndarray, np.bool_, np.number)  # parts of optax's types of numbers


def plain(value: Any) -> Any:
    """A copy with plain dictionaries for mappings, so that what a file holds is never changed.

    >>> plain(ConfigDict({"a": (1, 2)}))
    {'a': (1, 2)}
    """
    if isinstance(value, ConfigDict):
        return plain(value.to_dict())
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list) else value


def options(annotation: Any) -> list[Any]:
    """The members of a union, or the type itself.

    >>> options(int | None)
    [<class 'int'>, <class 'NoneType'>]
    """
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [part for member in typing.get_args(annotation) for part in options(member)]
    return [annotation]


def item_of(annotation: Any) -> Any:
    """The type of the items where a sequence is accepted, else None.

    >>> item_of(tuple[int, ...] | None)
    <class 'int'>
    """
    for option in options(annotation):
        origin, items = typing.get_origin(option), typing.get_args(option)
        if origin in (tuple, list, collections.abc.Sequence) and items:
            return items[0]
    return None


def described(annotation: Any) -> str:
    """What errors call the values of a type.

    >>> described(Literal["a", "b"] | None), described(float | None), described(tuple[int, ...])
    ("one of 'a', 'b', or None", 'a number, or None', 'a sequence of an integer')
    """
    found = []
    for option in options(annotation):
        origin = typing.get_origin(option)
        if origin is Literal:
            found.append("one of " + ", ".join(map(repr, typing.get_args(option))))
        elif option in _NAMES:
            found.append(_NAMES[option])
        elif item_of(option) is not None:
            found.append(f"a sequence of {described(item_of(option))}")
        elif option in (types.NoneType, None):
            found.append("None")
        elif origin is collections.abc.Callable or _is_protocol(option):
            found.append("MODULE:FUNCTION")
        elif option == Dtype:
            found.append("the name of a dtype")
        elif isinstance(option, type) and option not in _NUMBERS:
            found.append(f"a section that makes a {option.__name__}")
    return ", or ".join(dict.fromkeys(found)) or "a value"


_NAMES: dict[Any, str] = {
    bool: "True or False", int: "an integer", float: "a number", str: "a text", dict: "a mapping",
}  # fmt: skip


def converted(annotation: Any, value: Any, where: str) -> Any:
    """The value as the annotation has it: tuples for lists, floats for integers, functions for their names.

    Raises:
      ValueError: the annotation does not accept it.

    >>> converted(int, "3", "inner.steps")
    Traceback (most recent call last):
    ValueError: inner.steps must be an integer, got '3'
    """
    for option in options(annotation):
        fits, found = _as(option, value, where)
        if fits:
            return found
    raise ValueError(f"{where} must be {described(annotation)}, got {value!r}")


def _as(option: Any, value: Any, where: str) -> tuple[bool, Any]:
    """Whether one option accepts a value, and the value for it."""
    origin = typing.get_origin(option)
    if option == Dtype:
        try:
            return True, jnp.dtype(value)
        except TypeError:
            return False, None
    if origin is Annotated:
        return _as(typing.get_args(option)[0], value, where)
    if origin is Literal:
        return value in typing.get_args(option) and type(value) in map(type, typing.get_args(option)), value
    if origin in (tuple, list, collections.abc.Sequence):
        if not isinstance(value, list | tuple):
            return False, None
        item = item_of(option)
        return True, tuple(
            part if item is None else converted(item, part, f"{where}[{place}]") for place, part in enumerate(value)
        )
    if origin in (collections.abc.Mapping, dict):
        return isinstance(value, Mapping), dict(value) if isinstance(value, Mapping) else None
    if origin is collections.abc.Callable or _is_protocol(option):
        if isinstance(value, str) and ":" in value:
            return True, load(value, where)
        return callable(value) and not isinstance(value, type), value
    if option is float or option in _NUMBERS:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number, float(value) if number and option is float else value
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if option in (None, types.NoneType):
        return value is None, None
    if option is Any:
        return True, tuple(value) if isinstance(value, list) else value
    return isinstance(option, type) and isinstance(value, option), value


def _is_protocol(option: Any) -> bool:
    return isinstance(option, type) and getattr(option, "_is_protocol", False) and "__call__" in vars(option)


def load(name: str, where: str) -> Callable[..., Any]:
    """The function that "module:function" names; the module may lie beside the config file.

    Raises:
      ValueError: there is no such module, or no such function in it.

    >>> load("math:sqrt", "learner.loss")(4.0)
    2.0
    >>> load("math:squirt", "learner.loss")
    Traceback (most recent call last):
    ValueError: learner.loss must name a function of the module math, got 'math:squirt'
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{where} must name a module beside the config file, or an installed one, got {name!r}: {error}"
        ) from error
    if not callable(found):
        raise ValueError(f"{where} must name a function of the module {module}, got {name!r}")
    return found


def own_parts(section: Any) -> dict[str, str]:
    """A hash of the file of each part of the user's own that a config names, by "module:function".

    >>> own_parts({"learner": {"name": "maml", "loss": "sys:exit"}})
    {}
    """
    if isinstance(section, Mapping):
        return {name: digest for value in section.values() for name, digest in own_parts(value).items()}
    if isinstance(section, list | tuple):
        return {name: digest for value in section for name, digest in own_parts(value).items()}
    if not isinstance(section, str) or not section.replace(".", "").replace(":", "").isidentifier():
        return {}
    module = section.partition(":")[0]
    if ":" not in section:
        return {}
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return {}
    if spec is None or not spec.has_location or spec.origin is None or not pathlib.Path(spec.origin).is_file():
        return {}
    return {section: hashlib.sha256(pathlib.Path(spec.origin).read_bytes()).hexdigest()}


def beside(folder: pathlib.Path) -> None:
    """Lets modules of a folder be imported, those of a config file's own folder."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
