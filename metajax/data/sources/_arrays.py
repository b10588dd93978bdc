"""A source of examples in NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metajax.core._types import PyTree, TaskType
from metajax.data._source import ClassSource
from metajax.data.sources._class_splits import Splits, divide


def arrays(
    inputs: PyTree,
    labels: Any,
    *,
    class_names: Sequence[str] | None = None,
    split: str = "train",
    splits: Splits | None = None,
    nodes: Mapping[str, Sequence[str]] | None = None,
    groups: Any = None,
    families: Any = None,
    targets: PyTree = None,
    task: TaskType | None = None,
    lengths: Any = None,
    length_buckets: Sequence[int] = (),
    name: str = "arrays",
) -> ClassSource:
    """Returns a source of examples that are in memory. Nothing is copied, whatever the split.

    Args:
      inputs: leaves `[n, ...]`; images are uint8 `[n, height, width, channels]`.
      labels: `[n]` integers or texts, one class for each different label; examples with a negative integer are left
        out.
      class_names: one for each different label, in ascending order of the labels; by default the labels as text.
      split: "train", "val" or "test".
      splits: class names by split, or shares that sum to 1, as for `metajax.data.image_folder`. None: the arrays are
        already split, and hold only the classes of this split.
      nodes: class names by node (a domain, a subtree), for hierarchical episodes.
      groups: an integer for each class; classes with the same integer never occur in the same episode.
      families: `[n]` integers; support and query of a class come from different families (writers, recordings).
      targets: leaves `[n, ...]`, if the class is not the target. Then a label is a task, and episodes need
        `EpisodeSpec(ways=1, ...)`: regression, labels of tokens.
      task: the task type of these targets, such as `metajax.tasks.regression`; without targets it is classification.
      lengths: `[n]` integers, how much of axis 1 of the inputs an example fills.
      length_buckets: the lengths to which axis 1 is cut, ascending; the last is its size.
      name: the name in reports.

    Returns:
      A source. Pass groups, families and nodes for all classes; those of other splits are left out.

    Raises:
      ValueError: lengths of the arrays disagree; labels are neither integers nor texts; class names are too few, too
        many or not different; nodes name something that is not a class; lengths do not fit the buckets; `splits` does
        not fit (see `metajax.data.image_folder`).

    >>> images = np.zeros([6, 28, 28, 1], np.uint8)
    >>> labels = ["cat", "owl", "cat", "owl", "elk", "elk"]
    >>> source = arrays(images, labels, split="test", splits={"train": ["cat"], "test": ["owl", "elk"]})
    >>> source.class_names, source.counts.tolist(), source.inputs is images
    (('elk', 'owl'), [2, 2], True)

    For regression, here with two tasks of four points each:

    >>> points = np.linspace(0, 1, 8)[:, None]
    >>> import metajax
    >>> source = arrays(points, [0, 0, 0, 0, 1, 1, 1, 1], targets=points**2, task=metajax.tasks.regression)
    >>> from metajax.data import EpisodeSpec, episode
    >>> episode(source, EpisodeSpec(ways=1, shots=2, queries=2), seed=0, index=0).query.targets.shape
    (2, 1)
    """
    if isinstance(inputs, list):  # a list of numbers would be a tree of scalars
        inputs = np.asarray(inputs)
    numbers, texts = _classes(labels)
    names = texts if class_names is None else _names(class_names, len(texts))
    chosen = set(names) if splits is None else set(divide(names, split, splits, name))
    kept = np.array([place for place, class_name in enumerate(names) if class_name in chosen], int)
    renumbered = np.full(len(names) + 1, -1)  # the last entry is for the label -1
    renumbered[kept] = np.arange(len(kept))
    return ClassSource(
        name,
        split,
        inputs,
        renumbered[numbers],
        tuple(names[place] for place in kept),
        groups=None if groups is None else _groups(groups, len(names))[kept],
        families=families,
        nodes=_nodes(nodes or {}, set(names) - chosen),
        targets=targets,
        task=task,
        lengths=lengths,
        length_buckets=tuple(length_buckets),
    )


def _classes(labels: Any) -> tuple[np.ndarray, list[str]]:
    """Returns the class number of each example, -1 if it is left out, and the label of each class as text."""
    labels = np.asarray(labels)
    texts = labels.dtype.kind in "UT" or (labels.dtype == object and all(isinstance(label, str) for label in labels))
    if labels.ndim != 1 or not (texts or labels.dtype.kind in "iu"):
        raise ValueError(f"labels must be a line of integers or of texts, got {labels.dtype} of shape {labels.shape}")
    values, numbers = np.unique(labels.astype(str) if texts else labels, return_inverse=True)
    negative = 0 if texts else int((values < 0).sum())
    return np.maximum(numbers - negative, -1), [str(value) for value in values[negative:]]


def _names(class_names: Sequence[str], count: int) -> list[str]:
    if isinstance(class_names, str) or not all(isinstance(name, str) for name in class_names):
        raise ValueError(f"class_names must be a list of texts, got {class_names!r}")
    if len(class_names) != count:
        raise ValueError(f"class_names must have one for each of the {count} different labels, got {len(class_names)}")
    if len(set(class_names)) < count:  # here, since the two may be in different splits
        twice = next(name for place, name in enumerate(class_names) if name in class_names[:place])
        raise ValueError(f"class_names must differ, got {twice!r} twice")
    return list(class_names)


def _groups(groups: Any, count: int) -> np.ndarray:
    groups = np.asarray(groups)
    if groups.shape != (count,):
        raise ValueError(f"groups must have one entry for each of the {count} classes, got shape {groups.shape}")
    return groups


def _nodes(nodes: Mapping[str, Sequence[str]], elsewhere: set[str]) -> dict[str, list[str]]:
    """Returns the nodes without the classes of other splits."""
    left = {}
    for node, members in nodes.items():
        if isinstance(members, str) or not all(isinstance(name, str) for name in members):
            raise ValueError(f"nodes[{node!r}] must be a list of class names, got {members!r}")
        own = [name for name in members if name not in elsewhere]
        if own:
            left[node] = own
    return left
