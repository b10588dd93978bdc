"""Adapts a trained learner to a folder of labelled images, and predicts other images.

    python -m experiments.adapt --workdir=RUN --support=DIR --query=DIR

The support folder holds CLASS/NAME.png, one image of a class or more. The query folder holds images, or CLASS/NAME.png
with the classes of the support folder, and then the accuracy is printed too. Both may be zip files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from experiments import _launch

_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder of experiments.train.", required=True)
_SUPPORT = flags.DEFINE_string("support", None, "Folder or zip of CLASS/NAME.png to adapt to.", required=True)
_QUERY = flags.DEFINE_string("query", None, "Folder or zip of images to predict.", required=True)
_STEPS = flags.DEFINE_integer("steps", None, "Inner steps; as in the run's config by default.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "last, or best (by validation).")


class _Query(NamedTuple):
    """Images to predict: uint8 `[n, h, w, c]`, their names, and the positions of their classes or None."""

    images: np.ndarray
    names: tuple[str, ...]
    labels: np.ndarray | None


def main() -> int:
    """Adapts, predicts and prints the table."""
    _launch.prepare()
    import jax.numpy as jnp

    import metajax
    from experiments import _inputs
    from metajax.data._image_folder import read_image_folder

    config = metajax.training.load_config(_WORKDIR.value)
    experiment = metajax.training.build(config)
    if experiment.metric != "accuracy":
        raise ValueError(f"workdir must be a run on images, got one on {config['data']['name']}")
    options = metajax.training.image_options(config)
    with _named("support"):
        images, labels, classes, _ = read_image_folder(_SUPPORT.value, **options)
    with _named("query"):
        query = _read_query(_QUERY.value, classes, options)
    learner, params = metajax.load_run(_WORKDIR.value, checkpoint=_CHECKPOINT.value)
    for name, inputs in (("support", images), ("query", query.images)):
        _inputs.check_inputs(name, inputs, learner, params)
    if images.shape[1:] != query.images.shape[1:]:
        raise ValueError(f"query must hold images like support, {images.shape[1:]}, got {query.images.shape[1:]}")

    support = metajax.Examples(images, labels, jnp.ones(len(images), bool), jnp.ones(len(classes), bool))
    steps = experiment.eval_steps if _STEPS.value is None else _STEPS.value
    logits = metajax.evaluation.predict(learner, params, support, query.images, num_steps=steps)
    probabilities = _softmax(np.asarray(logits, np.float64)[:, : len(classes)])

    policy = metajax.training.normalisation(config)
    note = " (transductive: the query images are predicted together)" if policy == "batch" else ""
    print(f"{config['learner']['name']}, {len(classes)} classes, {len(images)} support images")
    print(f"normalisation {policy}{note}")
    print(_table(query, classes, probabilities))
    if query.labels is not None:
        right = (probabilities.argmax(axis=1) == query.labels) & np.isfinite(probabilities).all(axis=1)
        print(f"accuracy {100 * right.mean():.2f} % ({len(right)} images)")
    return 0


@contextlib.contextmanager
def _named(flag: str) -> Iterator[None]:
    """Names the flag in errors about what it points to."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{flag} {str(error).removeprefix('path ')}") from error


def _read_query(path: str, classes: tuple[str, ...], options: dict[str, Any]) -> _Query:
    from metajax.data import _images
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
            return _Query(read.images, read.file_names, places[read.labels])
        if not files.names:
            raise ValueError(f"must be a folder of images, got {path!r}, which holds no files")
        images = [
            _images.decode(files.read(name), name, size=options["size"], channels=options["channels"])
            for name in files.names
        ]
        stacked = _images.stack(images, list(files.names), repr(path))
        return _Query(_images.invert_images(stacked, options["invert"]), files.names, None)


def _softmax(logits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)


def _table(query: _Query, classes: tuple[str, ...], probabilities: np.ndarray) -> str:
    rows: list[tuple[str, ...]] = [("file", "predicted", "probability")]
    for name, row in zip(query.names, probabilities, strict=True):
        known = np.isfinite(row).all()
        rows.append((name, classes[row.argmax()] if known else "?", f"{row.max():.4f}" if known else "nan"))
    if query.labels is not None:
        truth = ("true", *(classes[label] for label in query.labels))
        rows = [(*row, name) for row, name in zip(rows, truth, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    _launch.run(main)
