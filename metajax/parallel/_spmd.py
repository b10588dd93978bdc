"""The same meta step over several devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metajax.core import _validate
from metajax.core._types import MetaState, OuterUpdate


def shard_tasks(outer: OuterUpdate, *, devices: Sequence[jax.Device] | None = None) -> OuterUpdate:
    """Spreads the tasks of each step over devices with `shard_map`.

    Args:
      outer: made by `metajax.outer_update(..., axis_name=...)`, with any name.
      devices: which devices; all local ones by default.

    Returns:
      An `OuterUpdate` with the same signature: parameters replicated, episodes split along their task axis.

    Raises:
      ValueError: `outer` has no axis name; or (when called) the number of tasks is not a multiple
        of the number of devices.

    >>> import jax, jax.numpy as jnp, optax, metajax
    >>> learner = metajax.learners.maml(metajax.models.mlp(outputs=2), inner=optax.sgd(0.1))
    >>> outer = metajax.outer_update(learner, optax.adam(1e-3), hypergrad=metajax.hypergrad.mixed_mode(),
    ...                              axis_name="task")
    >>> outer = metajax.parallel.shard_tasks(outer)
    >>> examples = metajax.Examples(jnp.eye(4), jnp.array([0, 0, 1, 1]), jnp.ones(4, bool))
    >>> episode = metajax.Episode(examples, examples)
    >>> episodes = jax.tree.map(lambda leaf: jnp.stack([leaf] * jax.local_device_count()), episode)
    >>> state, metrics = jax.jit(outer.update)(outer.init(jax.random.key(0), episode), episodes)
    >>> int(state.step)
    1
    """
    _validate.instance("outer", outer, OuterUpdate)
    axis_name = outer.axis_name
    if axis_name is None:
        raise ValueError('outer must be made with an axis name, as outer_update(..., axis_name="task"), got None')
    chosen = jax.local_devices() if devices is None else list(devices)
    mesh = Mesh(np.array(chosen), (axis_name,))
    same: Any = PartitionSpec()
    split: Any = PartitionSpec(axis_name)
    layout = MetaState(params=same, opt_state=same, hypergrad_state=split, step=same, key=same)
    sharded = jax.shard_map(outer.update, mesh=mesh, in_specs=(layout, split), out_specs=(layout, same))

    def init(*arguments: Any, **keywords: Any) -> MetaState:
        # placed where update leaves it, so that the second call finds what the first one compiled
        return jax.device_put(outer.init(*arguments, **keywords), NamedSharding(mesh, same))

    def update(state: MetaState, episodes: Any) -> tuple[MetaState, dict[str, Any]]:
        num_tasks = jax.tree.leaves(episodes)[0].shape[0]
        if num_tasks % len(chosen):
            raise ValueError(f"the number of tasks must be a multiple of {len(chosen)} devices, got {num_tasks}")
        return sharded(state, episodes)

    return OuterUpdate(init, update)  # and no axis name: the axis is bound here
