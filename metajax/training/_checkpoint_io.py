"""Conversion of a state to the leaves of a checkpoint, and loading of leaves into a given structure.

Leaves are matched by path, and an error names those that do not match. Orbax alone would cut or pad an array of another
shape.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from metajax.core import _tree
from metajax.core._types import MetaState, Params, PyTree


def to_save(state: MetaState) -> dict[str, Any]:
    """Returns the arrays of a state, with PRNG keys as key data.

    Raises:
      ValueError: two leaves have the same path.

    >>> state = MetaState({"w": jnp.ones(2)}, (), (), jnp.zeros([], jnp.int32), jax.random.key(0))
    >>> _tree.paths(to_save(state))
    ['key', 'params/w', 'step']
    """
    fields = _fields(state)
    names = _tree.paths(fields)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"state must have one leaf for each path, got two for {twice}")
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf), fields)


def read_state(path: pathlib.Path, like: MetaState) -> MetaState:
    """Returns the state in `path`, with the structure and shardings of `like`.

    Raises:
      ValueError: leaves are missing, are only in the checkpoint, or have another shape or dtype.
    """
    fields = _fields(like)
    data = read(path, jax.tree.map(lambda leaf: _data_of_key(leaf) if _is_key(leaf) else leaf, fields), name="like")
    return like._replace(**jax.tree.map(lambda data, leaf: _key(data, leaf) if _is_key(leaf) else data, data, fields))


def read_params(path: pathlib.Path) -> Params:
    """Returns the meta-parameters in `path` as NumPy arrays, in the containers of Orbax: dicts and lists.

    Returns the average if the state keeps one (`metajax.training.averaged`).
    """
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        stored = reader.metadata(path).item_metadata.tree
        averaged = isinstance(stored.get("opt_state"), dict) and "params" in stored["opt_state"]
        within = "opt_state/params" if averaged else "params"
        names = [name for name in _tree.paths(stored) if name == within or name.startswith(f"{within}/")]
        target = ocp.RestoreArgs(restore_type=np.ndarray)
        found = _restore(reader, path, stored, dict.fromkeys(names, target))
        return found["opt_state"]["params"] if averaged else found["params"]


def read(path: pathlib.Path, like: PyTree, *, name: str, part: bool = False) -> PyTree:
    """Returns the leaves in `path` with the structure and shardings of `like`.

    With `part`, the checkpoint may hold more leaves.

    Raises:
      ValueError: the two do not match. The error calls `like` by its `name` and lists the leaves.
    """
    wanted = _by_path(like)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        stored = reader.metadata(path).item_metadata.tree
        there = _by_path(stored)
        wrong = [f"{leaf} is not in the checkpoint" for leaf in wanted if leaf not in there]
        wrong += [f"{leaf} is only in the checkpoint" for leaf in there if leaf not in wanted and not part]
        wrong += [
            f"{leaf} is {_text(there[leaf])} in the checkpoint, {_text(here)} here"
            for leaf, here in wanted.items()
            if leaf in there and _text(there[leaf]) != _text(here)
        ]
        if wrong:
            more = f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise ValueError(f"{name} must fit the checkpoint {path}: {'; '.join(wrong[:10])}{more}")
        found = _by_path(_restore(reader, path, stored, {leaf: _target(here) for leaf, here in wanted.items()}))
    return jax.tree.unflatten(jax.tree.structure(like), [found[leaf] for leaf in wanted])


def _restore(reader: Any, path: pathlib.Path, stored: PyTree, targets: dict[str, Any]) -> PyTree:
    """Restores the leaves in `targets`, in the stored structure."""
    structure = jax.tree.structure(stored)
    leaves = [leaf if name in targets else ocp.PLACEHOLDER for name, leaf in _by_path(stored).items()]
    arguments = [targets.get(name, ocp.RestoreArgs()) for name in _by_path(stored)]
    item, restore_args = jax.tree.unflatten(structure, leaves), jax.tree.unflatten(structure, arguments)
    return reader.restore(path, args=ocp.args.PyTreeRestore(item, restore_args))


def _target(like: Any) -> ocp.RestoreArgs:
    if isinstance(like, np.ndarray):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    place = like.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return ocp.ArrayRestoreArgs(sharding=place, global_shape=like.shape, dtype=like.dtype)


def _by_path(tree: PyTree) -> dict[str, Any]:
    return dict(zip(_tree.paths(tree), jax.tree.leaves(tree), strict=True))


def _text(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def _fields(state: MetaState) -> dict[str, Any]:
    """Returns the fields that are not empty. Orbax does not store empty ones."""
    return {name: value for name, value in state._asdict().items() if jax.tree.leaves(value)}


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _data_of_key(leaf: Any) -> jax.ShapeDtypeStruct:
    data = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def _key(data: jax.Array, leaf: Any) -> jax.Array:
    found: list[Any] = []  # a ShapeDtypeStruct does not name its key implementation, but a traced key does
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return jax.random.wrap_key_data(data, impl=found[0])
