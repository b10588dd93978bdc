"""The interface of episode sources, and the class-indexed source that most sources use.

A source consists of a rule that turns random bits into episodes, and of the examples that the episodes refer to. It
does not depend on streams, devices or TensorFlow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from metajax.core import _validate
from metajax.core._types import Episode, Examples, PyTree, TaskType
from metajax.data import _choices, _sampling
from metajax.data._spec import EpisodeSpec, Imbalanced
from metajax.tasks import classification

SPLITS = ("train", "val", "test")

# (examples, rows [...]) -> leaves [..., *shape]; rows of -1 are padding and give zeros
Take = Callable[[PyTree, Any], PyTree]


class Drawn(NamedTuple):
    """Drawn episodes whose examples have not been read yet.

    Attributes:
      episode: of size `spec.capacity`; its inputs are rows of the source's examples, or values if it has no examples.
      extra: other data that `finish` needs; leaves have the batch axes of the episodes.

    >>> Drawn._fields
    ('episode', 'extra')
    """

    episode: Episode
    extra: Any = ()


class Source(Protocol):
    """The interface of a source of episodes.

    `draw` chooses examples from random bits; `finish` loads them. Between the two, a batch can be cut to its size and
    split among hosts. Both are pure functions of arrays. `draw` takes NumPy arrays (with a leading axis of episodes) or
    JAX arrays (of one episode); `finish` also takes TensorFlow arrays (with a leading axis), in the pipeline's graph.

    Attributes:
      name: the name in reports.
      split: "train", "val" or "test".
      examples: the examples that rows refer to, leaves `[n, ...]`: arrays, or objects with `shape`, `dtype` and
        `take(rows, axis=0)`. It has no leaves if `draw` creates values.
      length_buckets: the static lengths of sequences, () if examples have no length. Sequences lie along axis 1 of the
        examples, or along `length_axis` if the source has that attribute.

    A source may also have a task type: `task`, a `metajax.TaskType`, or None if the type is unknown (custom targets). A
    source with classes also has `num_classes`, `class_names`, `label_bits` and `draw_labelled(bits)`, which draws
    single examples from all classes for supervised pre-training (see `batches`).
    """

    @property
    def name(self) -> str: ...

    @property
    def split(self) -> str: ...

    @property
    def examples(self) -> PyTree: ...

    @property
    def length_buckets(self) -> tuple[int, ...]: ...

    def check(self, spec: EpisodeSpec) -> None:
        """Raises a ValueError if this source cannot provide episodes of this size."""
        ...

    def bits(self, spec: EpisodeSpec) -> int:
        """Returns how many 32-bit random numbers an episode needs."""
        ...

    def tables(self, spec: EpisodeSpec) -> PyTree:
        """Returns the small arrays that `draw` reads; on a device they are an argument of the compiled program."""
        ...

    def draw(self, spec: EpisodeSpec, tables: PyTree, bits: Any) -> Drawn:
        """Draws episodes; `bits` are uint32 `[..., self.bits(spec)]`."""
        ...

    def longest(self, drawn: Drawn) -> np.ndarray:
        """Returns the longest example's length in each episode, `[...]`; 0 if examples have no length (NumPy only)."""
        ...

    def finish(self, drawn: Drawn, examples: PyTree, take: Take) -> Episode:
        """Loads the examples of drawn episodes, which may have been cut to fewer slots."""
        ...


def task_of(source: Any) -> TaskType:
    """Returns the task type of a source, or classification if the source has none.

    >>> import metajax
    >>> task_of(metajax.data.sinusoids()).name
    'regression'
    """
    return getattr(source, "task", None) or classification


@dataclasses.dataclass(frozen=True)
class MadeSource:
    """The base class of sources that create values and so have no examples.

    >>> MadeSource("waves", "train").tables(None)
    ()
    """

    name: str
    split: str
    examples: PyTree = dataclasses.field(default=(), kw_only=True)
    length_buckets: tuple[int, ...] = dataclasses.field(default=(), kw_only=True)
    task: TaskType | None = dataclasses.field(default=None, kw_only=True)

    def tables(self, spec: EpisodeSpec) -> PyTree:
        """Returns (): there is nothing to look up."""
        return ()

    def longest(self, drawn: Drawn) -> np.ndarray:
        """Returns zeros: examples have no lengths."""
        return np.zeros(len(drawn.episode.query.mask), int)

    def finish(self, drawn: Drawn, examples: PyTree, take: Take) -> Episode:
        """Returns the drawn episode."""
        return drawn.episode


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ClassSource:
    """A source of examples that are indexed by class.

    Attributes:
      name: the name in reports.
      split: "train", "val" or "test".
      inputs: leaves `[n, ...]`, all examples; images are uint8 `[n, height, width, channels]`.
      labels: `[n]` integers below the number of classes; an example with a negative label is left out.
      class_names: one name for each class.
      groups: `[num_classes]` integers or None. Classes that share a group (characters that look alike)
        never occur in the same episode.
      families: `[n]` integers or None. Support and query of a class come from different families (fonts, writers)
        if the class has enough examples outside the families of its support.
      nodes: classes (names or numbers) by the name of their node (an alphabet, a domain, a subtree), for hierarchical
        episodes. Nodes may overlap.
      whole_nodes: whether a hierarchical episode of varying ways takes all classes of its node, up to the maximum
        number of ways (the rule of Meta-Dataset for ImageNet); otherwise their number is drawn.
      targets: leaves `[n, ...]`, or None if the class is the target. With custom targets a class is a task:
        episodes have one way, no class mask, and these targets (regression, labels of tokens).
      lengths: `[n]` integers, how much of its length axis an example fills, or None if examples have no length.
      length_buckets: lengths to which this axis is cut, by the longest example of a batch; ascending, the last is the
        size of the axis.
      length_axis: the length axis of the inputs `[n, ...]`: 1, or 2 if an example consists of several sequences.
      truncated: number of examples that were cut because they were longer than the last bucket, if it was counted.
      dropped: number of examples of each class that `at_least` left out.
      task: the task type; by default classification, or None (unknown) with custom targets.

    Raises:
      ValueError: lengths disagree, a class name occurs twice, labels, groups, families or lengths are not integers, a
        node names something that is not a class, or the length buckets do not fit the inputs.

    >>> import numpy as np
    >>> source = ClassSource("toy", "train", np.arange(6.0)[:, None], np.array([0, 0, 0, 1, 1, 1]), ("a", "b"))
    >>> source.num_classes, source.counts.tolist()
    (2, [3, 3])
    """

    name: str
    split: str
    inputs: PyTree
    labels: np.ndarray
    class_names: tuple[str, ...]
    groups: np.ndarray | None = None
    families: np.ndarray | None = None
    nodes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    whole_nodes: bool = False
    targets: PyTree = None
    lengths: np.ndarray | None = None
    length_buckets: tuple[int, ...] = ()
    length_axis: int = 1
    truncated: int = 0
    dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    task: TaskType | None = None
    counts: np.ndarray = dataclasses.field(init=False, repr=False)
    _rows: np.ndarray = dataclasses.field(init=False, repr=False)  # class after class
    _first: np.ndarray = dataclasses.field(init=False, repr=False)  # the start of each class in `_rows`
    _family: np.ndarray | None = dataclasses.field(init=False, repr=False)  # of each of `_rows`, numbered from 0

    def __post_init__(self) -> None:
        _validate.one_of("split", self.split, SPLITS)
        if self.task is None and self.targets is None:
            self._set("task", classification)
        self._set("inputs", jax.tree.map(_array, self.inputs))
        self._set("targets", jax.tree.map(_array, self.targets))
        self._set("class_names", tuple(self.class_names))
        self._set("length_buckets", tuple(self.length_buckets))
        for name in ("labels", "groups", "families", "lengths"):
            if getattr(self, name) is not None:
                self._set(name, _line(name, getattr(self, name)))
        size = len(self.labels)
        for name, value, length, what in (
            ("groups", self.groups, self.num_classes, "classes"),
            ("families", self.families, size, "inputs"),
            ("lengths", self.lengths, size, "inputs"),
            *(("targets", leaf, size, "inputs") for leaf in jax.tree.leaves(self.targets)),
        ):
            if value is not None and value.shape[0] != length:
                raise ValueError(f"{name} must have one entry for each of the {length} {what}, got {value.shape[0]}")
        for leaf in jax.tree.leaves(self.inputs):
            if not leaf.shape or leaf.shape[0] != size:
                found = leaf.shape[0] if leaf.shape else "a scalar"
                raise ValueError(f"labels must have one entry for each of the {found} inputs, got {size}")
        self._check_classes()
        self._check_lengths()
        counts = np.bincount(self.labels[self.labels >= 0], minlength=self.num_classes)
        rows = np.argsort(self.labels, kind="stable")[size - counts.sum() :]
        self._set("counts", counts)
        self._set("_rows", rows)
        self._set("_first", np.cumsum(counts) - counts)
        self._set("_family", None if self.families is None else np.unique(self.families[rows], return_inverse=True)[1])

    def __repr__(self) -> str:
        return f"<{self.name} ({self.split}): {self.num_classes} classes, {self.counts.sum()} examples>"

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_classes(self) -> None:
        if self.num_classes == 0:
            raise ValueError(f"class_names of {self.name} ({self.split}) is empty; a source needs at least one class")
        if len(self.labels) and self.labels.max() >= self.num_classes:
            raise ValueError(
                f"labels must lie below {self.num_classes}, the number of classes, got {self.labels.max()}"
            )
        number = {name: index for index, name in enumerate(self.class_names)}
        if len(number) < self.num_classes:
            twice = next(name for index, name in enumerate(self.class_names) if number[name] != index)
            raise ValueError(f"class_names of {self.name} ({self.split}) must differ, got {twice!r} twice")
        nodes = {}
        for node, members in self.nodes.items():
            unknown = [name for name in members if isinstance(name, str) and name not in number]
            if unknown:
                raise ValueError(
                    f"nodes[{node!r}] names {unknown[0]!r}, which is no class of {self.name} ({self.split})"
                )
            found = [number[name] if isinstance(name, str) else int(name) for name in members]
            if found and not 0 <= min(found) <= max(found) < self.num_classes:
                raise ValueError(f"nodes[{node!r}] must hold classes in [0, {self.num_classes}), got {found}")
            nodes[node] = np.unique(np.asarray(found, np.int64))
        self._set("nodes", nodes)

    def _check_lengths(self) -> None:
        if self.length_buckets:
            if self.lengths is None:
                raise ValueError(f"lengths must be given with length_buckets, {self.length_buckets}, got None")
            axis = self.length_axis
            widest = {leaf.shape[axis] for leaf in jax.tree.leaves(self.inputs) if len(leaf.shape) > axis}
            if list(self.length_buckets) != sorted(set(self.length_buckets)) or {self.length_buckets[-1]} != widest:
                raise ValueError(
                    f"length_buckets must ascend and end with the length of the inputs, {sorted(widest)}, "
                    f"got {self.length_buckets}"
                )
            if len(self.lengths) and not 0 <= self.lengths.min() <= self.lengths.max() <= self.length_buckets[-1]:
                raise ValueError(
                    f"lengths must lie in [0, {self.length_buckets[-1]}], the last of length_buckets, "
                    f"got {self.lengths.min()} to {self.lengths.max()}"
                )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def members(self) -> tuple[np.ndarray, ...]:
        """Rows of each class."""
        return tuple(np.split(self._rows, self._first[1:]))

    @property
    def examples(self) -> PyTree:
        """`(inputs, targets)`, leaves `[n, ...]`."""
        return self.inputs, self.targets

    def at_least(self, examples: int) -> ClassSource:
        """Returns this source without the classes that have fewer examples; `dropped` and `describe` list these.

        Raises:
          ValueError: `examples` is not a positive integer, or no class has that many.
        """
        _validate.positive_int("examples", examples)
        kept = np.flatnonzero(self.counts >= examples)
        if not kept.size:
            raise ValueError(
                f"examples is {examples}, but no class of {self.name} ({self.split}) has so many; "
                f"the largest has {self.counts.max()}"
            )
        small = {
            name: int(count) for name, count in zip(self.class_names, self.counts, strict=True) if count < examples
        }
        return dataclasses.replace(self.of_classes(kept), dropped={**self.dropped, **small})

    def of_classes(self, kept: np.ndarray) -> ClassSource:
        """Returns this source with only the classes of these numbers, in this order."""
        number = np.full(self.num_classes + 1, -1)  # the last entry is for the label -1
        number[kept] = np.arange(len(kept))
        nodes = {node: number[members][number[members] >= 0] for node, members in self.nodes.items()}
        return dataclasses.replace(
            self,
            labels=number[np.maximum(self.labels, -1)],
            class_names=tuple(self.class_names[index] for index in kept),
            groups=None if self.groups is None else self.groups[kept],
            nodes={node: members for node, members in nodes.items() if members.size},
        )

    def _pools(self, spec: EpisodeSpec) -> dict[str, np.ndarray]:
        """Returns the sets of classes from which an episode may be drawn, by name."""
        if not spec.hierarchical:
            return {"": np.arange(self.num_classes)}
        return {node: members for node, members in self.nodes.items() if self._available(members) >= spec.min_ways}

    def _available(self, classes: np.ndarray) -> int:
        """Returns how many of these classes may occur in one episode."""
        return len(classes) if self.groups is None else len(np.unique(self.groups[classes]))

    def check(self, spec: EpisodeSpec) -> None:
        """Raises a ValueError if a class or the source is too small for `spec`."""
        where, pools = f"{self.name} ({self.split})", self._pools(spec)
        what = "classes" if self.groups is None else "classes that may stand in one episode"
        if self.targets is not None and spec.max_ways != 1:
            raise ValueError(f"ways must be 1 for {where}, whose examples have targets of their own, got {spec.ways}")
        if spec.hierarchical and not self.nodes:
            raise ValueError(f"hierarchical must be False for {where}, which has no nodes, got True")
        if not pools:
            most = max(self.nodes, key=lambda node: self._available(self.nodes[node]))
            raise ValueError(
                f"ways is {spec.ways}, but no node of {where} has so many {what}; the largest, {most!r}, has "
                f"{self._available(self.nodes[most])}"
            )
        if not spec.hierarchical and self._available(pools[""]) < spec.min_ways:
            raise ValueError(f"ways is {spec.ways}, but {where} has {self._available(pools[''])} {what}")
        used = np.unique(np.concatenate(list(pools.values())))
        smallest = used[np.argmin(self.counts[used])]
        count, name = self.counts[smallest], self.class_names[smallest]
        needed = 2 if isinstance(spec.shots, Imbalanced) else spec.max_shots + spec.queries
        enough = int((self.counts >= needed).sum())
        hint = f"; source.at_least({needed}) leaves small classes out" if enough >= spec.min_ways else ""
        if isinstance(spec.shots, Imbalanced):
            if count < 2:
                raise ValueError(
                    f"shots is Imbalanced, which takes 2 examples, but class {name!r} of {where} has {count}{hint}"
                )
        elif spec.max_shots + spec.queries > count:
            raise ValueError(
                f"shots + queries is {spec.max_shots} + {spec.queries} = {spec.max_shots + spec.queries}, but class "
                f"{name!r} of {where} has {count} examples{hint}"
            )

    def _facts(self, spec: EpisodeSpec) -> _sampling.Facts:
        return _sampling.Facts(
            classes=self.num_classes,
            groups=0 if self.groups is None else len(np.unique(self.groups)),
            families=0 if self._family is None else int(self._family.max()) + 1,
            width=int(self.counts.max()),
            whole=self.whole_nodes and spec.hierarchical and isinstance(spec.ways, tuple),
        )

    def bits(self, spec: EpisodeSpec) -> int:
        """Returns how many 32-bit random numbers an episode needs."""
        return sum(int(np.prod(shape)) for shape in _sampling.bits_needed(spec, self._facts(spec)).values())

    def tables(self, spec: EpisodeSpec) -> _sampling.Tables:
        """Returns the small arrays that `draw` reads."""
        pools = list(self._pools(spec).values())
        sizes = np.array([self._available(pool) for pool in pools])
        starts = np.cumsum([0, *map(len, pools)])[:-1]
        in_pool = members = None
        if self.groups is not None:
            in_pool = np.stack([np.isin(np.arange(self.num_classes), pool) for pool in pools])
            groups = [np.flatnonzero(self.groups == group) for group in np.unique(self.groups)]
            members = np.full([len(groups), max(map(len, groups))], -1)
            for line, group in zip(members, groups, strict=True):
                line[: len(group)] = group
        return _sampling.Tables(
            starts, sizes, np.concatenate(pools), in_pool, members, self._rows, self._first, self.counts, self._family
        )

    def draw(self, spec: EpisodeSpec, tables: PyTree, bits: Any) -> Drawn:
        """Draws classes without replacement, then disjoint support and query examples of each."""
        return Drawn(_sampling.draw(spec, self._facts(spec), tables, bits))

    def longest(self, drawn: Drawn) -> np.ndarray:
        """Returns the longest example's length in each episode, `[...]`; 0 if examples have no length (NumPy only)."""
        rows = np.concatenate([part.inputs for part in drawn.episode], axis=-1)
        return np.zeros(rows.shape[:-1], int) if self.lengths is None else read(self.lengths, rows).max(axis=-1)

    def finish(self, drawn: Drawn, examples: PyTree, take: Take) -> Episode:
        """Loads the drawn examples."""

        def fill(part: Examples) -> Examples:
            inputs, targets = take(examples, part.inputs)
            if self.targets is None:
                return part._replace(inputs=inputs)
            return part._replace(inputs=inputs, targets=targets, class_mask=None)

        return Episode(fill(drawn.episode.support), fill(drawn.episode.query))

    label_bits = 1

    def draw_labelled(self, bits: Any) -> Drawn:
        """Draws single examples uniformly from all classes, each as the query of an episode; bits `[..., 1]`."""
        rows = self._rows[_choices.below(bits, len(self._rows))]
        query = Examples(rows, self.labels[rows].astype(np.int32), np.ones(rows.shape, bool))
        return Drawn(Episode(jax.tree.map(lambda leaf: leaf[..., :0], query), query))


def _array(leaf: Any) -> Any:
    stored = hasattr(leaf, "take") and hasattr(leaf, "shape") and not isinstance(leaf, jax.Array)
    return leaf if stored else np.asarray(leaf)


def _line(name: str, value: Any) -> np.ndarray:
    line = np.asarray(value)
    if line.ndim != 1 or not np.issubdtype(line.dtype, np.integer):
        raise ValueError(f"{name} must be a line of integers, got {line.dtype} of shape {line.shape}")
    return line


def nodes_of_groups(class_names: Iterable[str]) -> dict[str, list[str]]:
    """Returns the nodes of classes named `GROUP/CLASS`; other classes are in no node.

    >>> nodes_of_groups(["cats/lion", "cats/lynx", "owl"])
    {'cats': ['cats/lion', 'cats/lynx']}
    """
    nodes: dict[str, list[str]] = {}
    for name in class_names:
        if "/" in name:
            nodes.setdefault(name.split("/")[0], []).append(name)
    return nodes


def read(leaf: Any, rows: np.ndarray) -> np.ndarray:
    """Reads rows `[...]` of an array, or of an object with `take`, into a NumPy array; rows of -1 give zeros.

    >>> read(np.array([[1, 2], [3, 4]]), np.array([1, -1])).tolist()
    [[3, 4], [0, 0]]
    """
    values, padding = leaf.take(rows, axis=0), rows < 0
    if padding.any():
        values[padding] = 0
    return values


def cut_to(source: Source, leaf: Any, values: Any, length: Any, *, leading: int = 0) -> Any:
    """Cuts values of a leaf of the examples to `length`, if the leaf has the length axis of its source.

    Args:
      source: the source of the leaf.
      leaf: the leaf, `[n, ...]`.
      values: the leaf itself, or values read from it, with `leading` additional axes.
      length: a length, or a scalar of TensorFlow.
      leading: number of additional leading axes of `values`.

    >>> options = {"lengths": [3, 4], "length_buckets": (2, 4)}
    >>> source = ClassSource("toy", "train", np.zeros([2, 4]), np.zeros(2, int), ("a",), **options)
    >>> cut_to(source, source.inputs, source.inputs, 2).shape, cut_to(source, source.labels, source.labels, 2).shape
    ((2, 2), (2,))
    """
    axis = getattr(source, "length_axis", 1)
    if not source.length_buckets or leaf.shape[axis : axis + 1] != source.length_buckets[-1:]:
        return values
    return values[(slice(None),) * (axis + leading) + (slice(length),)]
