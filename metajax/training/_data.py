"""From a config to its data."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from metajax import data, pretrained, tasks
from metajax.core import TaskType, _validate
from metajax.data.readers import Form
from metajax.data.readers._files import parts_of, text_files
from metajax.data.readers._tokens import buckets_of, load_tokenizer

Config = Mapping[str, Any]
_Open = Callable[[str, str, dict[str, Any]], data.Source]  # (path, split, fields)


class Kind(NamedTuple):
    """What a value of `data.name` stands for.

    Attributes:
      open: `(path, split, fields) -> source`.
      task: the type of its tasks.
      inputs: "image", "text", "tokens" or "numbers".
      made: whether its examples are made, and read from no path.
      outputs: `(fields, ways) -> int | None`, numbers that a head gives for an example.

    >>> KINDS["sinusoids"].task.name, KINDS["text"].inputs
    ('regression', 'text')
    """

    open: _Open
    task: TaskType = tasks.classification
    inputs: str = "image"
    made: bool = False
    outputs: Callable[[Mapping[str, Any], int], int | None] = lambda fields, ways: ways


def kind_of(config: Config) -> Kind:
    """What the config's source stands for.

    Raises:
      ValueError: `data.name` is unknown.

    >>> from experiments.configs import maml_sinusoids
    >>> kind_of(maml_sinusoids.get_config()).inputs
    'numbers'
    """
    return KINDS[_validate.one_of("data.name", config["data"]["name"], tuple(KINDS))]


# fields that configs of old do not have
_LATER = {
    "set": "", "splits": "", "cache_mib": 0, "vocab": 256, "length": 64,
    "test_path": "", "val_path": "", "text": "text", "label": "label", "domain": "", "divides": "class", "names": {},
    "languages": {}, "overlap": 128, "tokenizer": "", "buckets": (), "prefix": "", "long": "truncate",
    "at_least": 0,
}  # fmt: skip
_CHARACTERS = ("glyphs", "omniglot")
BATCHES = ("finetune", "moco", "simclr")  # learners that train on batches of examples, and on no episodes
_CHARACTER = 28  # pixels, where data.size is 0
_PUBLISHED = ("cifar_fs", "fc100", "mini_imagenet", "tiered_imagenet", "cub", "meta_dataset")


def open_source(config: Config, split: str, *, path: str | None = None) -> data.Source:
    """Opens the source that `config["data"]` names.

    Args:
      config: a mapping of the fields that `experiments/configs` document.
      split: "train", "val" or "test".
      path: instead of `data.path`, other data of the same kind. Of texts, all labels are classes of the split "test",
        and domains do not matter.

    Raises:
      ValueError: an unknown source, a missing path, or what the source itself refuses.

    >>> from experiments.configs import maml_sinusoids
    >>> open_source(maml_sinusoids.get_config(), "test").split
    'test'
    """
    fields = _fields(config)
    kind, name = kind_of(config), fields["name"]
    texts = kind.inputs == "text"
    if texts and not fields["tokenizer"]:
        raise ValueError("model.path must name the folder of a pretrained model, got ''")
    if name == "glyphs" and path:  # a run on glyphs, looked at on images from elsewhere
        return data.image_folder(path, split=split, **image_options(config))
    given, path = path, path or fields["path"]
    if kind.made and path:
        raise ValueError(f"data.path must be empty for {name}, which are made and not read, got {path!r}")
    if not path and not kind.made and name != "tfds":
        raise ValueError(f"data.path must name the folder of {name}, got {path!r}")
    if name == "tfds" and not fields["set"]:
        raise ValueError(f"data.set must name a set of TensorFlow Datasets, got {fields['set']!r}")
    for field, having in (("set", ("tfds",)), ("splits", ("tfds", "image_folder"))):
        if fields[field] and name not in having:
            raise ValueError(f"data.{field} is for {' and '.join(having)}, not for {name}, got {fields[field]!r}")
    if texts and given:
        if split != "test":
            raise ValueError(f"split must be 'test' for other texts, which are not divided, got {split!r}")
        fields |= {"names": {"test": 1}, "languages": {}, "domain": "", "divides": "class", "test_path": given}
    source = kind.open(path, split, fields)
    if _validate.int_at_least("data.at_least", fields["at_least"], 0):
        if not isinstance(source, data.ClassSource):
            raise ValueError(f"data.at_least must be 0 for {name}, which has no classes, got {fields['at_least']}")
        if fields["at_least"] > source.counts.max():
            raise ValueError(
                f"data.at_least must be at most {source.counts.max()}, the examples of the largest class of "
                f"{source.name} ({split}), got {fields['at_least']}"
            )
        source = source.at_least(fields["at_least"])
    _check_tokens(config, source)
    return with_features(config, source)


def open_out_of_scope(config: Config, *, path: str | None = None) -> data.ClassSource | None:
    """Opens the texts of no class that stand beside the test classes of a run on text, as in CLINC150.

    Args:
      config: a mapping of the fields that `experiments/configs` document.
      path: as for `open_source`.

    Returns:
      A source of one class, of the parts of the file whose names begin with "oos"; None where there are none, as in all
      files but .json.

    Raises:
      ValueError: what the source itself refuses.

    >>> from experiments.configs import maml_sinusoids
    >>> open_out_of_scope(maml_sinusoids.get_config())
    """
    fields = _fields(config)
    kind = kind_of(config)
    if kind.inputs != "text" or not kind.task.classes:
        return None
    (file,) = text_files(path or fields["test_path"] or fields["path"])
    parts = [part for part in parts_of(file) if part.startswith("oos")]
    if not parts:
        return None
    return with_features(
        config, data.text(file, split="test", splits={"test": 1}, parts=parts, **_text_options(fields))
    )


def input_form(config: Config) -> Form:
    """The form in which a run takes its inputs, for `metajax.data.readers.reader_of`.

    Raises:
      ValueError: the run takes numbers or made sequences, which nobody has files of; or its tokenizer is not there.

    >>> from experiments.configs import prototypical_glyphs
    >>> form = input_form(prototypical_glyphs.get_config())
    >>> form.kind, form.size
    ('image', 28)
    """
    kind, fields = kind_of(config), _fields(config)
    if kind.inputs == "image":
        return Form("image", **image_options(config))
    if kind.inputs != "text":
        raise ValueError(f"data.name must be of images or texts, got {fields['name']!r}")
    encoder = load_tokenizer(fields["tokenizer"], fields["length"], user="adapt", pair=not kind.task.classes)
    return Form(
        "text", tokenizer=encoder, lengths=buckets_of(fields["length"], tuple(fields["buckets"]) or None),
        prefix=fields["prefix"], on_long=fields["long"], columns=(fields["text"], fields["label"]),
    )  # fmt: skip


def _text_options(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tokenizer": fields["tokenizer"], "text": fields["text"], "label": fields["label"],
        "max_length": fields["length"], "length_buckets": tuple(fields["buckets"]) or None,
        "prefix": fields["prefix"], "on_long": fields["long"],
    }  # fmt: skip


def _fields(config: Config) -> dict[str, Any]:
    fields = {**_LATER, **config["data"]}
    fields["tokenizer"] = fields["tokenizer"] or config["model"].get("path", "")
    return fields


def _check_tokens(config: Config, source: Any) -> None:
    """Refuses texts that a pretrained model can't read, before anything is trained."""
    if kind_of(config).inputs != "text" or config["model"]["name"] != "pretrained":
        return
    _, architecture, model = pretrained.open_model(pathlib.Path(config["model"]["path"]), head=pretrained_head(config))
    if architecture.kind != "text":
        raise ValueError(f"model.path must hold a model of texts, got {config['model']['path']!r}")
    longest, positions = source.inputs["tokens"].shape[-1], architecture.positions
    if positions is not None and longest > positions:
        raise ValueError(f"data.length must be at most {positions}, which the model has positions for, got {longest}")
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros([1, 1], np.int32))
    rows, largest = shapes["embed"]["embedding"].shape[0], int(source.inputs["tokens"].max(initial=0))
    if largest >= rows:
        raise ValueError(
            f"data.tokenizer must be that of the model, whose tokens are from 0 to {rows - 1}, got token {largest}"
        )


def with_features(config: Config, source: Any) -> Any:
    """The source, or features of its texts where the config freezes the model that computes them."""
    if not config["model"].get("frozen", False):
        return source
    kind = kind_of(config)
    if kind.inputs != "text" or not kind.task.classes:
        raise ValueError(
            f"model.frozen must be False for {config['data']['name']}, which is no labelled text, got True"
        )
    fields = config["model"]
    dtype = _validate.one_of("model.dtype", fields["dtype"], ("float32", "bfloat16"))
    base = pretrained.load_pretrained_model(fields["path"], head=pretrained_head(config), dtype=dtype)
    return pretrained.features(base.model, base.params, source)


def base_is_beside(config: Config) -> bool:
    """Whether the untrained part of a pretrained model stands beside the state, as a frozen base.

    It does where nothing but the pretrained weights decides it: not in a run that begins with another one.

    >>> from experiments.configs import maml_lora_clinc, maml_sinusoids
    >>> base_is_beside(maml_lora_clinc.get_config()), base_is_beside(maml_sinusoids.get_config())
    (True, False)
    """
    whole = config["model"]["name"] != "pretrained" or config["model"].get("frozen", False)
    return not whole and bool(config["outer"].get("trainable")) and not config.get("init") and not on_batches(config)


def on_batches(config: Config) -> bool:
    """Whether training takes batches of examples of all classes, and no episodes."""
    return config["learner"]["name"] in BATCHES


def weights_sha256(config: Config) -> str | None:
    """A hash of the pretrained weights that a run begins with; None where there are none.

    >>> from experiments.configs import maml_sinusoids
    >>> weights_sha256(maml_sinusoids.get_config())
    """
    if config["model"]["name"] != "pretrained":
        return None
    digest = hashlib.sha256()
    for file in sorted(pathlib.Path(config["model"]["path"]).glob("*.safetensors")):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def base_sha256(config: Config) -> str | None:
    """A hash of the weights that are in no checkpoint of a run; None where there are none."""
    frozen = config["model"].get("frozen", False) or base_is_beside(config)
    return weights_sha256(config) if frozen else None


def check_base(workdir: str | pathlib.Path, config: Config) -> None:
    """Refuses a run over a frozen model whose weights are no more those that it was trained over.

    Runs of old do not tell.
    """
    path = pathlib.Path(workdir) / "run.json"
    told = json.loads(path.read_text(encoding="utf-8")).get("base_sha256") if path.is_file() else None
    if told is not None and base_sha256(config) not in (None, told):
        raise ValueError(
            f"model.path must hold the weights that the run was trained over, got others in {config['model']['path']!r}"
        )


def pretrained_head(config: Config) -> str | None:
    """What comes out of a pretrained model: logits of tokens of a decoder that continues texts, and else features."""
    continued = config["learner"]["name"] == "in_context" or "tokens" in kind_of(config).task.heads
    heads = pretrained.read_architecture(pathlib.Path(config["model"]["path"]))[1].heads
    decoder, head = "features" in heads, config["model"]["head"]
    if head == "tokens" and not (continued and decoder):
        raise ValueError(
            "model.head must not be 'tokens', which is no vector of a text, but for in_context and multiple_choice "
            "with a decoder"
        )
    if head or not decoder:
        return head or None
    return "tokens" if continued else "features"


def scores_tokens(config: Config) -> bool:
    """Whether the logits of the tokens of an example are its outputs, and it needs no head."""
    kind = kind_of(config)
    return kind.inputs == "text" and "tokens" in kind.task.heads and pretrained_head(config) == "tokens"


def image_options(config: Config) -> dict[str, Any]:
    """How images from outside are read so that they look like those of the run: size, channels and ink.

    >>> from experiments.configs import prototypical_glyphs
    >>> image_options(prototypical_glyphs.get_config())
    {'size': 28, 'channels': 1, 'invert': 'auto'}
    """
    fields = config["data"]
    if fields["name"] in _CHARACTERS:
        return {"size": fields["size"] or _CHARACTER, "channels": 1, "invert": "auto"}
    if fields["name"] in _PUBLISHED:
        return {"size": fields["size"] or None, "channels": 3, "invert": False}
    return {"size": fields["size"] or None, "channels": fields["channels"] or None, "invert": fields["invert"] or False}


def _omniglot(path: str, split: str, fields: dict[str, Any]) -> data.Source:
    more = {name: fields[name] and split == "train" for name in ("rotations", "mirrored")}
    return data.omniglot(path, split=split, protocol=fields["protocol"], size=fields["size"] or _CHARACTER, **more)


def _folder(path: str, split: str, fields: dict[str, Any]) -> data.Source:
    options = image_options({"data": fields})
    return data.image_folder(path, split=split, splits=_splits(fields), cache_bytes=_cache_bytes(fields), **options)


def _tfds(path: str, split: str, fields: dict[str, Any]) -> data.Source:
    options = image_options({"data": fields}) | {"splits": _splits(fields), "cache_bytes": _cache_bytes(fields)}
    return data.tfds_source(fields["set"], split, data_dir=path or None, **options)


def _published(name: str) -> _Open:
    def opened(path: str, split: str, fields: dict[str, Any]) -> data.Source:
        size = {"size": fields["size"]} if fields["size"] else {}
        return getattr(data, name)(path, split, cache_bytes=_cache_bytes(fields), **size)

    return opened


def _text(path: str, split: str, fields: dict[str, Any]) -> data.Source:
    return data.text(
        fields.get(f"{split}_path") or path, split=split, domain=fields["domain"] or None, split_by=fields["divides"],
        splits=_named(fields["names"]), **_text_options(fields),
    )  # fmt: skip


def _squad(path: str, split: str, fields: dict[str, Any]) -> data.Source:
    languages = _named(fields["languages"])
    spoken = sorted({language for names in (languages or {}).values() for language in names})
    if ("{}" in path) != bool(languages):
        raise ValueError(
            "data.path must have {} in the place of the language where data.languages names some, and else none, got "
            f"{path!r} for {', '.join(spoken) or 'no languages'}"
        )
    files = {language: path.replace("{}", language) for language in spoken} or {"text": path}
    return data.question_answering(
        files, split=split, splits=_named(fields["names"]), languages=languages, tokenizer=fields["tokenizer"],
        max_length=fields["length"], overlap=fields["overlap"], length_buckets=tuple(fields["buckets"]) or None,
    )  # fmt: skip


def _multiple_choice(path: str, split: str, fields: dict[str, Any]) -> data.Source:
    return data.multiple_choice(
        path, split=split, splits=_named(fields["names"]), tokenizer=fields["tokenizer"],
        max_length=fields["length"], length_buckets=tuple(fields["buckets"]) or None,
    )  # fmt: skip


def _named(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a config names for each split, None where it names nothing; shares stay numbers."""
    named = {split: names if isinstance(names, int | float) else list(names) for split, names in given.items()}
    return {split: names for split, names in named.items() if names} or None


def _splits(fields: dict[str, Any]) -> Any:
    return data.class_lists(fields["splits"]) if fields["splits"] else None


def _cache_bytes(fields: dict[str, Any]) -> int | None:
    return _validate.int_at_least("data.cache_mib", fields["cache_mib"], 0) * 2**20 or None


KINDS: dict[str, Kind] = {
    "glyphs": Kind(lambda path, split, fields: data.glyphs(split, size=fields["size"] or _CHARACTER), made=True),
    "omniglot": Kind(_omniglot),
    "image_folder": Kind(_folder),
    "tfds": Kind(_tfds),
    **{name: Kind(_published(name)) for name in _PUBLISHED},
    "cycles": Kind(
        lambda path, split, fields: data.cycles(split=split, vocab=fields["vocab"], length=fields["length"]),
        tasks.next_token_prediction, "tokens", made=True, outputs=lambda fields, ways: fields.get("vocab"),
    ),
    "text": Kind(_text, inputs="text"),
    "squad": Kind(_squad, tasks.spans, "text", outputs=lambda fields, ways: None),
    "multiple_choice": Kind(_multiple_choice, tasks.multiple_choice, "text", outputs=lambda fields, ways: 1),
    "sinusoids": Kind(
        lambda path, split, fields: data.sinusoids(split=split), tasks.regression, "numbers", made=True,
        outputs=lambda fields, ways: 1,
    ),
}  # fmt: skip
