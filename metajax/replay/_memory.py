"""Bounded memories of experience: a pytree state, and pure functions that add items to it and draw items from it."""

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

_HIGHEST = 2.0**30  # highest priority: flashbax converts priorities to integers


class Sample(NamedTuple):
    """Items that were drawn from a memory.

    Attributes:
      items: leaves `[count, ...]`.
      weights: `[count]` float32 in [0, 1], the importance weight of each item: 1 if all items are equally likely, and 0
        if the memory held no item to draw. Rows with weight 0 hold no data.
      indices: `[count]` int32, the places of the items, for `Memory.update`.

    >>> Sample._fields
    ('items', 'weights', 'indices')
    """

    items: PyTree
    weights: jax.Array
    indices: jax.Array


class Memory(NamedTuple):
    """A bounded memory. Its state is a pytree that can be jitted, scanned, donated, and saved in a checkpoint.

    Attributes:
      init: `(example) -> state`, an empty state for items with the shapes and dtypes of the example. Raises a
        ValueError if the state would be larger than the free memory of the device, or than `max_bytes`.
      add: `(state, item, *, key=None, keep=True) -> state`; the state does not change if `keep` is False.
      sample: `(state, count, *, key) -> Sample`. An empty memory raises a ValueError; under `jit`, where this cannot be
        checked, all weights are 0.
      update: `(state, indices, priorities) -> state`, both `[count]`, if the memory draws by priorities; else None.
      size: `(state) -> int32`, the number of items that can be drawn.
      capacity: the largest number of items that the memory holds and that one call draws.

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
      seen: `[groups]` int32, the number of items of each group that were added so far.

    >>> Reservoirs._fields
    ('items', 'seen')
    """

    items: PyTree
    seen: jax.Array


def reservoir(capacity: int, *, max_bytes: int | None = None) -> Memory:
    """Returns a memory that holds every item of the stream so far with the same probability.

    The n-th item is stored with probability `capacity / n` and replaces a random other item (Vitter 1985, algorithm R;
    the buffer of Meta-Experience Replay). A draw is uniform without replacement.

    Args:
      capacity: number of items, at least 1.
      max_bytes: largest size of the state in bytes; None uses the free memory of the device (or of the host, if the
        device does not report it).

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
    """Returns a memory with a reservoir for each group (a task or a class); draws take equally many items from each.

    A draw takes items from the groups in turn, in random order and without replacement. If a group has no more items,
    the other groups give more.

    Args:
      groups: number of groups, at least 1.
      slots: number of items of each group, at least 1.
      group: `(item) -> int`, the group of an item. An item of a group outside `[0, groups)` is not stored.
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
        # an index out of range drops the item; a negative index would count from the end
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
        turn = jnp.argsort(jnp.argsort(order, axis=1), axis=1)  # the round in which its group gives this item
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
    """Returns a ring of the newest items that draws items of high priority, such as a loss, more often.

    flashbax stores items and priorities. Item i is drawn, with replacement and stratified, with probability
    `P_i = p_i^exponent / sum_j p_j^exponent`; for a new item `p^exponent` is the highest so far, rounded up to an
    integer. The weights are `(size * P_i)^-correction`, divided by the largest weight of the draw.

    Args:
      capacity: number of items, at least 1.
      exponent: in [0, 1]; 0 draws uniformly.
      correction: in [0, 1], how far the weights correct that some items are drawn more often; 1 corrects it fully.
      floor: added to every priority that `update` sets, above 0. A negative or non-finite priority raises a ValueError;
        under `jit`, where it cannot be checked, it counts as 0. A priority above 2^30 counts as 2^30.
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
    """Wraps flashbax's prioritised trajectory buffer as a `Memory` that draws stretches from rows of time steps."""
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
        """Returns priorities to the power of the exponent, 0 where no stretch begins."""
        nodes = state.sum_tree_state.nodes
        return nodes[nodes.shape[0] // 2 :][:starts]

    def added(state: Any, steps: Any) -> Any:
        # flashbax 0.1.3 truncates the priority of new items to an integer
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
        # if the memory is empty, or sums are rounded, an index may point outside the stored items
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
        # an empty place must not be drawn
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
    """Adds items to a memory one after the other.

    Args:
      memory: any memory.
      state: the state of the memory.
      items: leaves `[n, ...]`.
      key: PRNG key of the draws that decide which items stay.
      keep: `[n]` bool, False for items that are not stored; None stores all.

    Returns:
      The new state.

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
    """Raises a ValueError if an item does not have the shapes and dtypes of the held items, after `axes` axes."""
    here = [(leaf.shape[axes:], leaf.dtype) for leaf in jax.tree.leaves(held)]
    new = [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(item)]
    structures: list[Any] = [jax.tree.structure(tree) for tree in (held, item)]
    if here != new or structures[0] != structures[1]:
        told = [", ".join(f"{dtype}{list(shape)}" for shape, dtype in leaves) for leaves in (here, new)]
        raise ValueError(f"item must have the structure, shapes and dtypes of the example: {told[0]}, got {told[1]}")


def require_drawable(count: int, capacity: int, size: jax.Array) -> None:
    """Raises a ValueError if `count` items cannot be drawn, as far as this is known."""
    if _validate.positive_int("count", count) > capacity:
        raise ValueError(f"count must be at most the capacity of the memory, {capacity}, got {count}")
    if not isinstance(size, jax.core.Tracer) and int(size) == 0:
        raise ValueError("state must hold an item to draw, got an empty memory")


def allocated(make: Callable[[Any], Any], max_bytes: int | None) -> Callable[[Any], Any]:
    """Wraps `make` to raise a ValueError if its result would have more bytes than allowed."""
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
    """Returns the free bytes of the device, else of the host, else all bytes of the host; None if all are unknown."""
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
