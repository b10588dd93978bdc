"""From a config to its data."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from metajax import data, pretrained, tasks
from metajax.core import TaskType, _validate
from metajax.data import readers
from metajax.run import _registry
from metajax.run._values import plain

Config = Any
_PATHS = ("path", "files", "data_dir")  # arguments of a source that say where its data is


class Facts(NamedTuple):
    """What a run knows of its data once that has been opened, and keeps beside its config.

    Attributes:
      task: the type of its tasks.
      outputs: numbers that a new head gives for an example, None where the model itself decides.
      num_classes: of the training source, None where it has none.
      image: height, width and channels of an image, None for other inputs.

    >>> Facts(tasks.classification, 5, 100, (28, 28, 1)).outputs
    5
    """

    task: TaskType
    outputs: int | None = None
    num_classes: int | None = None
    image: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """The facts as JSON holds them."""
        return {**self._asdict(), "task": self.task.name}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Facts:
        """The facts that `to_json` gave.

        Raises:
          ValueError: the task type is none of metajax.
        """
        known = {task.name: task for task in tasks.ALL}
        if told["task"] not in known:
            raise ValueError(f"task must be one of {', '.join(known)} to be read from a run, got {told['task']!r}")
        image = told["image"] and tuple(told["image"])
        return cls(known[told["task"]], told["outputs"], told["num_classes"], image)


def facts_of(source: data.Source, spec: data.EpisodeSpec) -> Facts:
    """Looks at the training source of a run.

    >>> facts_of(data.sinusoids(), data.EpisodeSpec(1, 5, 5)).outputs
    1
    """
    task = data.task_of(source)
    one = data.episode(source, spec, seed=0, index=0).support
    shape = getattr(one.inputs, "shape", ())
    return Facts(
        task, task.num_outputs(one), getattr(source, "num_classes", None), tuple(shape[1:]) if len(shape) == 4 else None
    )


def open_source(config: Config, split: str, *, path: str | None = None) -> data.Source:
    """Opens the source that a config describes.

    Args:
      config: a whole config.
      split: "train", "val" or "test".
      path: instead of the path in the config, other data of the same kind. Of texts and questions, all labels are
        classes of the split "test", and domains do not matter.

    Raises:
      ValueError: a field that the source does not take or that it refuses.

    >>> from metajax.run import complete
    >>> open_source(complete({"data": {"name": "sinusoids"}}), "test").split
    'test'
    """
    section = plain(config.data)
    other = plain({"val": config.val_data, "test": config.test_data}.get(split, {}))
    section |= {name: value for name, value in other.items() if value is not None}
    if path is not None:
        section = _elsewhere(section, path, split)
    source = _registry.make("source", section, "data", {"split": split, "tokenizer": config.model.get("path")})
    if _validate.int_at_least("min_examples", config.min_examples, 0):
        if not isinstance(source, data.ClassSource):
            raise ValueError(
                f"min_examples must be 0 for {source.name}, which has no classes, got {config.min_examples}"
            )
        if config.min_examples > source.counts.max():
            raise ValueError(
                f"min_examples must be at most {source.counts.max()}, the examples of the largest class of "
                f"{source.name} ({split}), got {config.min_examples}"
            )
        source = source.at_least(config.min_examples)
    _check_tokens(config, source)
    return with_features(config, source)


def _elsewhere(section: dict[str, Any], path: str, split: str) -> dict[str, Any]:
    """The section with its data at another place."""
    taken = _registry.fields("source", section, "data")
    place = next((name for name in _PATHS if name in taken), None)
    if place is None and "size" in taken:  # images that are made, such as glyphs: a folder of such
        return {"name": "image_folder", "path": path, "size": section.get("size"), "channels": 1, "invert": "auto"}
    if place is None:
        raise ValueError(
            f"data must not be given for a run on {section['name']}, which is made and not read, got {path!r}"
        )
    if place != "files":
        return section | {place: path}
    if split != "test":
        raise ValueError(f"split must be 'test' for other texts, which are not divided, got {split!r}")
    undivided = {"splits": {"test": 1.0}, "languages": None, "domain": None, "split_by": "class"}
    return section | {"files": path} | {name: value for name, value in undivided.items() if name in taken}


def open_out_of_scope(config: Config, *, path: str | None = None) -> data.ClassSource | None:
    """Opens the texts of no class that stand beside the test classes of a run on text, as in CLINC150.

    Args:
      config: a whole config.
      path: as for `open_source`.

    Returns:
      A source of one class, of the parts of the file whose names begin with "oos"; None where there are none, as in all
      files but .json.

    Raises:
      ValueError: what the source itself refuses.

    >>> from metajax.run import complete
    >>> open_out_of_scope(complete({"data": {"name": "sinusoids"}}))
    """
    section = plain(config.data)
    section |= {name: value for name, value in plain(config.test_data).items() if value is not None}
    if not {"files", "parts"} <= set(_registry.fields("source", section, "data")):
        return None
    section = _elsewhere(section, path or section["files"], "test")
    (file,) = readers.text_files(section["files"])
    parts = [part for part in readers.parts_of(file) if part.startswith("oos")]
    if not parts:
        return None
    known = {"split": "test", "tokenizer": config.model.get("path")}
    return with_features(config, _registry.make("source", section | {"parts": parts}, "data", known))


def input_form(config: Config, facts: Facts) -> readers.Form:
    """The form in which a run takes its inputs, for `metajax.data.readers.reader_of`.

    Raises:
      ValueError: the run takes numbers or made sequences, which nobody has files of; or its tokenizer is not there.

    >>> from metajax.run import complete
    >>> input_form(complete({}), Facts(tasks.classification, 5, 100, (28, 28, 1))).invert
    'auto'
    """
    section = plain(config.data)
    if "tokenizer" not in section and facts.image is None:
        raise ValueError(f"data must be images or texts, got {section['name']}")
    if "tokenizer" not in section:
        height, width, channels = _sides(facts.image)
        invert = section.get("invert", "auto" if channels == 1 else False)
        return readers.Form("image", size=height if height == width else None, channels=channels, invert=invert)
    encoder = readers.load_tokenizer(
        section["tokenizer"] or config.model.get("path"), section["max_length"], user="adapt",
        pair=not facts.task.classes,
    )  # fmt: skip
    options = {"prefix": section.get("prefix", ""), "on_long": section.get("on_long", "truncate")}
    return readers.Form(
        "text", tokenizer=encoder, lengths=readers.buckets_of(section["max_length"], section["length_buckets"]),
        columns=(section.get("text", "text"), section.get("label", "label")), **options,
    )  # fmt: skip


def _sides(image: tuple[int, ...] | None) -> tuple[int, int, int]:
    """Height, width and channels of an image.

    >>> _sides((28, 28, 1))
    (28, 28, 1)
    """
    assert image is not None
    height, width, channels = image
    return height, width, channels


def begins_pretrained(config: Config) -> bool:
    """Whether the model of a run begins with the weights of a folder, and is no frozen one."""
    return is_pretrained(config) and not config.frozen


def is_pretrained(config: Config) -> bool:
    """Whether the model has weights of a folder.

    >>> from metajax.run import complete
    >>> is_pretrained(complete({}))
    False
    """
    return "weights" in _registry.fields("model", config.model, "model")


def opened_model(config: Config, task: TaskType | None) -> Any:
    """What the folder of a pretrained model describes, whose weights are not read: `(architecture, model)`."""
    head = pretrained.head_of(config.model.path, config.model.head, task)
    _, architecture, model = pretrained.open_model(pathlib.Path(config.model.path), head=head)
    return architecture, model


def _check_tokens(config: Config, source: Any) -> None:
    """Refuses texts that a pretrained model can't read, before anything is trained."""
    inputs = getattr(source, "inputs", None)
    if not is_pretrained(config) or not isinstance(inputs, Mapping) or "tokens" not in inputs:
        return
    architecture, model = opened_model(config, source.task)
    if architecture.kind != "text":
        raise ValueError(f"model.path must hold a model of texts, got {config.model.path!r}")
    longest, positions = inputs["tokens"].shape[-1], architecture.positions
    if positions is not None and longest > positions:
        raise ValueError(
            f"data.max_length must be at most {positions}, which the model has positions for, got {longest}"
        )
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros([1, 1], np.int32))
    rows, largest = shapes["embed"]["embedding"].shape[0], int(inputs["tokens"].max(initial=0))
    if largest >= rows:
        raise ValueError(
            f"data.tokenizer must be that of the model, whose tokens are from 0 to {rows - 1}, got token {largest}"
        )


def with_features(config: Config, source: Any) -> Any:
    """The source, or features of its texts where the config freezes the model that computes them."""
    if not config.frozen:
        return source
    if not is_pretrained(config) or not isinstance(source, data.ClassSource) or not data.task_of(source).classes:
        raise ValueError("frozen must be False but for a pretrained model and labelled texts, got True")
    head = pretrained.head_of(config.model.path, config.model.head, None)
    base = pretrained.load_pretrained_model(config.model.path, head=head, dtype=config.model.dtype)
    return pretrained.features(base.model, base.params, source)


def base_is_beside(config: Config) -> bool:
    """Whether the untrained part of a pretrained model stands beside the state, as a frozen base.

    It does where nothing but the pretrained weights decides it: not in a run that begins with another one.

    >>> from metajax.run import complete
    >>> base_is_beside(complete({}))
    False
    """
    return begins_pretrained(config) and bool(config.training.trainable) and not config.init and not on_batches(config)


def on_batches(config: Config) -> bool:
    """Whether training takes batches of examples of all classes, and no episodes."""
    return config.sampler == "batches"


def weights_sha256(config: Config) -> str | None:
    """A hash of the pretrained weights that a run begins with; None where there are none.

    >>> from metajax.run import complete
    >>> weights_sha256(complete({}))
    """
    if not is_pretrained(config):
        return None
    digest = hashlib.sha256()
    for file in sorted(pathlib.Path(config.model.path).glob("*.safetensors")):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def base_sha256(config: Config) -> str | None:
    """A hash of the weights that are in no checkpoint of a run; None where there are none."""
    return weights_sha256(config) if config.frozen or base_is_beside(config) else None


def check_base(workdir: str | pathlib.Path, config: Config) -> None:
    """Refuses a run over a frozen model whose weights are no more those that it was trained over."""
    path = pathlib.Path(workdir) / "run.json"
    told = json.loads(path.read_text(encoding="utf-8")).get("base_sha256") if path.is_file() else None
    if told is not None and base_sha256(config) not in (None, told):
        raise ValueError(
            f"model.path must hold the weights that the run was trained over, got others in {config.model.path!r}"
        )
