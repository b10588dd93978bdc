"""Which device holds which part of a parameter: rules from paths to partition specs."""

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
    """A rule without paths: each large parameter is divided along its longest dimension that divides evenly.

    Args:
      size: devices along the mesh axis.
      axis: the mesh axis.
      at_least: parameters of fewer numbers stay whole on every device.

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
    """The `PartitionSpec` of each leaf.

    Args:
      tree: leaves with a shape: arrays or `jax.ShapeDtypeStruct`.
      mesh: of `make_mesh`.
      rules: pairs of a regular expression, searched in the path of a leaf (`body/conv_0/kernel`), and its spec; the
        first that matches counts, and what none matches is whole on every device. Or a function of path and shape.

    Raises:
      ValueError: a rule that matches no leaf, an invalid expression, a spec that is longer than a leaf, names no
        axis of the
        mesh, names `task` (which divides tasks, not parameters), or divides a dimension unevenly.

    >>> from metajax.parallel import make_mesh
    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> specs = partition_specs({"kernel": jax.numpy.ones([4, 2])}, mesh, [("kernel", PartitionSpec("fsdp"))])
    >>> specs["kernel"] == PartitionSpec()  # an axis of one device divides nothing
    True
    """
    check_matches(rules, _tree.paths(tree))
    return specs_of(tree, mesh, rules)


def specs_of(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """As `partition_specs`, of a part of the parameters, which not every rule has to match."""

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
    """Refuses an invalid expression, and one that is found in no path."""
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
    """As the compiler writes it: without axes of one device, and without what follows the last divided dimension."""
    entries: list[Any] = []
    for entry in spec:
        names = tuple(name for name in axis_names(entry) if mesh.shape[name] > 1)
        entries.append(names[0] if len(names) == 1 else names or None)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def axis_names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec, which is None, a name or several.

    >>> axis_names(None), axis_names("fsdp")
    ((), ('fsdp',))
    """
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def like_params(tree: Any, params: Any, specs: Any) -> Any:
    """Gives the leaves of an optimizer's state the specs of the parameters that they belong to.

    Optax keeps moments in trees like that of the parameters: the path of a moment ends with the path of its parameter.
    What belongs to no parameter is whole on every device.

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
