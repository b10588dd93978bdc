"""Checkpoints with Orbax: the last one, and the best one by validation."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from metajax.core._types import MetaState, Params


class Checkpoints:
    """Saves and restores a `MetaState` and a dict of JSON values, atomically.

    Two folders: `last` holds the newest checkpoint, `best` the one with the highest score.

    Args:
      folder: where to keep them; made where it does not exist.

    >>> import tempfile, jax, jax.numpy as jnp
    >>> state = MetaState({"w": jnp.ones(2)}, (), (), jnp.zeros([], jnp.int32), jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoints = Checkpoints(folder)
    ...     checkpoints.save(1, state, {"seconds": 2.0})
    ...     restored, extra = checkpoints.restore(state)
    ...     checkpoints.close()
    >>> restored.params["w"].tolist(), extra
    ([1.0, 1.0], {'seconds': 2.0})
    """

    def __init__(self, folder: str | pathlib.Path):
        root = pathlib.Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self._managers = {kind: ocp.CheckpointManager(root / kind, options=options) for kind in ("last", "best")}

    def save(self, step: int, state: MetaState, extra: dict[str, Any], *, kind: str = "last") -> None:
        """Saves a checkpoint of step `step`; the one before goes when this one is whole.

        A step that is there already is left as it is: a run that was killed between two checkpoints passes it again.
        """
        if step in self._managers[kind].all_steps():
            return
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(_plain(state)), extra=ocp.args.JsonSave(extra))
        self._managers[kind].save(step, args=arguments, force=True)

    def latest(self, kind: str = "last") -> int | None:
        """The step of the newest checkpoint, None where there is none."""
        return self._managers[kind].latest_step()

    def restore(self, like: MetaState, *, kind: str = "last") -> tuple[MetaState, dict[str, Any]]:
        """Restores the newest checkpoint into the structure, shapes and dtypes of `like`.

        Raises:
          ValueError: there is no checkpoint, or it does not have the structure of `like`.
        """
        manager = self._managers[kind]
        step = manager.latest_step()
        if step is None:
            raise ValueError(f"there is no checkpoint in {manager.directory}")
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(_plain(like)), extra=ocp.args.JsonRestore())
        stored = manager.restore(step, args=arguments)
        key = jax.random.wrap_key_data(stored.state["key"], impl=jax.random.key_impl(like.key))
        state = like._replace(**{**stored.state, "key": key})
        placed = jax.tree.map(lambda leaf, place: jax.device_put(leaf, place.sharding), state, like)
        return placed, stored.extra

    def close(self) -> None:
        """Waits for what is being written."""
        for manager in self._managers.values():
            manager.close()


def _plain(state: MetaState) -> dict[str, Any]:
    """The state as NumPy arrays, which know nothing of devices: any number of them can restore it."""
    fields = state._asdict()
    fields["key"] = jax.random.key_data(state.key)
    return {name: jax.tree.map(np.asarray, value) for name, value in fields.items() if jax.tree.leaves(value)}


def restore_params(folder: str | pathlib.Path, *, kind: str = "last") -> tuple[Params, int]:
    """Restores the meta-parameters alone, as NumPy arrays, and the step they are from.

    Raises:
      ValueError: there is no checkpoint of this kind.
    """
    root = pathlib.Path(folder).absolute() / kind
    steps = [] if not root.is_dir() else ocp.utils.checkpoint_steps(root)
    if not steps:
        raise ValueError(f"there is no checkpoint in {root}")
    with ocp.CheckpointManager(root) as manager:
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore())
        stored = manager.restore(max(steps), args=arguments)
    return jax.tree.map(np.asarray, stored.state["params"]), max(steps)
