"""Sharding of parameters: rules that map paths to partition specs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from metajax.core import _tree

Rules = Sequence[tuple[str, PartitionSpec]] | Callable[[str, tuple[int, ...]], PartitionSpec]


def largest_axis(size: int, *, axis: str = "fsdp", at_least: int = 2**14) -> Rules:
    """Returns a rule that divides each large parameter along its longest dimension that divides evenly.

    The rule does not depend on paths.

    Args:
      size: number of devices along the mesh axis.
      axis: name of the mesh axis.
      at_least: parameters with fewer elements are replicated on every device.

    >>> tuple(largest_axis(4)("body/kernel", (3, 4096, 128)))
    (None, 'fsdp', None)
    """

    def rule(path: str, shape: tuple[int, ...]) -> PartitionSpec:
        fitting = [length if length % size == 0 else 0 for length in shape]
        if size == 1 or math.prod(shape) < at_least or not any(fitting):
            return PartitionSpec()
        place = fitting.index(max(fitting))
        return PartitionSpec(*(axis if dimension == place else None for dimension in range(len(shape))))

    return rule


def partition_specs(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """Returns the `PartitionSpec` of each leaf.

    Args:
      tree: leaves with a shape: arrays or `jax.ShapeDtypeStruct`.
      mesh: mesh from `make_mesh`.
      rules: pairs of a regular expression, searched in the path of a leaf (`body/conv_0/kernel`), and its spec. The
        first match counts; leaves without a match are replicated on every device. Or a function of path and shape.

    Raises:
      ValueError: a rule matches no leaf; an expression is invalid; or a spec has more dimensions than its leaf, names
        an axis that the mesh does not have, names `task` (which divides tasks, not parameters), or divides a dimension
        unevenly.

    >>> from metajax.parallel import make_mesh
    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> specs = partition_specs({"kernel": jax.numpy.ones([4, 2])}, mesh, [("kernel", PartitionSpec("fsdp"))])
    >>> specs["kernel"] == PartitionSpec()  # an axis of one device divides nothing
    True
    """
    check_matches(rules, _tree.paths(tree))
    return specs_of(tree, mesh, rules)


def specs_of(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """Same as `partition_specs`, for a part of the parameters: a rule may match no leaf."""

    def spec(path: str, shape: tuple[int, ...]) -> PartitionSpec:
        if callable(rules):
            return rules(path, shape)
        return next((spec for pattern, spec in rules if re.search(pattern, path)), PartitionSpec())

    def checked(path: str, leaf: Any) -> PartitionSpec:
        found = spec(path, leaf.shape)
        _check_spec(path, tuple(leaf.shape), found, mesh)
        return _normal(found, mesh)

    return _tree.map_with_path(checked, tree)


def check_matches(rules: Rules, paths: list[str]) -> None:
    """Raises a ValueError if an expression is invalid or matches no path."""
    for pattern, _ in () if callable(rules) else rules:
        try:
            found = any(re.search(pattern, path) for path in paths)
        except re.error as error:
            raise ValueError(f"rules must be regular expressions, got {pattern!r}: {error}") from error
        if not found:
            raise ValueError(f"rules must each match a parameter, got {pattern!r}; paths: {', '.join(paths)}")


def _check_spec(path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    if len(spec) > len(shape):
        raise ValueError(f"rules give {path} of shape {shape} the spec {spec}, which has more dimensions")
    for length, names in zip(shape, spec, strict=False):
        size = 1
        for name in axis_names(names):
            if name not in mesh.shape or name == "task":
                raise ValueError(f"rules must divide {path} along 'fsdp' or 'model', got {name!r}")
            size *= mesh.shape[name]
        if length % size:
            raise ValueError(f"rules must divide {path} evenly, got shape {shape} over {spec}: {length} over {size}")


def _normal(spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    """Normalises a spec as the compiler does: drops axes of one device and entries after the last divided dimension."""
    entries: list[Any] = []
    for entry in spec:
        names = tuple(name for name in axis_names(entry) if mesh.shape[name] > 1)
        entries.append(names[0] if len(names) == 1 else names or None)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def axis_names(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes of one entry of a spec, which is None, a name or several names.

    >>> axis_names(None), axis_names("fsdp")
    ((), ('fsdp',))
    """
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def like_params(tree: Any, params: Any, specs: Any) -> Any:
    """Returns the specs of an optimizer state: each leaf has the spec of the parameter that it belongs to.

    Optax keeps moments in trees with the structure of the parameters: the path of a moment ends with the path of its
    parameter. Leaves that belong to no parameter are replicated on every device.

    >>> w = jax.numpy.ones(4)
    >>> like_params({"mu": {"w": w}}, {"w": w}, {"w": PartitionSpec("fsdp")})["mu"]["w"] == PartitionSpec("fsdp")
    True
    """
    leaves = zip(_tree.paths(params), jax.tree.leaves(params), jax.tree.leaves(specs), strict=True)
    known = {path: (leaf.shape, spec) for path, leaf, spec in leaves}

    def spec(path: str, leaf: Any) -> PartitionSpec:
        parts = path.split("/")
        for start in range(len(parts)):
            shape, found = known.get("/".join(parts[start:]), (None, None))
            if found is not None and shape == leaf.shape:
                return found
        return PartitionSpec()

    return _tree.map_with_path(spec, tree)
