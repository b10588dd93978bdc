"""Bounded memories of experience: a pytree, and pure functions that add to it and draw from it."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metajax.core import _validate
from metajax.core._types import PyTree

_HIGHEST = 2.0**30  # of priorities: flashbax makes integers of them


class Sample(NamedTuple):
    """What was drawn from a memory.

    Attributes:
      items: leaves `[count, ...]`.
      weights: `[count]` float32 in [0, 1], what each item should count for: its importance weight (1 where all items
        are equally likely), and 0 where the memory held no item to draw. What stands there is no experience.
      indices: `[count]` int32, the places of the items, for `Memory.update`.

    >>> Sample._fields
    ('items', 'weights', 'indices')
    """

    items: PyTree
    weights: jax.Array
    indices: jax.Array


class Memory(NamedTuple):
    """A bounded memory. Its state is a pytree: it can be jitted, scanned, donated, and saved in a checkpoint.

    Attributes:
      init: `(example) -> state`, empty, for items of the shapes and dtypes of the example. Raises a ValueError where
        the state would be larger than the memory that the device has left, or than `max_bytes`.
      add: `(state, item, *, key=None, keep=True) -> state`; nothing changes where `keep` is False.
      sample: `(state, count, *, key) -> Sample`. An empty memory raises a ValueError; where it cannot be known to be
        empty, under `jit`, all weights are 0.
      update: `(state, indices, priorities) -> state`, both `[count]`, where priorities decide what is drawn; else None.
      size: `(state) -> int32`, how many items can be drawn.
      capacity: the most items that it holds, and the most that one call draws.

    >>> Memory._fields
    ('init', 'add', 'sample', 'update', 'size', 'capacity')
    """

    init: Callable[..., Any]
    add: Callable[..., Any]
    sample: Callable[..., Sample]
    update: Callable[..., Any] | None
    size: Callable[[Any], jax.Array]
    capacity: int


class Reservoirs(NamedTuple):
    """State of `reservoir` and `balanced`.

    Attributes:
      items: leaves `[groups, slots, ...]`.
      seen: `[groups]` int32, how many items of each group came by so far.

    >>> Reservoirs._fields
    ('items', 'seen')
    """

    items: PyTree
    seen: jax.Array


def reservoir(capacity: int, *, max_bytes: int | None = None) -> Memory:
    """A memory in which every item of the stream so far stands with the same probability.

    The n-th item finds a place with probability `capacity / n` and takes that of a random other one (Vitter 1985,
    algorithm R; the buffer of Meta-Experience Replay). A draw is uniform without replacement.

    Args:
      capacity: items, at least 1.
      max_bytes: the most bytes that the state may have; None is what the device (or, where it does not tell, the host)
        has left.

    Raises:
      ValueError: `capacity` or `max_bytes` is below 1.

    Source: Vitter 1985, Random Sampling with a Reservoir; Riemer et al. 2019, arXiv:1810.11910.

    >>> import jax, jax.numpy as jnp
    >>> memory = reservoir(3)
    >>> state = memory.init(jnp.float32(0))
    >>> for number in range(2):
    ...     state = memory.add(state, jnp.float32(number), key=jax.random.key(number))
    >>> drawn = memory.sample(state, 3, key=jax.random.key(9))
    >>> sorted(drawn.items[drawn.weights > 0].tolist()), sorted(drawn.weights.tolist())
    ([0.0, 1.0], [0.0, 1.0, 1.0])
    """
    return balanced(1, _validate.positive_int("capacity", capacity), lambda item: 0, max_bytes=max_bytes)


def balanced(groups: int, slots: int, group: Callable[[Any], Any], *, max_bytes: int | None = None) -> Memory:
    """A reservoir for each group (a task or a class), and draws that take equally many items from each.

    A draw goes round the groups in random order, without replacement; where a group has no more items, the others
    give more.

    Args:
      groups: how many, at least 1.
      slots: items of each, at least 1.
      group: `(item) -> int`, the group of an item. One that is outside `[0, groups)` is not remembered.
      max_bytes: as for `reservoir`.

    Raises:
      ValueError: `groups`, `slots` or `max_bytes` is below 1.

    Source: Vitter 1985; the equal quotas are those of Lopez-Paz and Ranzato 2017, arXiv:1706.08840.

    >>> import jax, jax.numpy as jnp
    >>> memory = balanced(groups=2, slots=4, group=lambda item: item["task"])
    >>> state = memory.init({"task": jnp.int32(0)})
    >>> for task in (0, 0, 0, 1):
    ...     state = memory.add(state, {"task": jnp.int32(task)}, key=jax.random.key(0))
    >>> sorted(memory.sample(state, 2, key=jax.random.key(1)).items["task"].tolist())
    [0, 1]
    """
    _validate.positive_int("groups", groups)
    capacity = groups * _validate.positive_int("slots", slots)

    def empty(example: Any) -> Reservoirs:
        def places(leaf: Any) -> jax.Array:
            return jnp.zeros((groups, slots, *jnp.shape(leaf)), jnp.result_type(leaf))

        return Reservoirs(jax.tree.map(places, example), jnp.zeros([groups], jnp.int32))

    def add(state: Reservoirs, item: Any, *, key: jax.Array, keep: Any = True) -> Reservoirs:
        require_fit(state.items, item, 2)
        number = jnp.asarray(group(item), jnp.int32)
        # an index that is out of range drops the item; a negative one would count from the end
        number = jnp.where(keep & (number >= 0) & (number < groups), number, groups)
        seen = state.seen.at[number].get(mode="clip")
        place = jnp.where(seen < slots, seen, jax.random.randint(key, [], 0, seen + 1))
        items = jax.tree.map(lambda old, new: old.at[number, place].set(new, mode="drop"), state.items, item)
        return Reservoirs(items, state.seen.at[number].add(1, mode="drop"))

    def sample(state: Reservoirs, count: int, *, key: jax.Array) -> Sample:
        require_drawable(count, capacity, size(state))
        order_key, tie_key = jax.random.split(key)
        there = jnp.arange(slots) < jnp.minimum(state.seen, slots)[:, None]
        order = jnp.where(there, jax.random.uniform(order_key, there.shape), 2.0)
        turn = jnp.argsort(jnp.argsort(order, axis=1), axis=1)  # in which round its group gives this item
        when = jnp.where(there, turn + jax.random.uniform(tie_key, there.shape), jnp.inf)
        indices = jnp.argsort(when.reshape(-1))[:count].astype(jnp.int32)
        items = jax.tree.map(lambda leaf: leaf.reshape(capacity, *leaf.shape[2:])[indices], state.items)
        return Sample(items, there.reshape(-1)[indices].astype(jnp.float32), indices)

    def size(state: Reservoirs) -> jax.Array:
        return jnp.sum(jnp.minimum(state.seen, slots))

    return Memory(allocated(empty, max_bytes), add, sample, None, size, capacity)


def prioritised(
    capacity: int,
    *,
    exponent: float = 0.6,
    correction: float = 0.4,
    floor: float = 1e-6,
    max_bytes: int | None = None,
) -> Memory:
    """A ring of the newest items from which those of high priority, such as a loss, are drawn more often.

    flashbax keeps items and priorities. Item i is drawn, with replacement and stratified, with probability
    `P_i = p_i^exponent / sum_j p_j^exponent`; for a new item `p^exponent` is the highest so far, rounded up to a whole
    number. The weights are `(size * P_i)^-correction`, over the largest of the draw.

    Args:
      capacity: items, at least 1.
      exponent: in [0, 1]; 0 draws uniformly.
      correction: in [0, 1], how far the weights undo that some items are drawn more often; 1 does so wholly.
      floor: added to every priority that `update` sets, above 0. A negative or non-finite priority is a ValueError;
        where it cannot be looked at, under `jit`, it counts as 0. One above 2^30 counts as that.
      max_bytes: as for `reservoir`.

    Raises:
      ValueError: an argument is out of its range.
      ImportError: flashbax is not installed.

    Source: Schaul et al. 2016, Prioritized Experience Replay, arXiv:1511.05952.

    >>> import jax, jax.numpy as jnp
    >>> memory = prioritised(4)
    >>> state = memory.init(jnp.float32(0))
    >>> for number in range(4):
    ...     state = memory.add(state, jnp.float32(number))
    >>> state = memory.update(state, jnp.arange(4), jnp.array([0.0, 0.0, 0.0, 5.0]))
    >>> memory.sample(state, 3, key=jax.random.key(0)).items.tolist()
    [3.0, 3.0, 3.0]
    """
    inner = ring(
        _validate.positive_int("capacity", capacity), length=1, rows=1, period=1, exponent=exponent,
        correction=correction, floor=floor, max_bytes=max_bytes,
    )  # fmt: skip

    def add(state: Any, item: Any, *, key: Any = None, keep: Any = True) -> Any:
        require_fit(state.experience, item, 2)
        return inner.add(state, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None, None], item), key=key, keep=keep)

    def sample(state: Any, count: int, *, key: jax.Array) -> Sample:
        drawn = inner.sample(state, count, key=key)
        return drawn._replace(items=jax.tree.map(lambda leaf: leaf[:, 0], drawn.items))

    return inner._replace(add=add, sample=sample)


def ring(
    capacity: int, *, length: int, rows: int, period: int, exponent: float, correction: float, floor: float,
    max_bytes: int | None,
) -> Memory:  # fmt: skip
    """flashbax's prioritised trajectory buffer as a `Memory`: rows of time steps, of which stretches are drawn."""
    make = _flashbax().make_prioritised_trajectory_buffer
    _validate.fraction("exponent", exponent)
    _validate.fraction("correction", correction)
    _validate.positive_float("floor", floor)
    starts = rows * (capacity // period)  # places where a stretch may begin
    backend = jax.default_backend()

    @functools.cache
    def buffer(count: int) -> Any:
        return make(
            add_batch_size=rows, sample_batch_size=count, sample_sequence_length=length, period=period,
            min_length_time_axis=length, max_length_time_axis=capacity, priority_exponent=exponent,
            device=backend if backend in ("gpu", "tpu") else "cpu",
        )  # fmt: skip

    def leaves(state: Any) -> jax.Array:
        """Priorities to the power of the exponent, 0 where no stretch begins."""
        nodes = state.sum_tree_state.nodes
        return nodes[nodes.shape[0] // 2 :][:starts]

    def added(state: Any, steps: Any) -> Any:
        # flashbax 0.1.3 cuts the priority that it gives to what is new to a whole number
        tree = state.sum_tree_state
        tree = tree.replace(max_recorded_priority=jnp.ceil(tree.max_recorded_priority))
        return buffer(1).add(state.replace(sum_tree_state=tree), steps)

    def add(state: Any, steps: Any, *, key: Any = None, keep: Any = True) -> Any:
        del key
        return (
            added(state, steps) if keep is True else jax.lax.cond(keep, added, lambda state, steps: state, state, steps)
        )

    def sample(state: Any, count: int, *, key: jax.Array) -> Sample:
        held = size(state)
        require_drawable(count, starts, held)
        drawn = buffer(count).sample(state, key)
        # of an empty memory, or by the rounding of sums, an index may lead beside what is there
        indices = jnp.minimum(drawn.indices, starts - 1).astype(jnp.int32)
        there = (drawn.indices < starts) & (leaves(state)[indices] > 0)
        raw = jnp.where(there, (held * drawn.probabilities) ** -correction, 0)
        weights = raw / jnp.maximum(jnp.max(raw), jnp.finfo(raw.dtype).tiny)
        return Sample(drawn.experience, weights.astype(jnp.float32), indices)

    def update(state: Any, indices: Any, priorities: Any) -> Any:
        if not isinstance(priorities, jax.core.Tracer):
            values = np.asarray(priorities)
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise ValueError(f"priorities must be finite numbers of at least 0, got {values.tolist()}")
        priorities = jnp.where(jnp.isfinite(priorities), jnp.clip(priorities, 0, _HIGHEST), 0) + floor
        # where nothing is, nothing may be drawn
        return buffer(1).set_priorities(state, indices, jnp.where(leaves(state)[indices] > 0, priorities, 0))

    def size(state: Any) -> jax.Array:
        return jnp.sum(leaves(state) > 0)

    def empty(example: Any) -> Any:
        state = buffer(1).init(jax.tree.map(jnp.asarray, example))
        return jax.tree.map(
            lambda leaf: jnp.asarray(leaf, leaf.dtype), state
        )  # no weak type, which would be lost later

    return Memory(allocated(empty, max_bytes), add, sample, update, size, starts)


def remember(memory: Memory, state: Any, items: PyTree, *, key: jax.Array, keep: Any = None) -> Any:
    """Adds items one after the other.

    Args:
      memory: any.
      state: its state.
      items: leaves `[n, ...]`.
      key: of the draws that decide what stays.
      keep: `[n]` bool, False for what is not to be remembered; None keeps all.

    >>> import jax, jax.numpy as jnp
    >>> memory = reservoir(4)
    >>> keep = jnp.array([True, False, True])
    >>> state = remember(memory, memory.init(0.0), jnp.arange(3.0), key=jax.random.key(0), keep=keep)
    >>> int(memory.size(state)), state.items[0, :2].tolist()
    (2, [0.0, 2.0])
    """
    _validate.instance("memory", memory, Memory)
    count = jax.tree.leaves(items)[0].shape[0]

    def one(state: Any, step: Any) -> tuple[Any, None]:
        item, key, keep = step
        return memory.add(state, item, key=key, keep=True if keep is None else keep), None

    return jax.lax.scan(one, state, (items, jax.random.split(key, count), keep))[0]


def require_fit(held: PyTree, item: PyTree, axes: int) -> None:
    """Raises a ValueError where an item is not of the shapes and dtypes of those that are held below `axes` axes."""
    here = [(leaf.shape[axes:], leaf.dtype) for leaf in jax.tree.leaves(held)]
    new = [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(item)]
    structures: list[Any] = [jax.tree.structure(tree) for tree in (held, item)]
    if here != new or structures[0] != structures[1]:
        told = [", ".join(f"{dtype}{list(shape)}" for shape, dtype in leaves) for leaves in (here, new)]
        raise ValueError(f"item must have the structure, shapes and dtypes of the example: {told[0]}, got {told[1]}")


def require_drawable(count: int, capacity: int, size: jax.Array) -> None:
    """Raises a ValueError where `count` items cannot be drawn, as far as that is known."""
    if _validate.positive_int("count", count) > capacity:
        raise ValueError(f"count must be at most the capacity of the memory, {capacity}, got {count}")
    if not isinstance(size, jax.core.Tracer) and int(size) == 0:
        raise ValueError("state must hold an item to draw, got an empty memory")


def allocated(make: Callable[[Any], Any], max_bytes: int | None) -> Callable[[Any], Any]:
    """`make`, for examples for which it makes no more bytes than there may be."""
    if max_bytes is not None:
        _validate.positive_int("max_bytes", max_bytes)

    def init(example: Any) -> Any:
        need = sum(
            math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(make, example))
        )
        limit = _available() if max_bytes is None else max_bytes
        if limit is not None and need > limit:
            where = "are free" if max_bytes is None else "max_bytes allows"
            raise ValueError(f"capacity must be such that the memory fits: it takes {need} bytes, and {limit} {where}")
        return make(example)

    return init


def _available() -> int | None:
    """Bytes that are free where arrays go, as far as the device or the host tells."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):
        pass
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _flashbax() -> Any:
    try:
        import flashbax
    except ImportError as error:
        raise ImportError(
            "prioritised and recurrent replay need flashbax: install metajax[replay], or flashbax>=0.1.3"
        ) from error
    return flashbax
