"""The sampling rule of class-indexed sources: chooses the rows of an episode, as a pure function of random bits.

The pipeline (NumPy, with a leading axis of episodes) and the device (JAX, one episode) share this rule. It reads
small `Tables` of a source; `Facts` hold what must be known at trace time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from metajax.core._types import Episode, Examples
from metajax.data import _choices
from metajax.data._spec import EpisodeSpec, Imbalanced

Array = Any  # of NumPy or JAX


class Tables(NamedTuple):
    """The tables that the rule reads; leaves are integer arrays.

    A pool is a set of classes from which one episode may be drawn: all classes, or those of one node.

    Attributes:
      pool_first: `[pools]`, the start of each pool in `pool_classes`.
      pool_size: `[pools]`, the number of classes in each pool, or of groups if classes have groups.
      pool_classes: the classes of all pools, pool after pool.
      in_pool: `[pools, classes]` bool, or None if classes have no groups.
      group_members: `[groups, largest]` classes, padded with -1; or None.
      rows: `[n]`, rows of the source, class after class.
      first: `[classes]`, the start of each class in `rows`.
      count: `[classes]`, the number of rows of each class.
      family: `[n]`, the family of each of `rows`; or None.
    """

    pool_first: Array
    pool_size: Array
    pool_classes: Array
    in_pool: Array | None
    group_members: Array | None
    rows: Array
    first: Array
    count: Array
    family: Array | None


class Facts(NamedTuple):
    """Static facts: numbers of classes, groups and families, the largest class, and the rule for nodes.

    Attributes:
      classes: number of classes.
      groups: number of groups, 0 for none.
      families: number of families, 0 for none.
      width: number of rows of the largest class.
      whole: whether an episode takes all classes of its pool, up to the maximum number of ways.
    """

    classes: int
    groups: int
    families: int
    width: int
    whole: bool


def bits_needed(spec: EpisodeSpec, facts: Facts) -> dict[str, tuple[int, ...]]:
    """Returns the purposes and shapes of the random numbers that one episode needs.

    >>> bits_needed(EpisodeSpec(5, 1, 15), Facts(classes=100, groups=0, families=0, width=20, whole=False))
    {'pool': (), 'classes': (5,), 'places': (5, 20)}
    """
    ways = spec.max_ways
    needed: dict[str, tuple[int, ...]] = {"pool": (), "classes": (facts.classes if facts.groups else ways,)}
    if isinstance(spec.ways, tuple):
        needed["ways"] = ()
    if not isinstance(spec.shots, int):
        needed["shots"] = ()
    if isinstance(spec.shots, Imbalanced):
        needed["weights"] = (ways,)
    if facts.families:
        needed["families"] = (ways, facts.families)
    return needed | {"places": (ways, facts.width if _sorts(spec, facts) else _taken(spec, facts))}


def _taken(spec: EpisodeSpec, facts: Facts) -> int:
    """Returns the maximum number of examples of one class in an episode."""
    return min(facts.width, spec.max_shots + spec.queries)


def _sorts(spec: EpisodeSpec, facts: Facts) -> bool:
    """Returns whether whole classes are shuffled; otherwise examples are drawn one after the other."""
    return bool(facts.families) or facts.width <= 8 * _taken(spec, facts)


def draw(spec: EpisodeSpec, facts: Facts, tables: Tables, bits: Array) -> Episode:
    """Draws episodes of rows: classes without replacement, then disjoint support and query examples of each.

    Every set of examples of a class is equally likely. With families, the support takes examples from one family after
    the other, and the query from other families as long as these have examples.

    Args:
      spec: the rule.
      facts: the facts of the source.
      tables: the tables of the source.
      bits: uint32 `[..., count]`, with the count of `bits_needed`.

    Returns:
      An episode of size `spec.capacity` whose inputs are rows, -1 for padding: `[..., support]`, `[..., query]`.
    """
    xp = bits.__array_namespace__()
    numbers = split_bits(bits, bits_needed(spec, facts))
    classes, ways = _draw_classes(spec, facts, tables, numbers)
    present = xp.arange(spec.max_ways) < ways[..., None]
    counts = xp.where(present, tables.count[classes], 0)
    shots, queries = _sizes(spec, numbers, ways, present, counts)
    places = _draw_places(spec, facts, tables, numbers, classes, counts, shots)
    rows = tables.rows[xp.minimum(tables.first[classes][..., None] + places, len(tables.rows) - 1)]
    size, batch = spec.capacity, bits.shape[:-1]
    none = np.zeros_like(shots) if isinstance(shots, np.ndarray) else xp.zeros_like(shots)
    return Episode(
        _lay_out(batch, rows, none, shots, present, size.support, size.ways),
        _lay_out(batch, rows, shots, queries, present, size.query, size.ways),
    )


def split_bits(bits: Array, needed: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    """Splits random bits by purpose.

    >>> split_bits(np.arange(6).reshape(2, 3), {"a": (), "b": (2,)})["b"].tolist()
    [[1, 2], [4, 5]]
    """
    parts, start = {}, 0
    for name, shape in needed.items():
        end = start + int(np.prod(shape, dtype=int))
        parts[name] = bits[..., start:end].reshape((*bits.shape[:-1], *shape))
        start = end
    return parts


def _draw_classes(spec: EpisodeSpec, facts: Facts, tables: Tables, numbers: dict[str, Array]) -> tuple[Array, Array]:
    """Returns classes `[..., max_ways]` and the number of valid ones: `[...]`, or a constant if it is fixed."""
    xp = numbers["classes"].__array_namespace__()
    pool = _choices.below(numbers["pool"], len(tables.pool_size))
    size = tables.pool_size[pool]
    if facts.whole:
        ways = xp.minimum(size, spec.max_ways)
    elif isinstance(spec.ways, tuple):
        most = xp.minimum(size, spec.max_ways)
        ways = spec.min_ways + _choices.below(numbers["ways"], most - spec.min_ways + 1)
    else:
        ways = np.asarray(spec.ways)
    if tables.group_members is None:
        place = xp.minimum(_choices.distinct(numbers["classes"], size), (size - 1)[..., None])
        return tables.pool_classes[tables.pool_first[pool][..., None] + place], ways
    # all classes get a random order: a group is represented by its first class, and groups are ordered by these
    keys = xp.where(tables.in_pool[pool], numbers["classes"] >> 1, xp.uint32(0xFFFFFFFF))  # type: ignore[index]
    members = tables.group_members
    keys = xp.where(members >= 0, keys[..., members], xp.uint32(0xFFFFFFFF))
    group = _choices.order(keys.min(axis=-1))[..., : spec.max_ways]
    classes = members[group, _choices.at(keys.argmin(axis=-1), group)]
    missing = spec.max_ways - classes.shape[-1]
    return xp.pad(classes, [(0, 0)] * (classes.ndim - 1) + [(0, missing)]), ways


def _sizes(
    spec: EpisodeSpec, numbers: dict[str, Array], ways: Array, present: Array, counts: Array
) -> tuple[Array, Array]:
    """Returns the numbers of support and query examples: `[..., max_ways]`, without batch axes if they are fixed."""
    xp = present.__array_namespace__()
    if isinstance(spec.shots, Imbalanced):
        rule = spec.shots
        smallest = xp.where(present, counts, np.iinfo(np.int32).max).min(axis=-1)
        queries = xp.minimum(smallest // 2, spec.queries)[..., None]
        left = xp.maximum(counts - queries, 0)
        beta = _choices.uniform(numbers["shots"])[..., None]
        shares = xp.where(present, xp.floor(beta * xp.minimum(left, rule.per_class)) + 1, 0)
        size = xp.minimum(shares.sum(axis=-1), rule.support)
        lowest, highest = (np.float32(bound) for bound in rule.log_weights)
        weights = counts * xp.exp(lowest + (highest - lowest) * _choices.uniform(numbers["weights"]))
        portions = weights / weights.sum(axis=-1, keepdims=True) * (size - ways)[..., None]
        shots = xp.minimum(xp.floor(portions).astype(counts.dtype) + 1, left)
    elif isinstance(spec.shots, tuple):
        queries = np.asarray(spec.queries)
        low, high = spec.shots
        shots = (low + _choices.below(numbers["shots"], high - low + 1))[..., None]
    else:
        shots, queries = np.asarray(spec.shots), np.asarray(spec.queries)
    return xp.where(present, shots, 0), xp.where(present, queries, 0)


def _draw_places(
    spec: EpisodeSpec, facts: Facts, tables: Tables, numbers: dict[str, Array], classes: Array, counts: Array,
    shots: Array,
) -> Array:  # fmt: skip
    """Draws the examples of each class: `[..., ways, taken]`, first those of the support set, then of the query."""
    xp = classes.__array_namespace__()
    if not _sorts(spec, facts):
        return _choices.distinct(numbers["places"], counts)
    valid = xp.arange(facts.width) < counts[..., None]
    places = _choices.shuffled(numbers["places"], valid)
    if tables.family is not None:
        places = _by_family(tables, numbers["families"], classes, places, valid, shots)
    return places[..., : _taken(spec, facts)]


def _by_family(tables: Tables, bits: Array, classes: Array, places: Array, valid: Array, shots: Array) -> Array:
    """Reorders shuffled places: the support, family after family, then other families, then what is left."""
    xp = classes.__array_namespace__()
    here = xp.minimum(tables.first[classes][..., None] + places, len(tables.rows) - 1)
    family = tables.family[here]  # type: ignore[index]
    valid = _choices.at(xp.broadcast_to(valid, places.shape), places)
    invalid = xp.uint32(0xFFFFFFFF)
    together = _choices.order(xp.where(valid, _choices.at(bits >> 1, family), invalid))  # family after family
    rank = _choices.order(together.astype(xp.uint32))  # the position of each of `places` in that order
    last = _choices.at(together, xp.broadcast_to(xp.maximum(shots - 1, 0)[..., None], (*places.shape[:-1], 1)))
    same = family == _choices.at(family, last)
    chosen = rank < shots[..., None]
    kind = xp.where(valid, xp.where(chosen, 0, xp.where(same, 2, 1)), 3)
    return _choices.at(places, _choices.order(kind.astype(xp.uint32)))


def _lay_out(
    batch: tuple[int, ...], rows: Array, start: Array, sizes: Array, present: Array, slots: int, ways: int
) -> Examples:
    """Lays out examples `start .. start + sizes` of each class, class after class, followed by padding."""
    xp = rows.__array_namespace__()
    ends = sizes.cumsum(axis=-1)
    slot = np.arange(slots)
    valid = slot < ends[..., -1:]
    way = (valid * (slot[:, None] >= ends[..., None, :]).sum(axis=-1)).astype(ends.dtype)
    place = way * rows.shape[-1] + slot + _choices.at(start - ends + sizes, way)
    chosen = _choices.at(rows.reshape(*rows.shape[:-2], -1), xp.where(valid, place, 0))
    present = xp.pad(xp.asarray(present), [(0, 0)] * (present.ndim - 1) + [(0, ways - present.shape[-1])])
    return Examples(
        xp.where(valid, chosen, -1),
        xp.broadcast_to(xp.asarray(way, dtype=xp.int32), (*batch, slots)),
        xp.broadcast_to(xp.asarray(valid), (*batch, slots)),
        xp.broadcast_to(present, (*batch, ways)),
    )
