"""Selection of leaves by path, and the split of a tree into a differentiated part and the rest.

A path joins keys with a slash (`body/conv_0/kernel`). A split keeps the structure: each of the two trees has
None where the other has a leaf. JAX does not treat None as a leaf.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Where = str | Callable[[str], bool] | None


def paths(tree: PyTree) -> list[str]:
    """Returns the paths of the leaves, in leaf order.

    >>> paths({"body": {"kernel": 1}, "head": 2})
    ['body/kernel', 'head']
    """
    return [_path(path) for path, _ in jax.tree.leaves_with_path(tree)]


def map_with_path(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps `function(path, leaf, ...)` over a tree; if more than one tree is given, None counts as a leaf.

    >>> map_with_path(lambda path, leaf: f"{path}={leaf}", {"head": 2})
    {'head': 'head=2'}
    """
    is_leaf = _is_none if rest else None
    return jax.tree.map_with_path(lambda path, *leaves: function(_path(path), *leaves), tree, *rest, is_leaf=is_leaf)


def gaps(tree: PyTree) -> list[str]:
    """Returns the paths of the Nones.

    >>> gaps({"body": None, "head": 2})
    ['body']
    """
    return [_path(path) for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=_is_none) if leaf is None]


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def split(tree: PyTree, where: Where, *, name: str = "where") -> tuple[PyTree, PyTree]:
    """Splits `tree` into the leaves that `where` selects and the rest; `merge` reverses the split.

    Each of the two has None where the other has a leaf.

    Args:
      tree: any pytree.
      where: a regular expression searched in the path of each leaf, a predicate of the path, or None for all.
      name: name of the argument in error messages.

    Raises:
      ValueError: `where` selects no leaf, or is not a valid regular expression.

    >>> split({"body": 1, "head": 2}, "head")
    ({'body': None, 'head': 2}, {'body': 1, 'head': None})
    """
    if where is None:
        return tree, jax.tree.map(lambda _: None, tree)
    picks = _predicate(where, name)
    picked = jax.tree.map_with_path(lambda path, leaf: leaf if picks(_path(path)) else None, tree)
    if not jax.tree.leaves(picked):
        raise ValueError(f"{name} must pick at least one leaf, got {where!r}; paths: {', '.join(paths(tree))}")
    rest = jax.tree.map_with_path(lambda path, leaf: None if picks(_path(path)) else leaf, tree)
    return picked, rest


def _predicate(where: str | Callable[[str], bool], name: str) -> Callable[[str], bool]:
    if callable(where):
        return where
    try:
        pattern = re.compile(where)
    except re.error as error:
        raise ValueError(f"{name} must be a regular expression, got {where!r}: {error}") from error
    return lambda path: pattern.search(path) is not None


def fill(tree: PyTree, other: PyTree | None) -> PyTree:
    """Fills the Nones of `tree` from `other`; `other=None` returns `tree`.

    >>> fill({"body": None, "head": 2}, {"body": 1, "head": None})
    {'body': 1, 'head': 2}
    """
    if other is None:
        return tree
    return jax.tree.map(lambda a, b: b if a is None else a, tree, other, is_leaf=_is_none)


def _is_none(leaf: Any) -> bool:
    return leaf is None


def merge(params: PyTree, frozen: PyTree | None) -> PyTree:
    """Joins meta-parameters and their frozen base into one tree.

    Args:
      params: meta-parameters, such as `state.params`, with None where the base has a leaf.
      frozen: the base, with None where `params` has a leaf; or None if there is no base.

    Returns:
      The joined tree; no array is copied.

    Raises:
      ValueError: the two have different structures, or both have a leaf at the same path.

    >>> merge({"body": None, "head": 2}, {"body": 1, "head": None})
    {'body': 1, 'head': 2}
    """
    if frozen is None:
        return params
    ours, theirs = (dict(jax.tree.leaves_with_path(tree, is_leaf=_is_none)) for tree in (params, frozen))
    for path in [*ours, *theirs]:
        if path not in ours or path not in theirs:
            where = "the meta-parameters" if path in ours else "frozen"
            raise ValueError(
                f"frozen must have the structure of the meta-parameters, with None where these have a leaf, got "
                f"{_path(path)!r} in {where} alone"
            )
        if ours[path] is not None and theirs[path] is not None:
            raise ValueError(
                f"frozen must have None where the meta-parameters have a leaf, got {_path(path)!r} in both"
            )
    return fill(params, frozen)


def without(tree: PyTree, other: PyTree | None) -> PyTree:
    """Returns the tree with None where `other` has a leaf.

    >>> without({"body": 1, "head": 2}, {"body": 1, "head": None})
    {'body': None, 'head': 2}
    """
    if other is None:
        return tree
    return jax.tree.map(lambda a, b: a if b is None else None, tree, other, is_leaf=_is_none)


def split_floats(tree: PyTree) -> tuple[PyTree, PyTree]:
    """Splits a tree into the leaves that can be differentiated and the rest, each with None where the other has a leaf.

    >>> split_floats({"rate": 0.5, "count": 3})
    ({'count': None, 'rate': 0.5}, {'count': 3, 'rate': None})
    """
    floats = jax.tree.map(lambda leaf: leaf if is_float(leaf) else None, tree)
    return floats, jax.tree.map(lambda leaf: None if is_float(leaf) else leaf, tree)


def is_float(leaf: Any) -> bool:
    """Returns whether a leaf can be differentiated.

    >>> is_float(0.5), is_float(3)
    (True, False)
    """
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def strong(tree: PyTree) -> PyTree:
    """Converts leaves to arrays without weak types, because a weak and a strong type would cause two compilations.

    >>> jax.typeof(strong(1.0)).weak_type
    False
    """

    def settle(leaf: Any) -> jax.Array:
        if jnp.issubdtype(getattr(leaf, "dtype", int), jax.dtypes.extended):  # keys
            return leaf
        leaf = jnp.asarray(leaf)
        return jax.lax.convert_element_type(leaf, leaf.dtype)

    return jax.tree.map(settle, tree)


def vary(tree: PyTree, axes: Any) -> PyTree:
    """Marks the leaves that are not yet marked as differing between devices along `axes` (names).

    If all devices share a value, `shard_map` sums the gradient with respect to it over the devices. This is correct
    for a parameter, and wrong for a value that adapts to the task of one device but starts as a shared value.

    >>> vary({"head": 1.0}, ())
    {'head': 1.0}
    """

    def cast(leaf: Any) -> Any:
        missing = tuple(axis for axis in axes if axis not in varying_axes(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def varying_axes(tree: PyTree) -> list[Any]:
    """Returns the names of the `shard_map` axes along which any leaf differs between devices.

    >>> varying_axes({"head": 1.0})
    []
    """
    kinds = [getattr(jax.typeof(leaf), "mat", None) for leaf in jax.tree.leaves(tree)]
    return sorted({axis for kind in kinds for axis in getattr(kind, "varying", ())}, key=str)


def update_hash(digest: Any, tree: PyTree) -> None:
    """Updates a hashlib digest with the paths, dtypes, shapes and bytes of the leaves.

    >>> import hashlib
    >>> one, other = hashlib.sha256(), hashlib.sha256()
    >>> update_hash(one, {"w": np.ones(2)})
    >>> update_hash(other, {"w": np.ones([2, 1])})
    >>> one.hexdigest() == other.hexdigest()
    False
    """
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())


def given(frozen: PyTree) -> tuple[PyTree, ...]:
    """Returns the extra argument of an update: `(frozen,)`, or `()` if there is no frozen base.

    Update functions without a frozen base take two arguments.

    >>> given(None), len(given({"w": 1}))
    ((), 1)
    """
    return () if frozen is None else (frozen,)
