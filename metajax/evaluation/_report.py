"""An image of a run: the learning curve, and one episode with its predictions."""

from __future__ import annotations

import functools
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from metajax import tasks
from metajax.core._types import Episode, TaskType
from metajax.evaluation._fewshot import Evaluation, Outputs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, RIGHT, WRONG, LINE, OTHER = "#22303c", "#8a97a3", "#2a9d6f", "#d1495b", "#2b6cb0", "#e08e2b"
_MAX_ROWS, _MAX_SHOTS, _MAX_QUERIES = 20, 5, 15  # limits of the drawn episode
_STEP, _SPACE, _LABEL = 1.12, 0.35, 0.75  # image pitch, gap between groups, width of a class number; in image widths
_JUDGED = r"val.*(accuracy|f1)"  # validation scores that are fractions
_RULES: dict[Any, Any] = {
    "font.size": 9, "text.color": INK, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "axes.titlecolor": INK,
    "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "font.family": "DejaVu Sans",
}  # fmt: skip


def report(
    path: str | os.PathLike[str],
    *,
    history: Sequence[Mapping[str, Any]],
    evaluation: Evaluation | None,
    episode: Episode,
    outputs: Outputs | Any,
    title: str,
    task: TaskType | None = None,
) -> None:
    """Draws the learning curve of a run and one episode with its predictions, as a PNG file.

    Images are drawn with a border that marks right and wrong predictions. A regression task in one variable is drawn as
    its curve before and after adaptation, and any other task as a confusion matrix or as predicted against true values.
    The file is written atomically.

    Args:
      path: the file to write. Its folder must exist.
      history: lines of `metrics.jsonl`, each with `step`, `seconds` and some of `loss`, `accuracy`, and (in lines
        of validations) names that start with `val`. It may be empty.
      evaluation: shown above the plots, or None.
      episode: one task, without a task axis.
      outputs: outputs for its query set: `Outputs`, or only the outputs after adaptation.
      title: title of the image.
      task: the task type. None uses that of the evaluation, or classification without an evaluation.

    Raises:
      ValueError: the numbers of outputs and query targets differ.

    >>> import tempfile, pathlib, numpy as np, metajax
    >>> x = np.linspace(-3, 3, 20)[:, None]
    >>> wave = metajax.Examples(x, np.sin(x), np.ones(20, bool))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "report.png"
    ...     report(path, history=[], evaluation=None, episode=metajax.Episode(wave, wave),
    ...            outputs=np.cos(x), title="sine", task=metajax.tasks.regression)
    ...     path.read_bytes()[1:4]
    b'PNG'
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if task is None:
        task = tasks.classification if evaluation is None else evaluation.task
    outputs = jax.tree.map(np.asarray, outputs if isinstance(outputs, Outputs) else Outputs(None, outputs))
    number, targets = len(outputs.after), len(jax.tree.leaves(episode.query.targets)[0])
    if number != targets:
        raise ValueError(f"outputs must have one row for each of the {targets} query examples, got {number}")
    with matplotlib.rc_context(_RULES):
        figure = Figure(figsize=(13, 5.6), dpi=130, facecolor="white")
        canvas = FigureCanvasAgg(figure)
        figure.text(0.045, 0.945, title, fontsize=14, fontweight="bold", va="center")
        if evaluation is not None:
            figure.text(0.045, 0.893, _subtitle(evaluation), fontsize=10, color=INK, va="center")
        _learning_curve(figure, history)
        _draw_episode(figure, episode, outputs, task)
        _write(pathlib.Path(path), canvas)


def _write(path: pathlib.Path, canvas: Any) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            canvas.print_png(file)
        os.chmod(name, 0o644)  # mkstemp creates files that only the owner can read
        os.replace(name, path)
    except BaseException:
        pathlib.Path(name).unlink(missing_ok=True)
        raise


def _subtitle(evaluation: Evaluation) -> str:
    kind = {True: "transductive", False: "inductive", None: "not measured"}[evaluation.transductive]
    policy = evaluation.normalisation or "not stated"
    found = evaluation.summary().replace("+-", "±").replace(" (", "  (")
    source = pathlib.PurePath(evaluation.source).name  # for a folder of images, the name without the path
    return f"{source}  ·  {found}  ·  {kind}, normalisation: {policy}"


# --- the learning curve


def _series(history: Sequence[Mapping[str, Any]], pattern: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps and values of the first name that matches, or empty arrays."""
    names = [name for line in history for name in line if re.fullmatch(pattern, name)]
    if not names:
        return np.zeros(0), np.zeros(0)
    lines = [line for line in history if names[0] in line]
    return np.array([line["step"] for line in lines], float), np.array([line[names[0]] for line in lines], float)


def _learning_curve(figure: Figure, history: Sequence[Mapping[str, Any]]) -> None:
    classes = len(_series(history, "accuracy")[0]) > 0 or len(_series(history, _JUDGED)[0]) > 0
    lower = figure.add_axes((0.045, 0.20, 0.335, 0.25 if classes else 0.585))
    _curve(lower, *_series(history, "loss"), 1, LINE, "training")
    _curve(lower, *_series(history, r"val.*(loss|mse)"), 1, OTHER, "validation", marked=True)
    lower.set_title("loss", loc="left", fontsize=9)
    lower.set_xlabel("steps", fontsize=8, labelpad=2)
    panels = [lower]
    if classes:
        upper = figure.add_axes((0.045, 0.535, 0.335, 0.25), sharex=lower)
        _curve(upper, *_series(history, "accuracy"), 100, LINE, "training")
        _curve(upper, *_series(history, _JUDGED), 100, OTHER, "validation", marked=True)
        upper.set_title("accuracy, %", loc="left", fontsize=9)
        upper.tick_params(labelbottom=False)
        panels.append(upper)
    for axes in panels:
        axes.grid(color="#e7ebee", linewidth=0.8)
        axes.tick_params(labelsize=8)
        if not axes.lines:
            axes.text(0.5, 0.5, "no measurement", transform=axes.transAxes, ha="center", color=FAINT)
    shown = np.concatenate([np.asarray(line.get_ydata(), float) for line in lower.lines] or [np.zeros(0)])
    shown = shown[np.isfinite(shown)]
    if shown.size and shown.min() > 0 and shown.max() > 20 * shown.min():
        lower.set_yscale("log")
    if panels[-1].lines:
        panels[-1].legend(frameon=False, fontsize=8, loc="lower right" if classes else "upper right", ncols=2)
    _minutes(lower, history)


def _curve(
    axes: Axes, steps: np.ndarray, values: np.ndarray, factor: float, colour: str, label: str, marked: bool = False
) -> None:
    if not len(steps):
        return
    values = np.where(np.isfinite(values), factor * values, np.nan)
    if marked or len(steps) < 20:
        marker = "o" if len(steps) < 60 else ""
        axes.plot(steps, values, color=colour, linewidth=1.6, marker=marker, markersize=3, label=label, zorder=3)
        return
    # faint values of single batches, and a running mean over a fortieth of the run
    axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
    width = max(len(steps) // 40, 1)
    known = np.isfinite(values)
    total, count = (np.convolve(row, np.ones(width), "same") for row in (np.where(known, values, 0), known * 1.0))
    means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    axes.plot(steps, means, color=colour, linewidth=1.6, label=label)


def _minutes(axes: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    """Adds a second axis below, in minutes of training."""
    steps, seconds = _series(history, "seconds")
    if len(steps) < 2 or not seconds[-1] > seconds[0] or not steps[-1] > steps[0]:
        return
    steps, first = np.unique(steps, return_index=True)
    minutes = np.maximum.accumulate(seconds[first]) / 60 + 1e-9 * np.arange(len(steps))  # strictly increasing
    # extrapolate with the mean speed, so that both directions are defined on the whole axis
    speed = (minutes[-1] - minutes[0]) / (steps[-1] - steps[0])
    reach = steps[-1] - steps[0]
    steps = np.concatenate([[steps[0] - reach], steps, [steps[-1] + reach]])
    minutes = np.concatenate([[minutes[0] - reach * speed], minutes, [minutes[-1] + reach * speed]])
    below = axes.secondary_xaxis(
        -42 / (axes.bbox.height * 72 / axes.figure.dpi),  # 42 points below
        functions=(functools.partial(_along, steps, minutes), functools.partial(_along, minutes, steps)),
    )
    below.set_xlabel("minutes of training", fontsize=8, labelpad=2)
    below.tick_params(labelsize=8)


def _along(xs: np.ndarray, ys: np.ndarray, x: Any) -> Any:
    return np.interp(x, xs, ys)


# --- the episode


def _draw_episode(figure: Figure, episode: Episode, outputs: Outputs, task: TaskType) -> None:
    axes = figure.add_axes((0.425, 0.035, 0.56, 0.75))
    _DRAWINGS.get(task.name, _draw_values)(axes, episode, outputs)


def _draw_labels(axes: Axes, episode: Episode, outputs: Outputs) -> None:
    support = episode.support
    if outputs.after.ndim == 2 and np.ndim(support.inputs) == 4 and support.inputs.shape[-1] in (1, 3):
        _draw_images(axes, episode, outputs.after)
        return
    axes.set_position((0.5, 0.13, 0.4, 0.655))
    _draw_confusion(axes, episode, outputs.after)


def _draw_ends(axes: Axes, episode: Episode, outputs: Outputs) -> None:
    """Draws the predicted ends of spans, from logits `[n, length, 2]`."""
    axes.set_position((0.45, 0.20, 0.52, 0.585))
    _draw_scatter(axes, episode, Outputs(*(None if logits is None else logits.argmax(axis=1) for logits in outputs)))
    axes.set_xlabel("first and last token of the true answer")


def _draw_values(axes: Axes, episode: Episode, outputs: Outputs) -> None:
    query = episode.query
    axes.set_position((0.45, 0.20, 0.52, 0.585))
    if np.size(outputs.after) != np.size(query.targets):
        axes.set_axis_off()
        axes.text(0.5, 0.5, "outputs and targets have different forms", ha="center", color=FAINT)
        return
    one = np.size(query.targets) == np.size(query.inputs) == len(query.targets)
    (_draw_curve if one else _draw_scatter)(axes, episode, outputs)


def _draw_curve(axes: Axes, episode: Episode, outputs: Outputs) -> None:
    kept = np.asarray(episode.query.mask)
    inputs = np.ravel(episode.query.inputs)[kept]
    order = np.argsort(inputs)

    def line(values: Any) -> np.ndarray:
        return np.ravel(values)[kept][order]

    support = np.asarray(episode.support.mask)
    style: dict[str, Any] = {"linewidth": 1.5, "markersize": 3}
    axes.plot(inputs[order], line(episode.query.targets), "o-", color=FAINT, alpha=0.8, label="true", **style)
    if outputs.before is not None:
        axes.plot(inputs[order], line(outputs.before), "--", color=OTHER, label="before adaptation", **style)
    axes.plot(inputs[order], line(outputs.after), ".-", color=LINE, label="after adaptation", **style)
    axes.plot(
        np.ravel(episode.support.inputs)[support], np.ravel(episode.support.targets)[support], "^", color=WRONG,
        markersize=8, markeredgecolor="white", label="support", zorder=4,
    )  # fmt: skip
    axes.grid(color="#e7ebee", linewidth=0.8)
    axes.set_xlabel("input")
    axes.set_title("one episode: target and prediction", loc="left", fontsize=9)
    axes.margins(y=0.18)
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=4)


def _draw_scatter(axes: Axes, episode: Episode, outputs: Outputs) -> None:
    kept = np.asarray(episode.query.mask)
    true = np.asarray(episode.query.targets, float)[kept].ravel()
    for values, colour, label in ((outputs.before, OTHER, "before"), (outputs.after, LINE, "after")):
        if values is not None:
            axes.plot(true, np.asarray(values, float)[kept].ravel(), ".", color=colour, label=f"{label} adaptation")
    axes.axline((0.0, 0.0), slope=1.0, color=FAINT, linewidth=0.8)
    axes.set_xlabel("true")
    axes.set_title("one episode: predicted against true values", loc="left", fontsize=9)
    axes.legend(frameon=False, fontsize=8)


def _draw_confusion(axes: Axes, episode: Episode, logits: np.ndarray) -> None:
    true, predicted = np.asarray(episode.query.targets), _predicted(logits)
    counted = (true >= 0) & np.reshape(episode.query.mask, (-1,) + (1,) * (true.ndim - 1))
    true, predicted = true[counted], predicted[counted]
    ways = int(max(true.max(initial=0), predicted.max(initial=0))) + 1
    table = np.zeros((ways, ways), int)
    known = predicted >= 0
    np.add.at(table, (true[known], predicted[known]), 1)
    axes.imshow(table, cmap="Blues", vmin=0, vmax=max(table.max(initial=0), 1))
    if ways <= 20:
        for (row, column), count in np.ndenumerate(table):
            if count:
                light = count > 0.6 * table.max()
                axes.text(column, row, str(count), ha="center", va="center", color="white" if light else INK)
        axes.set_xticks(range(ways), [str(way + 1) for way in range(ways)])
        axes.set_yticks(range(ways), [str(way + 1) for way in range(ways)])
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(f"one episode: {np.sum(true == predicted)} of {len(true)} right", loc="left", fontsize=9)


def _predicted(logits: np.ndarray) -> np.ndarray:
    """Returns the class of the largest logit, or -1 if the logits are not usable."""
    logits = np.asarray(logits, np.float32)
    return np.where(np.isfinite(logits.max(axis=-1)), logits.argmax(axis=-1), -1)


def _draw_images(axes: Axes, episode: Episode, logits: np.ndarray) -> None:
    support, query = (_by_class(examples) for examples in (episode.support, episode.query))
    predicted, targets = _predicted(logits), np.asarray(episode.query.targets)
    counted = np.asarray(episode.query.mask) & (targets >= 0)
    classes = sorted(query)[:_MAX_ROWS]
    shots = min(max((len(rows) for rows in support.values()), default=0), _MAX_SHOTS)
    queries = min(max((len(query[way]) for way in classes), default=0), _MAX_QUERIES)
    width, height = axes.bbox.width / axes.figure.dpi, axes.bbox.height / axes.figure.dpi
    plan = _plan_images(len(classes), shots, queries, width, height)
    dark = _dark(episode)
    font = min(9.0, 20 * plan.inches)
    for row, way in enumerate(classes):
        column, below = divmod(row, plan.rows)
        left, top = column * plan.block, below * (plan.lines * _STEP + _SPACE)
        axes.text(left - 0.15, top + 0.5, str(way + 1), ha="right", va="center", fontsize=min(9.0, 30 * plan.inches))
        for index, example in enumerate(support.get(way, [])[:shots]):
            line, place = divmod(index, plan.support)
            _frame(axes, episode.support.inputs[example], left + place * _STEP, top + line * _STEP, dark, FAINT, 0.8)
        for index, example in enumerate(query[way][:queries]):
            line, place = divmod(index, plan.query)
            x, y = left + plan.support * _STEP + _SPACE + place * _STEP, top + line * _STEP
            if predicted[example] == way:
                _frame(axes, episode.query.inputs[example], x, y, dark, RIGHT, 1.3)
                continue
            _frame(axes, episode.query.inputs[example], x, y, dark, WRONG, 2.2)
            axes.text(
                x + 0.95, y + 0.93, "?" if predicted[example] < 0 else str(predicted[example] + 1),
                ha="right", va="bottom", fontsize=font, color="white",
                bbox={"boxstyle": "square,pad=0.12", "facecolor": WRONG, "edgecolor": "none"},
            )  # fmt: skip
    hits = int(np.sum((predicted == targets)[counted]))
    note = "" if hits == counted.sum() else "; a red tag is the class that was predicted"
    text = f"one episode: support, then query images, {hits} of {int(counted.sum())} right{note}"
    axes.set_title(text, loc="left", fontsize=9)
    axes.set_xlim(-_LABEL, plan.block * -(-len(classes) // plan.rows))
    axes.set_ylim(plan.rows * (plan.lines * _STEP + _SPACE), -0.05)
    axes.set_aspect("equal", anchor="NW")
    axes.axis("off")


class _Plan(NamedTuple):
    """The layout of images: blocks of `rows` classes, each class on `lines` lines of `support` and `query` images."""

    inches: float  # side of an image
    rows: int
    lines: int
    support: int
    query: int
    block: float  # width of a block, in images


def _plan_images(classes: int, shots: int, queries: int, width: float, height: float) -> _Plan:
    """Returns the layout with the largest images on `width` x `height` inches."""
    plans = []
    for blocks in range(1, 5):
        for lines in range(1, 5):
            rows, support, query = -(-classes // blocks), -(-shots // lines), -(-queries // lines)
            block = (support + query) * _STEP + _SPACE + _LABEL
            inches = min(width / (blocks * block + _LABEL), height / (rows * (lines * _STEP + _SPACE)))
            plans.append(_Plan(inches, rows, lines, support, query, block))
    return max(plans, key=lambda plan: plan.inches)


def _frame(axes: Axes, image: Any, left: float, top: float, dark: bool, colour: str, width: float) -> None:
    from matplotlib.patches import Rectangle

    _show(axes, image, left, top, dark)
    axes.add_patch(Rectangle((left, top), 1, 1, fill=False, edgecolor=colour, linewidth=width))


def _by_class(examples: Any) -> dict[int, list[int]]:
    """Returns the rows of the kept examples of each class."""
    rows: dict[int, list[int]] = {}
    for row, (target, kept) in enumerate(zip(np.asarray(examples.targets), np.asarray(examples.mask), strict=True)):
        if kept and target >= 0:
            rows.setdefault(int(target), []).append(row)
    return rows


def _dark(episode: Episode) -> bool:
    """Returns whether images are light on black, as characters are stored. `_show` inverts them for print."""
    images = np.asarray(episode.support.inputs, np.float32)
    return images.shape[-1] == 1 and bool(np.median(images) < 0.25 * max(images.max(initial=0), 1e-6))


def _show(axes: Axes, image: Any, left: float, top: float, dark: bool) -> None:
    eight_bit = np.asarray(image).dtype == np.uint8
    pixels: np.ndarray = np.asarray(image, float) / (255 if eight_bit else 1)
    if pixels.min() < 0 or pixels.max() > 1:  # normalised images
        pixels = (pixels - pixels.min()) / max(float(np.ptp(pixels)), 1e-6)
    pixels = np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels
    axes.imshow(
        np.clip(1 - pixels if dark else pixels, 0, 1), extent=(left, left + 1, top + 1, top),
        interpolation="nearest" if len(pixels) < 16 else "antialiased", aspect="auto",
    )  # fmt: skip


_DRAWINGS = {
    tasks.spans.name: _draw_ends,
    **dict.fromkeys(
        (tasks.classification.name, tasks.multiple_choice.name, tasks.next_token_prediction.name), _draw_labels
    ),
}
