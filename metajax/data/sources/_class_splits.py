"""Divides classes into training, validation and test classes."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from metajax.core import _validate
from metajax.data._source import SPLITS

Splits = Mapping[str, Sequence[str]] | Mapping[str, float] | str

_SHARES = {"train": 0.64, "val": 0.16, "test": 0.20}  # as in miniImageNet and CIFAR-FS (64, 16 and 20 of 100)


def divide(names: Collection[str], split: str, splits: Splits | None, where: str) -> list[str]:
    """Returns the classes of one split, sorted.

    Shares divide the names in the order of their SHA-256, so that neighbours in the alphabet are not kept together and
    every machine gets the same result. Each split with a share has at least one class. Lists may leave classes out. A
    name without an exact match refers to the class with the same letters and digits, ignoring case and a leading number
    (`001.Black_footed_Albatross`).

    Args:
      names: all classes.
      split: "train", "val" or "test".
      splits: class names by split (`{"train": ["cat", "dog"], "test": ["owl"]}`), or shares that sum to 1
        (`{"train": 0.8, "test": 0.2}`), or the name of published lists (see `class_lists`), or None for 64 % train,
        16 % val and 20 % test.
      where: the place of the classes in error messages.

    Raises:
      ValueError: a class is in two lists or does not exist, shares do not sum to 1, or the split is empty.

    >>> names = [f"class {n}" for n in range(10)]
    >>> divide(names, "test", {"train": 0.8, "test": 0.2}, "here")
    ['class 4', 'class 7']
    >>> divide(["red-fox", "Owl"], "train", {"train": ["Red fox"], "test": ["owl"]}, "here")
    ['red-fox']
    """
    _validate.one_of("split", split, SPLITS)
    if splits is None:
        splits = _SHARES
    if isinstance(splits, str):
        from metajax.data.sources._published import class_lists  # here, since it imports this module

        splits = class_lists(splits)
    if not isinstance(splits, Mapping) or not splits:
        raise ValueError(f"splits must map splits to class names or to shares, got {splits!r}")
    for key in splits:
        _validate.one_of("a key of splits", key, SPLITS)
    shares = [isinstance(value, int | float) and not isinstance(value, bool) for value in splits.values()]
    if any(shares):
        if not all(shares):
            raise ValueError(f"splits must hold lists of class names or shares, not both, got {dict(splits)!r}")
        return _shared(names, split, dict[str, Any](splits), where)
    return _listed(names, split, dict[str, Any](splits), where)


def _shared(names: Collection[str], split: str, shares: dict[str, float], where: str) -> list[str]:
    for key, share in shares.items():
        _validate.positive_float(f"splits[{key!r}]", share)
    if not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        raise ValueError(f"shares in splits must sum to 1, got {shares}, which sum to {sum(shares.values())}")
    if split not in shares:
        raise ValueError(f"splits must name a share for split {split!r}, got {shares}")
    if len(names) < len(shares):
        raise ValueError(
            f"{where} has {len(names)} class(es); dividing them into {', '.join(shares)} takes at least "
            f"{len(shares)}: give splits={{{split!r}: [class names]}}"
        )
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    # the largest share takes the remainder of the rounding
    largest = max(shares, key=lambda key: shares[key])
    sizes = {key: max(1, round(share * len(order))) for key, share in shares.items() if key != largest}
    while sum(sizes.values()) >= len(order):  # few classes: each split keeps one
        sizes[max(sizes, key=lambda key: sizes[key])] -= 1
    sizes[largest] = len(order) - sum(sizes.values())
    first = 0
    for key in SPLITS:
        if key == split:
            return sorted(order[first : first + sizes[key]])
        first += sizes.get(key, 0)
    raise AssertionError(split)


def _listed(names: Collection[str], split: str, lists: dict[str, Sequence[str]], where: str) -> list[str]:
    by_letters: dict[str, list[str]] = {}
    for name in names:
        by_letters.setdefault(_letters(name), []).append(name)
    known, seen, chosen = set(names), dict[str, str](), list[str]()
    for key, listed in lists.items():
        missing = list[str]()
        if isinstance(listed, str) or not all(isinstance(name, str) for name in listed):
            raise ValueError(f"splits[{key!r}] must be a list of class names, got {listed!r}")
        for name in listed:
            alike = [name] if name in known else by_letters.get(_letters(name), [])
            if not alike:
                missing.append(name)
                continue
            if len(alike) > 1:
                choice = " or ".join(map(repr, sorted(alike)))
                raise ValueError(f"splits[{key!r}] names class {name!r}, which may be {choice} in {where}")
            if alike[0] in seen:
                raise ValueError(
                    f"splits names class {alike[0]!r} twice ({seen[alike[0]]}, {key}); splits must be disjoint"
                )
            seen[alike[0]] = key
            if key == split:
                chosen.append(alike[0])
        if missing:
            raise ValueError(
                f"{where} lacks {len(missing)} of the {len(listed)} classes that splits[{key!r}] names, "
                f"the first is {missing[0]!r}"
            )
    if not chosen:
        raise ValueError(f"splits must name classes for split {split!r}, got {_told(lists)}")
    return sorted(chosen)


def _told(lists: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{len(listed)} for {key!r}" for key, listed in lists.items())


def _letters(name: str) -> str:
    bare = re.sub(r"^\d+[^0-9a-zA-Z]+", "", name.casefold())
    return "".join(letter for letter in bare if letter.isalnum()) or name
