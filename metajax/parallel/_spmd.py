"""The meta step on a mesh."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metajax.core import _tree, _validate
from metajax.core._types import MetaState, OuterUpdate, PartialSums
from metajax.parallel import _rules

_WHOLE: Any = PartitionSpec()


def shard(outer: OuterUpdate, mesh: Mesh, rules: _rules.Rules = ()) -> OuterUpdate:
    """Shards the meta step over a mesh: tasks over `task` and `fsdp`, parameters over `fsdp` and `model`.

    Each device (or group of devices along `model`) computes its own tasks with the full parameters, which it gathers
    from its `fsdp` neighbours once per step. The next communication is the reduction of the sums over tasks: one
    all-reduce of the hypergradient, or a reduce-scatter for divided parameters. So the traffic does not grow with the
    number of tasks, inner steps or examples. Optimizer state is divided like its parameters, and the optimizer runs on
    the parts. Along `model` the compiler divides the computation in the same way as the rules divide the weights.

    Args:
      outer: an update from `metajax.outer_update`, without an axis name.
      mesh: mesh from `make_mesh`.
      rules: how each parameter is divided (see `partition_specs`), () for no division. Only one dimension of a
        parameter can be divided along `fsdp`, and along no other axis. The same rules apply to a frozen base:
        `put(frozen, frozen_shardings(frozen, mesh, rules))`.

    Returns:
      An `OuterUpdate` with the same signature, for `jit`, on arrays that are placed on the mesh. `init` creates the
      state with its final shardings (first the shapes, then one compiled program). Episodes are divided along
      `task_sharding`, or by the compiler. The returned state has the same shardings as the given state, which may be
      donated.

    Raises:
      ValueError: `outer` does not come from `outer_update`, or has an axis name; `partition_specs` refuses the rules;
        or (when called) the number of tasks is not a multiple of the number of device groups (see `pad_tasks`).

    >>> import jax, jax.numpy as jnp, optax, metajax
    >>> learner = metajax.learners.maml(metajax.models.mlp(outputs=2), inner=optax.sgd(0.1))
    >>> outer = metajax.outer_update(learner, optax.adam(1e-3), hypergrad=metajax.hypergrad.mixed_mode())
    >>> mesh = metajax.parallel.make_mesh(task=-1)
    >>> outer = metajax.parallel.shard(outer, mesh)
    >>> examples = metajax.Examples(jnp.eye(4), jnp.array([0, 0, 1, 1]), jnp.ones(4, bool))
    >>> episode = metajax.Episode(examples, examples)
    >>> episodes = jax.tree.map(lambda leaf: jnp.stack([leaf] * mesh.size), episode)
    >>> state, metrics = jax.jit(outer.update)(outer.init(jax.random.key(0), episode), episodes)
    >>> int(state.step)
    1
    """
    _validate.instance("outer", outer, OuterUpdate)
    _validate.instance("mesh", mesh, Mesh)
    partial_sums, apply_updates = outer.partial_sums, outer.apply_updates
    if partial_sums is None or apply_updates is None or outer.axis_name is not None:
        raise ValueError(
            "outer must come from outer_update, without axis_name; shard it first, then augment it or wrap it otherwise"
        )
    axes = _divided_axes(mesh)
    by_hand = set(axes) if mesh.shape.get("model", 1) > 1 else set(mesh.axis_names)
    by_task = PartitionSpec(axes) if axes else _WHOLE

    def init(key: jax.Array, episode: Any, params: Any = None, *, frozen: Any = None, num_tasks: int = 1) -> MetaState:
        def make(key: jax.Array, episode: Any, params: Any, frozen: Any) -> MetaState:
            return outer.init(key, episode, params, frozen=frozen, num_tasks=num_tasks)

        shapes = jax.eval_shape(make, key, episode, params, frozen)
        placed = state_shardings(shapes, mesh, rules, frozen=frozen)
        everywhere = NamedSharding(mesh, _WHOLE)
        key, episode = put((key, episode), jax.tree.map(lambda _: everywhere, (key, episode)))
        # passed as arguments, not as constants of the program, and divided before they are merged with other arrays
        params = None if params is None else put(params, placed.params)
        if frozen is not None:
            frozen = put(frozen, frozen_shardings(frozen, mesh, rules))
        return jax.jit(make, out_shardings=placed)(key, episode, params, frozen)

    def update(state: MetaState, episodes: Any, frozen: Any = None) -> tuple[MetaState, dict[str, Any]]:
        require_divided(mesh, jax.tree.leaves(episodes)[0].shape[0])
        placed = state_shardings(state, mesh, rules, frozen=frozen)
        places = placed.params, None if frozen is None else frozen_shardings(frozen, mesh, rules)
        dimensions = jax.tree.map(lambda place: _fsdp_dimension(place.spec), places)
        # the axes that the function below handles itself; the compiler handles `model`
        held = jax.tree.map(lambda dimension: _WHOLE if dimension < 0 else _at(dimension), dimensions)

        def local(parts: Any, hypergrad_state: Any, step: Any, key: Any, episodes: Any) -> tuple[Any, Any]:
            params, frozen = jax.tree.map(_gather, parts, dimensions)
            total, per_task = partial_sums(MetaState(params, (), hypergrad_state, step, key), episodes, frozen, axes)
            # None where a parameter is not trained
            grads = jax.tree.map(
                lambda grad, dimension: None if grad is None else _reduce(grad, dimension, axes),
                total.grads, dimensions[0], is_leaf=lambda leaf: leaf is None,
            )  # fmt: skip
            return jax.lax.psum(total._replace(grads=()), axes)._replace(grads=grads), per_task

        # shard_map needs an axis; without one, the compiler handles everything
        run = jax.shard_map(
            local, mesh=mesh, axis_names=by_hand, in_specs=(held, by_task, _WHOLE, _WHOLE, by_task),
            out_specs=(PartialSums(_WHOLE, held[0], _WHOLE, _WHOLE, _WHOLE), by_task),
        ) if axes else local  # fmt: skip
        total, per_task = run((state.params, frozen), state.hypergrad_state, state.step, state.key, episodes)
        new, metrics = apply_updates(state, total, per_task, frozen)
        # the same shardings as the input, so that a state can be donated and nothing is compiled again
        return jax.lax.with_sharding_constraint(new, placed), metrics

    return outer.wrapped(init, update)


def state_shardings(state: MetaState, mesh: Mesh, rules: _rules.Rules = (), *, frozen: Any = None) -> Any:
    """Returns the sharding that `shard` uses for each leaf of a state.

    Args:
      state: arrays or `jax.ShapeDtypeStruct`.
      mesh: mesh from `make_mesh`.
      rules: as for `shard`.
      frozen: the frozen base of the state; a rule may match a parameter of either.

    Returns:
      A tree of `NamedSharding`: parameters follow the rules, moments of the optimizer follow their parameters, states
      of the estimator follow their tasks.

    Raises:
      ValueError: `partition_specs` refuses the rules.

    >>> import metajax
    >>> mesh = metajax.parallel.make_mesh()
    >>> state = metajax.MetaState({"w": jnp.ones(2)}, (), (), jnp.zeros([], jnp.int32), jax.random.key(0))
    >>> state_shardings(state, mesh).params["w"].spec == PartitionSpec()
    True
    """
    _rules.check_matches(rules, _tree.paths(_tree.merge(state.params, frozen)))
    params = _rules.specs_of(state.params, mesh, rules)
    opt_state = _rules.like_params(state.opt_state, state.params, params)
    axes = _divided_axes(mesh)
    kept = jax.tree.map(lambda _: PartitionSpec(axes) if axes else _WHOLE, state.hypergrad_state)
    specs = state._replace(params=params, opt_state=opt_state, hypergrad_state=kept, step=_WHOLE, key=_WHOLE)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def frozen_shardings(frozen: Any, mesh: Mesh, rules: _rules.Rules = ()) -> Any:
    """Returns the sharding that `shard` expects for each leaf of a frozen base.

    Args:
      frozen: the base, with None where the state has a leaf.
      mesh: mesh from `make_mesh`.
      rules: as for `shard`.

    Returns:
      A tree of `NamedSharding`, for `put`.

    Raises:
      ValueError: a rule gives a leaf a spec that `partition_specs` refuses.

    >>> from metajax.parallel import make_mesh
    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> frozen_shardings({"body": jnp.ones(2), "lora": None}, mesh)["body"].spec == PartitionSpec()
    True
    """
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), _rules.specs_of(frozen, mesh, rules))


def num_groups(mesh: Mesh) -> int:
    """Returns the number of groups of devices that compute different tasks.

    >>> from metajax.parallel import make_mesh
    >>> num_groups(make_mesh(devices=jax.devices()[:1]))
    1
    """
    return math.prod(mesh.shape[name] for name in _task_axes(mesh))


def require_divided(mesh: Mesh, num_tasks: int) -> None:
    """Raises a ValueError unless the number of tasks is a multiple of the number of device groups.

    >>> from metajax.parallel import make_mesh
    >>> require_divided(make_mesh(devices=jax.devices()[:1]), 3)
    """
    count = num_groups(mesh)
    if num_tasks % count:
        raise ValueError(f"the number of tasks must be a multiple of {count} groups of devices, got {num_tasks}")


def task_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batches of episodes: the leading axis is divided over `task` and `fsdp`.

    >>> from metajax.parallel import make_mesh
    >>> tuple(task_sharding(make_mesh(devices=jax.devices()[:1])).spec)
    (('task', 'fsdp'),)
    """
    return NamedSharding(mesh, PartitionSpec(_task_axes(mesh)))


def pad_tasks(episodes: Any, multiple: int) -> Any:
    """Adds tasks with weight zero, so that the number of tasks is a multiple of the number of device groups.

    Args:
      episodes: an `Episode` with a leading task axis.
      multiple: the number of tasks becomes a multiple of this number, such as `num_groups(mesh)`.

    Returns:
      The episodes, followed by copies of the last one whose query masks are False.

    Raises:
      ValueError: `multiple` is below 1.

    >>> import numpy as np, metajax
    >>> examples = metajax.Examples(np.ones([3, 4, 2]), np.zeros([3, 4], int), np.ones([3, 4], bool))
    >>> pad_tasks(metajax.Episode(examples, examples), 4).query.mask.any(axis=1).tolist()
    [True, True, True, False]
    """
    _validate.positive_int("multiple", multiple)
    count = jax.tree.leaves(episodes)[0].shape[0]
    missing = -count % multiple
    if not missing:
        return episodes
    padded = jax.tree.map(lambda leaf: jnp.concatenate([leaf, jnp.repeat(leaf[-1:], missing, axis=0)]), episodes)
    return padded._replace(query=padded.query._replace(mask=padded.query.mask.at[count:].set(False)))


def put(tree: Any, shardings: Any) -> Any:
    """Places the leaves of a tree according to their shardings.

    Same as `jax.device_put`, but over several processes it also accepts PRNG keys and arrays that one process has put
    on a device.

    Args:
      tree: arrays, the same in all processes of a job.
      shardings: a tree of `NamedSharding`, such as the result of `frozen_shardings`.

    >>> from metajax.parallel import make_mesh
    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> put({"w": np.ones(2)}, {"w": NamedSharding(mesh, PartitionSpec())})["w"].tolist()
    [1.0, 1.0]
    """
    return jax.tree.map(_put_leaf, tree, shardings)


def _put_leaf(leaf: Any, sharding: NamedSharding) -> Any:
    if isinstance(leaf, jax.core.Tracer):
        return leaf
    if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put_leaf(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    return jax.device_put(np.asarray(leaf), sharding)


def _task_axes(mesh: Mesh) -> tuple[str, ...]:
    """Returns the axes along which devices compute different tasks."""
    return tuple(name for name in ("task", "fsdp") if name in mesh.shape)


def _divided_axes(mesh: Mesh) -> tuple[str, ...]:
    """Returns the axes of `_task_axes` that have several devices."""
    return tuple(name for name in _task_axes(mesh) if mesh.shape[name] > 1)


def _fsdp_dimension(spec: PartitionSpec) -> int:
    """Returns the dimension that is divided along `fsdp`; -1 for none."""
    found = [place for place, entry in enumerate(spec) if "fsdp" in _rules.axis_names(entry)]
    if len(found) > 1 or any(len(_rules.axis_names(spec[place])) > 1 for place in found):
        raise ValueError(f"rules must put one dimension of a parameter on 'fsdp', alone, got {spec}")
    return found[0] if found else -1


def _at(dimension: int) -> PartitionSpec:
    return PartitionSpec(*[None] * dimension, "fsdp")


def _gather(leaf: jax.Array, dimension: int) -> jax.Array:
    if dimension < 0:
        return leaf
    narrow = leaf.dtype == jnp.bfloat16
    # as integers, because on hardware without bfloat16 arithmetic the compiler would send twice the bytes
    parts = jax.lax.bitcast_convert_type(leaf, jnp.uint16) if narrow else leaf
    whole = jax.lax.all_gather(parts, "fsdp", axis=dimension, tiled=True)
    return jax.lax.bitcast_convert_type(whole, leaf.dtype) if narrow else whole


def _reduce(grad: jax.Array, dimension: int, axes: tuple[str, ...]) -> jax.Array:
    if dimension >= 0:
        grad = jax.lax.psum_scatter(grad, "fsdp", scatter_dimension=dimension, tiled=True)
        axes = tuple(name for name in axes if name != "fsdp")
    return jax.lax.psum(grad, axes)
