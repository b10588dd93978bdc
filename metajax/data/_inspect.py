"""Describes sources and draws episodes."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from metajax.core import _validate
from metajax.core._types import Episode, Examples, PyTree, TaskType
from metajax.data._episodes import check_type
from metajax.data._source import Source

_MAX_ROWS, _MAX_COLUMNS = 20, 24  # most classes, and images of a class, in a figure
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclasses.dataclass(frozen=True)
class Description:
    """A summary of the contents of a source; it prints as a table.

    Attributes:
      rows: one mapping per source (a mixture has several), in order: `name`, `split`, `classes`, `examples`,
        `per_class` (the smallest, the median and the largest class), `nodes` (name to number of classes), `inputs` and
        `targets` (dtype and shape of one), `lengths` (shortest, median, longest), `length_buckets`, `truncated`
        (examples that were cut), `weight` in a mixture, `bytes` decoded, `kept_bytes` in memory, `left_out` (classes
        that `at_least` left out, and their numbers of examples). A value that a source does not have is None.

    >>> Description(({"name": "toy", "classes": 2},))
    name      toy
    classes   2
    """

    rows: tuple[Mapping[str, Any], ...]

    def __str__(self) -> str:
        return "\n\n".join(_table(row) for row in self.rows)

    __repr__ = __str__


def describe(source: Source) -> Description:
    """Describes the contents of a source, without reading its examples.

    Args:
      source: any data source.

    Returns:
      A table; `print(describe(source))` prints it.

    Raises:
      ValueError: `source` is not a data source.

    >>> from metajax.data.sources._glyphs import glyphs
    >>> print(describe(glyphs("val")))
    name      glyphs
    split     val
    classes   54
    examples  2,592: 48 a class
    nodes     1: 54 classes
    inputs    uint8 [28, 28, 1]
    memory    1.9 MiB
    """
    check_type(source)
    parts, weights = getattr(source, "sources", (source,)), getattr(source, "weights", (None,))
    return Description(tuple(_row(part, weight) for part, weight in zip(parts, weights, strict=True)))


def _row(source: Any, weight: float | None) -> dict[str, Any]:
    counts, lengths = getattr(source, "counts", None), getattr(source, "lengths", None)
    labels, nodes = getattr(source, "labels", None), getattr(source, "nodes", {})
    leaves = jax.tree.leaves(source.examples)
    inputs, targets = source.examples if isinstance(source.examples, tuple) and leaves else (None, None)
    if lengths is not None and labels is not None:
        lengths = lengths[labels >= 0]
    return {
        "name": source.name,
        "split": source.split,
        "weight": weight,
        "classes": getattr(source, "num_classes", None),
        "examples": None if counts is None else int(counts.sum()),
        "per_class": _spread(counts),
        "nodes": {name: len(members) for name, members in nodes.items()} or None,
        "inputs": _forms(inputs),
        "targets": _forms(targets),
        "lengths": _spread(lengths),
        "length_buckets": source.length_buckets or None,
        "truncated": getattr(source, "truncated", 0) or None,
        "bytes": sum(leaf.nbytes for leaf in leaves) if leaves else None,
        "kept_bytes": sum(getattr(leaf, "kept_bytes", leaf.nbytes) for leaf in leaves) if leaves else None,
        "left_out": dict(getattr(source, "dropped", {})) or None,
    }


def _spread(counts: np.ndarray | None) -> tuple[int, int, int] | None:
    if counts is None or not counts.size:
        return None
    return int(counts.min()), int(np.median(counts)), int(counts.max())


def _forms(tree: PyTree) -> str | None:
    """Returns dtype and shape, such as `uint8 [28, 28, 1]`; for a dict, those of each leaf with its name."""
    told = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        told.append(f"{name}: " * bool(name) + f"{leaf.dtype} {list(leaf.shape[1:])}")
    return ", ".join(told) or None


def _table(row: Mapping[str, Any]) -> str:
    told = {name: row.get(name) for name in ("name", "split", "weight", "classes", "examples")}
    if row.get("per_class"):
        told["examples"] = f"{row['examples']:,}: {_range(row['per_class'])} a class"
    if row.get("nodes"):
        sizes = sorted(row["nodes"].values())
        told["nodes"] = f"{len(sizes)}: {_range((sizes[0], None, sizes[-1]))} classes"
    told |= {name: row.get(name) for name in ("inputs", "targets")}
    if row.get("lengths"):
        told["lengths"] = f"{_range(row['lengths'])}, cut to {', '.join(map(str, row['length_buckets'] or ()))}"
    told["truncated"] = row.get("truncated")
    if row.get("bytes") is not None:
        held = row["kept_bytes"] == row["bytes"]
        told["memory"] = size_text(row["bytes"]) + ("" if held else f" decoded, {size_text(row['kept_bytes'])} kept")
    if row.get("left_out"):
        names = sorted(row["left_out"])
        few = ", ".join(f"{name!r} ({row['left_out'][name]})" for name in names[:3])
        told["left out"] = f"{len(names)} classes of too few examples: {few}{', ...' * (len(names) > 3)}"
    return "\n".join(f"{name:<9} {value}" for name, value in told.items() if value is not None)


def _range(sizes: tuple[int, int | None, int]) -> str:
    low, median, high = sizes
    if low == high:
        return f"{low:,}"
    return f"{low:,} to {high:,}" + ("" if median is None else f", median {median:,}")


def size_text(count: float) -> str:
    """Formats a number of bytes.

    >>> size_text(512), size_text(64 * 2**20)
    ('512 B', '64.0 MiB')
    """
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.1f} {_UNITS[unit]}" if unit else f"{count} B"


def show(episode: Episode, *, class_names: Any = None, task: TaskType | None = None) -> Any:
    """Draws an episode as a figure.

    Images are drawn in one row for each class, a regression task in one variable as points, and anything else (tokens,
    features) as a matrix with one row for each example. Padding is left out.

    Args:
      episode: one task, without a task axis.
      class_names: names of the episode's classes in order, shown instead of their numbers. An episode does not contain
        the names that its classes have in the source.
      task: the task type, such as `source.task`; None treats targets as class labels if there is a class mask.

    Returns:
      A `matplotlib.figure.Figure`; a notebook displays it, `show(episode).savefig("episode.png")` saves it.

    Raises:
      ValueError: `episode` is not an `Episode`, has a task axis, or has a different number of classes than names.

    >>> from metajax.data import EpisodeSpec, episode, glyphs
    >>> figure = show(episode(glyphs("val"), EpisodeSpec(5, 1, 3), seed=0, index=0))
    >>> len(figure.axes)
    20
    """
    _validate.instance("episode", episode, Episode)
    if np.ndim(episode.support.mask) != 1:
        raise ValueError(
            f"episode must be one task, without a task axis, got a mask of shape {np.shape(episode.support.mask)}"
        )
    parts = {name: _present(part) for name, part in episode._asdict().items()}
    mask = episode.query.class_mask
    if class_names is not None and (mask is None or len(class_names) != np.sum(mask)):
        ways = "no classes" if mask is None else f"{np.sum(mask)} classes"
        raise ValueError(
            f"class_names must have one for each class of the episode, which has {ways}, got {class_names!r}"
        )
    leaf = jax.tree.leaves(parts["query"].inputs)[0]
    targets = jax.tree.leaves(parts["query"].targets)[0]
    classes = mask is not None if task is None else task.classes
    if classes and leaf.ndim == 4 and leaf.shape[-1] in (1, 3):
        return _images(parts, class_names)
    if not classes and leaf.shape[1:] == (1,) and len(targets.reshape(len(targets), -1).T) == 1:
        return _points(parts)
    return _matrices(parts, class_names, classes)


def _present(part: Examples) -> Examples:
    there = np.asarray(part.mask, bool)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[there], part._replace(class_mask=None))


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    class Picture(Figure):
        """A figure that a notebook displays without pyplot."""

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png")
            return file.getvalue()

    return Picture(figsize=(width, height), dpi=110, facecolor="white")


def _images(parts: dict[str, Examples], class_names: Any) -> Any:
    """Draws a row for each class: its support images, a space, its query images."""
    classes = np.unique(np.concatenate([part.targets for part in parts.values()]))[:_MAX_ROWS]
    widths = [
        min(_MAX_COLUMNS, max(int((part.targets == label).sum()) for label in classes)) for part in parts.values()
    ]
    columns = sum(widths) + 1
    size = min(0.7, 14 / columns)
    margin = 1.0 if class_names is None else 0.3 + 0.08 * max(map(len, map(str, class_names)))  # inches
    width = size * columns + margin + 0.2
    figure = _figure(width, size * len(classes) + 0.5)
    grid = figure.add_gridspec(
        len(classes), columns, left=margin / width, right=0.995, bottom=0.01,
        top=1 - 0.35 / (size * len(classes) + 0.5), wspace=0.06, hspace=0.06,
    )  # fmt: skip
    first = 0
    for (name, part), most in zip(parts.items(), widths, strict=True):
        for row, label in enumerate(classes):
            images = part.inputs[part.targets == label][:most]
            for column, image in enumerate(images):
                axes = figure.add_subplot(grid[row, first + column])
                axes.set_axis_off()
                shown = image if image.dtype == np.uint8 else _scaled(image)
                grey = {"cmap": "gray", "vmin": 0, "vmax": 255} if shown.shape[-1] == 1 else {}
                axes.imshow(shown[..., 0] if grey else shown, **grey)
                if not row and not column:
                    axes.set_title(name, fontsize=9, loc="left")
                if not first and not column:
                    told = str(label) if class_names is None else str(class_names[int(label)])
                    axes.text(-0.15, 0.5, told, transform=axes.transAxes, ha="right", va="center", fontsize=8)
        first += most + 1
    return figure


def _scaled(image: np.ndarray) -> np.ndarray:
    low, high = float(image.min()), float(image.max())
    return ((image - low) / max(high - low, 1e-9) * 255).astype(np.uint8)


def _points(parts: dict[str, Examples]) -> Any:
    figure = _figure(5, 3.2)
    axes = figure.add_subplot()
    for (name, part), mark in zip(parts.items(), ("o", "x"), strict=True):
        axes.plot(part.inputs[:, 0], part.targets.reshape(len(part.targets), -1)[:, 0], mark, label=name)
    axes.legend(frameon=False)
    return figure


def _matrices(parts: dict[str, Examples], class_names: Any, classes: bool) -> Any:
    """Draws support above query; each row is an example, and examples of one class are next to each other."""
    figure = _figure(9, 5)
    for place, (name, part) in enumerate(parts.items()):
        axes = figure.add_subplot(2, 1, place + 1)
        labels = jax.tree.leaves(part.targets)[0]
        labels = labels if classes else np.zeros(len(labels), int)
        order = np.argsort(labels, kind="stable")
        leaf = jax.tree.leaves(part.inputs)[-1]
        axes.imshow(leaf.reshape(len(leaf), -1)[order].astype(np.float32), aspect="auto", interpolation="nearest")
        axes.set_title(name, fontsize=9, loc="left")
        known, first = np.unique(labels[order], return_index=True)
        axes.set_yticks(first, [str(label if class_names is None else class_names[label]) for label in known])
    figure.tight_layout()
    return figure
