"""Adapts a trained learner to labelled images or texts, and predicts other ones.

    python -m experiments.adapt --workdir=RUN --support=DIR --query=DIR
    python -m experiments.adapt --workdir=RUN --support=FILE --query=FILE     # a run on text, or on questions

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
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import flags

from experiments import _launch

if TYPE_CHECKING:
    from experiments import _texts

_BATCH = 256  # queries that are predicted at once

_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder of experiments.train.", required=True)
_SUPPORT = flags.DEFINE_string(
    "support", None, "What to adapt to: folder or zip of CLASS/NAME.png, or file of texts.", required=True
)
_QUERY = flags.DEFINE_string(
    "query", None, "What to predict: folder or zip of images, or file of texts.", required=True
)
_STEPS = flags.DEFINE_integer("steps", None, "Inner steps; as in the run's config by default.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "last, best (by validation), or start: the pretrained weights.")
_TEXT = flags.DEFINE_string("text_column", None, "Column of texts; as in the run's config by default.")
_LABEL = flags.DEFINE_string("label_column", None, "Column of labels; as in the run's config by default.")


class _Support(NamedTuple):
    """Labelled inputs, leaves `[n, ...]`; labels `[n]` are positions in `classes`, or of choices where these are ()."""

    inputs: Any
    labels: np.ndarray
    classes: tuple[str, ...]


class _Query(NamedTuple):
    """Inputs to predict, leaves `[n, ...]`.

    Attributes:
      inputs: likewise.
      names: what the table calls them.
      choices: of each, what it may be: the classes of the support set, or the choices of a question.
      labels: positions in them, or None.
    """

    inputs: Any
    names: tuple[str, ...]
    choices: list[tuple[str, ...]]
    labels: np.ndarray | None


def main() -> int:
    """Adapts, predicts and prints the table."""
    _launch.prepare()
    import jax.numpy as jnp

    import metajax
    from experiments import _inputs
    from metajax.evaluation._metrics import softmax

    config = _inputs.with_columns(metajax.training.load_config(_WORKDIR.value), _TEXT.value, _LABEL.value)
    experiment = metajax.training.build(config)
    if experiment.metric != "accuracy":
        raise ValueError(
            f"workdir must be a run on images, labelled text or questions with choices, got one on "
            f"{config['data']['name']}"
        )
    _inputs.check_steps(_STEPS.value, config)
    what = {"text": "texts", "multiple_choice": "questions"}.get(config["data"]["name"], "images")
    notes: list[str] = []
    if what == "images":
        support, query = _read_images(metajax.training.image_options(config))
    else:
        support, query, notes = _read_texts(config) if what == "texts" else _read_questions(config)
    classes, count = support.classes, len(support.labels)
    if len(classes) < 2 and what != "questions":
        raise ValueError(f"support must hold two classes at least, got {len(classes)}: {', '.join(classes)}")
    learner, params = metajax.load_run(_WORKDIR.value, checkpoint=_CHECKPOINT.value, inputs=support.inputs)
    for name, part in (("support", support), ("query", query)):
        _inputs.check_inputs(name, part.inputs, learner, params)
    if what == "images" and support.inputs.shape[1:] != query.inputs.shape[1:]:
        shapes = (support.inputs.shape[1:], query.inputs.shape[1:])
        raise ValueError(f"query must hold images like support, {shapes[0]}, got {shapes[1]}")

    class_mask = jnp.ones(len(classes), bool) if classes else None
    examples = metajax.Examples(support.inputs, support.labels, jnp.ones(count, bool), class_mask)
    steps = experiment.eval_steps if _STEPS.value is None else _STEPS.value
    policy = metajax.training.normalisation(config)
    batch = None if policy == "batch" else _BATCH  # all at once where they depend on each other
    logits = metajax.evaluation.predict(learner, params, examples, query.inputs, num_steps=steps, batch=batch)
    probabilities = softmax(np.asarray(logits, np.float64)[:, : max(map(len, query.choices))])

    note = f" (transductive: the query {what} are predicted together)" if policy == "batch" else ""
    told = f"{len(classes)} classes, " if classes else ""
    print(f"{config['learner']['name']}, {told}{count} support {what}")
    print(f"normalisation {policy}{note}")
    for line in notes:
        print(line)
    print(_table("file" if what == "images" else what.removesuffix("s"), query, probabilities))
    if query.labels is not None:
        right = (probabilities.argmax(axis=1) == query.labels) & np.isfinite(probabilities).all(axis=1)
        print(f"accuracy {100 * right.mean():.2f} % ({len(right)} {what})")
    return 0


@contextlib.contextmanager
def _named(flag: str) -> Iterator[None]:
    """Names the flag in errors about what it points to."""
    try:
        yield
    except ValueError as error:
        told = str(error).removeprefix("path ").removeprefix("files ")
        raise ValueError(f"{flag} {told}" if told.startswith(("must", "names")) else f"{flag}: {told}") from error


def _read_texts(config: dict[str, Any]) -> tuple[_Support, _Query, list[str]]:
    """Support, query, and lines about both."""
    from experiments import _texts

    with _named("support"):
        support = _texts.read(_SUPPORT.value, config)
    with _named("query"):
        query = _texts.read(_QUERY.value, config, classes=support.classes)
    return _as_read(support, query, "texts", config)


def _read_questions(config: dict[str, Any]) -> tuple[_Support, _Query, list[str]]:
    """Likewise, of questions with choices."""
    from experiments import _texts

    with _named("support"):
        support = _texts.read_questions(_SUPPORT.value, config, answered=True)
    with _named("query"):
        query = _texts.read_questions(_QUERY.value, config, answered=False)
    return _as_read(support, query, "questions", config)


def _as_read(
    support: _texts.Texts, query: _texts.Texts, what: str, config: dict[str, Any]
) -> tuple[_Support, _Query, list[str]]:
    assert support.labels is not None  # required of a support file
    notes = [
        f"truncated {part.truncated} of {len(part.shown)} {name} {what} to {config['data']['length']} tokens"
        for name, part in (("support", support), ("query", query))
        if part.truncated
    ]
    choices = [query.classes] * len(query.shown) if query.choices is None else query.choices
    found = _Query(query.inputs, query.shown, choices, query.labels)
    return _Support(support.inputs, support.labels, support.classes), found, notes


def _read_images(options: dict[str, Any]) -> tuple[_Support, _Query]:
    from metajax.data._image_folder import read_image_folder

    with _named("support"):
        images, labels, classes, _ = read_image_folder(_SUPPORT.value, **options)
    with _named("query"):
        query = _read_query(_QUERY.value, classes, options)
    return _Support(images, labels, classes), query


def _read_query(path: str, classes: tuple[str, ...], options: dict[str, Any]) -> _Query:
    from metajax.data.readers import _images
    from metajax.data._image_folder import read_image_folder

    with _images.open_files(path) as files:
        if any("/" in name for name in files.names):
            read = read_image_folder(path, **options)
            unknown = [name for name in read.class_names if name not in classes]
            if unknown:
                raise ValueError(
                    f"must hold classes of support ({', '.join(classes)}), got {', '.join(map(repr, unknown))}"
                )
            places = np.array([classes.index(name) for name in read.class_names])
            return _Query(read.images, read.file_names, [classes] * len(read.labels), places[read.labels])
        if not files.names:
            raise ValueError(f"must be a folder of images, got {path!r}, which holds no files")
        images = [
            _images.decode(files.read(name), name, size=options["size"], channels=options["channels"])
            for name in files.names
        ]
        stacked = _images.stack(images, list(files.names), repr(path))
        inverted = _images.invert_images(stacked, options["invert"])
        return _Query(inverted, files.names, [classes] * len(inverted), None)


def _table(title: str, query: _Query, probabilities: np.ndarray) -> str:
    rows: list[tuple[str, ...]] = [(title, "predicted", "probability")]
    for name, choices, row in zip(query.names, query.choices, probabilities, strict=True):
        known = np.isfinite(row).all()
        rows.append((name, choices[row.argmax()] if known else "?", f"{row.max():.4f}" if known else "nan"))
    if query.labels is not None:
        truth = ("true", *(choices[label] for choices, label in zip(query.choices, query.labels, strict=True)))
        rows = [(*row, name) for row, name in zip(rows, truth, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    _launch.run(main)
