"""Adapts a trained learner to labelled images or texts, and predicts other ones.

    python -m metajax.run adapt --workdir=RUN --support=DIR --query=DIR
    python -m metajax.run adapt --workdir=RUN --support=FILE --query=FILE     # a run on text, or on questions

The support folder holds CLASS/NAME.png, one image of a class or more. The query folder holds images, or CLASS/NAME.png
with the classes of the support folder, and then the accuracy is printed too. Both may be zip files.

For a run on text both are files of texts, .jsonl, .csv or .tsv (also .json as CLINC150, and each with .gz). Labels of
the query file may be left out; where it has a column of them, the accuracy is printed too. What is longer than the
run's data.length is truncated and counted, or refused where its data.long says so.

For a run on questions with choices both are .jsonl files of them. Where each question of the query file has an answer,
the accuracy is printed too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags

from metajax.run import _process

_BATCH = 256  # queries that are predicted at once

FLAGS = flags.FlagValues()  # of this launcher alone
_integer = functools.partial(flags.DEFINE_integer, flag_values=FLAGS)
_string = functools.partial(flags.DEFINE_string, flag_values=FLAGS)
_WORKDIR = _string("workdir", None, "Run folder of metajax.run train.", required=True)
_SUPPORT = _string(
    "support", None, "What to adapt to: folder or zip of CLASS/NAME.png, or file of texts.", required=True
)
_QUERY = _string("query", None, "What to predict: folder or zip of images, or file of texts.", required=True)
_STEPS = _integer("steps", None, "Inner steps; as in the run's config by default.")
_CHECKPOINT = _string("checkpoint", "last", "last, best (by validation), or start: the pretrained weights.")
_TEXT = _string("text_column", None, "Column of texts; as in the run's config by default.")
_LABEL = _string("label_column", None, "Column of labels; as in the run's config by default.")


def main() -> int:
    """Adapts, predicts and prints the table."""
    _process.prepare()
    import jax.numpy as jnp

    import metajax
    from metajax.evaluation import softmax
    from metajax.run import _build, _inputs

    config = _inputs.with_columns(_build.load_config(_WORKDIR.value), _TEXT.value, _LABEL.value)
    facts = _build.load_facts(_WORKDIR.value)
    experiment = _build.build(config, facts)
    task = metajax.tasks.of(experiment.learner)
    reader, form = _reader(config, facts)
    _inputs.check_steps(_STEPS.value, config)
    what = "questions" if not task.classes else f"{form.kind}s"
    with _named("support"):
        support = reader.read(form, _SUPPORT.value)
    with _named("query"):
        query = reader.read(form, _QUERY.value, classes=support.classes, labelled=False)
    notes = [
        f"truncated {part.truncated} of {len(part.shown)} {name} {what} to {config.data.max_length} tokens"
        for name, part in (("support", support), ("query", query))
        if part.truncated
    ]
    classes, count = support.classes, len(support.targets)
    if task.classes and len(classes) < 2:
        raise ValueError(f"support must hold two classes at least, got {len(classes)}: {', '.join(classes)}")
    support, query = (part._replace(inputs=_features(config, part.inputs)) for part in (support, query))
    learner, params = _build.load_run(_WORKDIR.value, checkpoint=_CHECKPOINT.value, inputs=support.inputs)
    for name, part in (("support", support), ("query", query)):
        _inputs.check_inputs(name, part.inputs, learner, params)
    if form.kind == "image" and support.inputs.shape[1:] != query.inputs.shape[1:]:
        shapes = (support.inputs.shape[1:], query.inputs.shape[1:])
        raise ValueError(f"query must hold images like support, {shapes[0]}, got {shapes[1]}")

    class_mask = jnp.ones(len(classes), bool) if classes else None
    examples = metajax.Examples(support.inputs, support.targets, jnp.ones(count, bool), class_mask)
    steps = experiment.num_steps if _STEPS.value is None else _STEPS.value
    policy = _build.normalisation(config)
    batch = None if policy == "batch" else _BATCH  # all at once where they depend on each other
    logits = metajax.evaluation.predict(learner, params, examples, query.inputs, num_steps=steps, batch=batch)
    choices = [classes] * len(query.shown) if query.choices is None else query.choices
    probabilities = softmax(np.asarray(logits, np.float64)[:, : max(map(len, choices))])

    note = f" (transductive: the query {what} are predicted together)" if policy == "batch" else ""
    told = f"{len(classes)} classes, " if classes else ""
    print(f"{config.learner.name}, {told}{count} support {what}")
    print(f"normalisation {policy}{note}")
    for line in notes:
        print(line)
    title = "file" if form.kind == "image" else what.removesuffix("s")
    print(_table(title, query.shown, choices, query.targets, probabilities))
    if query.targets is not None:
        right = (probabilities.argmax(axis=1) == query.targets) & np.isfinite(probabilities).all(axis=1)
        print(f"accuracy {100 * right.mean():.2f} % ({len(right)} {what})")
    return 0


def _reader(config: Any, facts: Any) -> tuple[Any, Any]:
    """What reads the files of a run, and the form in which the run takes them."""
    from metajax.data import readers
    from metajax.run import _sources

    try:
        form = _sources.input_form(config, facts)
        return readers.reader_of(facts.task, form.kind), form
    except ValueError as error:
        raise ValueError(
            f"workdir must be a run on images, labelled text or questions with choices, got one on {config.data.name}"
        ) from error


def _features(config: Any, inputs: Any) -> Any:
    """The inputs `[n, ...]`, or what a frozen model makes of them."""
    import jax

    from metajax import data
    from metajax.run._sources import with_features

    labels = np.zeros(len(jax.tree.leaves(inputs)[0]), int)
    return with_features(config, data.ClassSource("the files", "test", inputs, labels, ("",))).inputs


@contextlib.contextmanager
def _named(flag: str) -> Iterator[None]:
    """Names the flag in errors about what it points to."""
    try:
        yield
    except ValueError as error:
        told = str(error).removeprefix("path ").removeprefix("files ").removeprefix("task ")
        raise ValueError(f"{flag} {told}" if told.startswith(("must", "names")) else f"{flag}: {told}") from error


def _table(title: str, names: Any, choices: Any, labels: Any, probabilities: np.ndarray) -> str:
    """A line for each query example.

    Args:
      title: of the examples.
      names: of each.
      choices: of each, what it may be: the classes of the support set, or the choices of a question.
      labels: positions in them, or None.
      probabilities: `[n, choices]`.
    """
    rows: list[tuple[str, ...]] = [(title, "predicted", "probability")]
    for name, possible, row in zip(names, choices, probabilities, strict=True):
        known = np.isfinite(row).all()
        rows.append((name, possible[row.argmax()] if known else "?", f"{row.max():.4f}" if known else "nan"))
    if labels is not None:
        truth = ("true", *(possible[label] for possible, label in zip(choices, labels, strict=True)))
        rows = [(*row, name) for row, name in zip(rows, truth, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
