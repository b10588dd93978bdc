"""A model adapted to one task: a classifier from a few examples of each class, or a scorer of choices."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metajax.adaptation import _base
from metajax.adaptation._meta import MetaTrainedModel
from metajax.core import _tree, _validate
from metajax.core._types import Examples, Learner, Params, PyTree
from metajax.data.readers import answered
from metajax.evaluation import softmax
from metajax.learners import Adapted
from metajax.pretrained import (
    FILES,
    PretrainedModel,
    Report,
    named,
    open_model,
    read_preprocessor,
    read_tokenizer,
    tasks_of,
    whole_folder,
)
from metajax.pretrained.tensors import WEIGHTS, Tensors, write

_SIZES = (5, 10, 16, 25, 32, 48, 64)  # of support sets and prediction batches; above, multiples of the last
_FILE = "fast_model.json"
_FILES = (*FILES, "preprocessor_config.json", _FILE)
_RATE = 2e-3  # learning rate of Adam


@dataclasses.dataclass(frozen=True)
class FastModel:
    """A model adapted to one task by `fast_adapt_model`.

    Attributes:
      base: the pretrained model. In a loaded `FastModel`, the leaves of `base` that adaptation changes (all leaves of a
        model without attention, and a layer of one output) already hold their adapted values.
      learner: the learner that adapted the model and predicts with it.
      rank: rank of the adapters.
      adapted: the learner's state for prediction: parameters, the class mask and the head.
      classes_: the labels of the task, sorted; () for questions, which have their own choices.

    >>> FastModel.__name__
    'FastModel'
    """

    base: PretrainedModel
    learner: Learner = dataclasses.field(repr=False)
    rank: int
    adapted: Adapted = dataclasses.field(repr=False)
    classes_: tuple[Any, ...]

    def predict_proba(self, inputs: Any) -> np.ndarray:
        """Returns probabilities `[n, ways]` of `classes_`, in their order, or of choices, 0 beyond those of a question.

        Args:
          inputs: a list of texts, uint8 images `[n, height, width, channels]`, or a list of questions, dicts like the
            lines of `metajax.data.multiple_choice` (answers are ignored).

        Raises:
          ValueError: inputs of another kind, an empty text (reported by its index), or images of another size.
        """
        made = _base.adaptable(self.base, self.rank)
        read = _base.reader(self.base, made.program).encode(_base.form_of(self.base), inputs)
        columns = len(self.classes_) or max(map(len, read.choices or ()))
        logits = []
        for first in range(0, len(inputs), _SIZES[-1]):
            part = jax.tree.map(lambda leaf, first=first: leaf[first : first + _SIZES[-1]], read.inputs)
            padded, mask = _pad(part)
            found = _predict(self.adapted, padded, mask, learner=self.learner)
            logits.append(np.asarray(found, np.float64)[mask, :columns])
        return softmax(np.concatenate(logits))

    def predict(self, inputs: Any) -> list[Any]:
        """Returns the most likely labels of `inputs`, which are as for `predict_proba`; for questions, choice texts."""
        places = self.predict_proba(inputs).argmax(axis=1)
        if self.classes_:
            return [self.classes_[place] for place in places]
        return [question["choices"][place] for question, place in zip(inputs, places, strict=True)]

    def score(self, inputs: Any, labels: Any) -> float:
        """Computes the accuracy on labelled inputs. Labels of questions are indices or texts of the right choices.

        Raises:
          ValueError: as `predict_proba`; the number of labels is wrong, or a label is not in `classes_` or the choices.
        """
        if not self.classes_:
            answers = [question.answer for question in answered(inputs, labels, "inputs", "labels")]
            return float(np.mean(self.predict_proba(inputs).argmax(axis=1) == answers))
        known, labels = set(self.classes_), list(labels)
        unseen = [label for label in labels if label not in known]
        if unseen:
            listed = ", ".join(map(repr, self.classes_))
            raise ValueError(f"labels must be among the classes of the support set, {listed}, got {unseen[0]!r}")
        if len(labels) != len(inputs):
            raise ValueError(f"labels must be one for each of the {len(inputs)} inputs, got {len(labels)}")
        return float(np.mean([a == b for a, b in zip(self.predict(inputs), labels, strict=True)]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves the model as a folder that `FastModel.load` reads without the folder of the base.

        The folder holds safetensors and JSON, including all parameters of the base. It is written completely or not at
        all; a folder of an earlier save is replaced.

        Raises:
          ValueError: there is another folder or a file at `path`.
          ImportError: the safetensors library is not installed.
        """
        told = {
            "classes": list(self.classes_), "rank": self.rank,
            "ways": 0 if self.adapted.class_mask is None else len(np.asarray(self.adapted.class_mask)),
            "options": {key: value for key, value in self.base.options.items() if key != "preprocessor"},
        }  # fmt: skip
        with whole_folder(path, _FILES, lambda folder: (folder / _FILE).is_file()) as folder:
            (folder / "config.json").write_text(json.dumps(self.base.config, indent=2) + "\n", encoding="utf-8")
            if self.base.options.get("preprocessor") is not None:
                text = json.dumps(self.base.options["preprocessor"], indent=2) + "\n"
                (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
            if self.base.tokenizer is not None:
                (folder / "tokenizer.json").write_text(self.base.tokenizer.to_str(), encoding="utf-8")
            write(folder / WEIGHTS, named(_stored(self.adapted)))
            (folder / _FILE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FastModel:
        """Loads a model that `save` wrote.

        Raises:
          ValueError: it is not such a folder, or a file in it is damaged, lacks a tensor or has one of another shape.
        """
        folder = pathlib.Path(path)
        classes, rank, ways, options = _told(folder)
        config, architecture, model = open_model(folder, **options)
        base = PretrainedModel(
            model, {}, config, architecture.kind, None, architecture.positions, architecture.image, Report((), (), ()),
            {**options, "dtype": jnp.dtype(options["dtype"]).name, "preprocessor": read_preprocessor(folder)},
            tasks_of(architecture, options["head"], options["outputs"]),
        )  # fmt: skip
        shapes = _base.abstract(base, model)
        made = _base.adaptable(dataclasses.replace(base, params=shapes), rank)
        without = not made.program.task.classes
        if without == bool(classes):
            raise ValueError(f"{str(folder / _FILE)!r} must hold {'no ' * without}classes, got {classes!r}")
        learner = _base.fast_learner(made, 0, _RATE)
        support = _base.example_support(base, classes, ways)
        like = jax.eval_shape(learner.adapt, _base.abstract(base, made.model), support)
        adapted = like._replace(**_read(folder, _stored(like)), class_mask=_base.class_mask(classes, ways))
        plain = _without(adapted.params, shapes)
        tokenizer = None
        if (folder / "tokenizer.json").is_file():
            tokenizer = read_tokenizer(folder, architecture, plain, user="FastModel.load")
        return cls(dataclasses.replace(base, params=plain, tokenizer=tokenizer), learner, rank, adapted, classes)


def fast_adapt_model(
    model: PretrainedModel | MetaTrainedModel, task: Any, *, steps: int = 10, rate: float = _RATE, rank: int = 8
) -> FastModel:
    """Adapts a model to a new task by a few gradient steps on its examples, in one compiled call.

    Pretrained and meta-trained models are adapted in the same way (Proto-MAML): a linear head on normalised features
    starts at the class means. Then `steps` steps of Adam train it together with the low-rank adapters, or with the
    whole model if it has no attention. Examples are padded to a few static sizes, so that the next task of a similar
    size needs no compilation. A model that scores choices (see `adapt_model`) has no head to start at class means: the
    steps train its adapters, and the layer of one output, on the questions of the task.

    Args:
      model: the result of `load_pretrained_model` or `adapt_model`.
      task: as for `adapt_model`; all its examples are the support set. A source must be a `metajax.data.ClassSource`.
      steps: number of Adam steps; 0 predicts with the class means, or with the unchanged scores of choices.
      rate: learning rate of Adam.
      rank: rank of the adapters of a pretrained model; a meta-trained one has its own.

    Returns:
      A `FastModel` with `predict`, `predict_proba`, `score`, `save` and `classes_`.

    Raises:
      ValueError: `task` is not a task, does not fit the kind of the model, has only one class, an empty text (reported
        by its index), images of another size, or an answer that is not a choice; or an argument is out of range.

    Source: Triantafillou et al. 2020, section 3.3, arXiv:1903.03096.

    >>> import pathlib, tempfile, jax, numpy as np, metajax
    >>> folder, options = pathlib.Path(tempfile.mkdtemp()) / "model", {"width": 8, "normalisation": "layer"}
    >>> images = np.concatenate([np.full([4, 16, 16, 1], value, np.uint8) for value in (0, 255)])
    >>> params = metajax.models.conv4(**options).init(jax.random.key(0), images)
    >>> metajax.save_pretrained_model(folder, params, factory="conv4", options=options, image=(16, 16, 1))
    >>> fast = fast_adapt_model(metajax.load_pretrained_model(folder), (images, ["dark"] * 4 + ["light"] * 4))
    >>> fast.classes_, fast.predict_proba(images).shape
    (('dark', 'light'), (8, 2))
    """
    _validate.int_at_least("steps", steps, 0)
    rate = _validate.positive_float("rate", rate)
    if isinstance(model, MetaTrainedModel):
        base, rank, params = model.base, model.rank, model.params
        made = _base.adaptable(base, rank)
    else:
        made = _base.adaptable(model, rank)
        base, params = model, _base.start(model, made, jax.random.key(0))
    found = _base.read_task(base, made.program, task)
    classes, labels = found.classes, found.targets
    assert labels is not None  # a task always has labels
    learner = _base.fast_learner(made, steps, rate)
    padded, mask = _pad(found.inputs)
    targets = np.zeros(len(mask), np.int32)
    targets[: len(labels)] = labels
    support = Examples(padded, targets, mask, _base.class_mask(classes))
    moved, head, stats = _adapt(params, support, learner=learner, where=made.where, steps=steps)
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((moved, head))):
        raise ValueError(f"rate must be low enough for a finite result, got {rate}: the adapted model is not finite")
    kept = _tree.split(params, made.where)[1]  # the base itself; the call returns only the leaves that adapt
    return FastModel(base, learner, rank, Adapted(_tree.fill(moved, kept), support.class_mask, stats, head), classes)


@functools.partial(jax.jit, static_argnames=("learner", "where", "steps"))
def _adapt(
    params: Params, support: Examples, *, learner: Learner, where: str | None, steps: int
) -> tuple[Params, Any, Any]:
    adapted = learner.adapt(params, support, num_steps=steps)
    return _tree.split(adapted.params, where)[0], adapted.head, adapted.stats


@functools.partial(jax.jit, static_argnames=("learner",))
def _predict(adapted: Adapted, inputs: PyTree, mask: Any, *, learner: Learner) -> jax.Array:
    return learner.predict(adapted, inputs, mask=mask)


def padded_size(count: int) -> int:
    """Returns the static size that holds `count` examples.

    >>> padded_size(25), padded_size(65)
    (25, 128)
    """
    return next((size for size in _SIZES if size >= count), -(-count // _SIZES[-1]) * _SIZES[-1])


def _pad(inputs: PyTree) -> tuple[PyTree, np.ndarray]:
    """Pads inputs with examples of zeros. Returns the inputs, and which examples are not padding `[size]`."""
    count = len(jax.tree.leaves(inputs)[0])
    size = padded_size(count)
    padded = jax.tree.map(lambda leaf: np.pad(leaf, [(0, size - count)] + [(0, 0)] * (leaf.ndim - 1)), inputs)
    return padded, np.arange(size) < count


def _stored(adapted: Adapted) -> dict[str, Any]:
    """Returns the parts of an adapted model that the tensor file stores."""
    return {"params": adapted.params, "stats": adapted.stats, "head": adapted.head}


def _told(folder: pathlib.Path) -> tuple[tuple[Any, ...], int, int, dict[str, Any]]:
    """Reads the classes, rank, ways and model options that `save` wrote."""
    path = folder / _FILE
    if not path.is_file():
        raise ValueError(f"path must be a folder that FastModel.save wrote, with {_FILE}, got {str(folder)!r}")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        classes, options = tuple(told["classes"]), {key: told["options"][key] for key in ("head", "outputs", "remat")}
        rank, ways = _validate.positive_int("rank", told["rank"]), _validate.int_at_least("ways", told["ways"], 0)
        options["dtype"] = jnp.dtype(told["options"]["dtype"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{str(path)!r} must hold classes, rank, ways and options ({error!r})") from error
    if not (2 <= len(classes) <= ways or len(classes) == ways == 0) or not all(
        isinstance(label, str | int) for label in classes
    ):
        raise ValueError(
            f"{str(path)!r} must hold 2 to {ways} classes (none for questions), texts or integers, got {classes!r}"
        )
    return classes, rank, ways, options


def _read(folder: pathlib.Path, like: dict[str, Any]) -> dict[str, Any]:
    """Reads tensors in the form of `like`.

    Raises:
      ValueError: a tensor is missing or has another shape.
    """
    tensors = Tensors(folder)

    def read(path: str, leaf: Any) -> jax.Array:
        if path not in tensors or tensors.shape(path) != leaf.shape:
            found = f"shape {tensors.shape(path)}" if path in tensors else "none"
            raise ValueError(f"{str(folder / WEIGHTS)!r} must hold {path} of shape {leaf.shape}, got {found}")
        return jnp.asarray(tensors.read(path, leaf.dtype))

    return _tree.map_with_path(read, like)


def _without(params: Params, plain: Params) -> Params:
    """Returns the leaves that the model has without adapters."""
    if not isinstance(plain, dict):
        return params
    return {key: _without(params[key], plain[key]) for key in plain}
