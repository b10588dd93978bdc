"""From a config to its data."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from metajax import data, pretrained
from metajax.core import _validate
from metajax.data.readers._files import parts_of, text_files

Config = Mapping[str, Any]
_Open = Callable[[str, str, dict[str, Any]], data.Source]  # (path, split, fields)

# fields that configs of old do not have
_LATER = {
    "set": "", "splits": "", "cache_mib": 0, "vocab": 256, "length": 64,
    "test_path": "", "val_path": "", "text": "text", "label": "label", "domain": "", "divides": "class", "names": {},
    "languages": {}, "overlap": 128, "tokenizer": "", "buckets": (), "prefix": "", "long": "truncate",
    "at_least": 0,
}  # fmt: skip
_MADE, _CHARACTERS = ("glyphs", "sinusoids", "cycles"), ("glyphs", "omniglot")
_CHARACTER = 28  # pixels, where data.size is 0
TEXTS = ("text", "squad", "multiple_choice")
NOT_IMAGES = (*TEXTS, "cycles", "sinusoids")
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
    name = _validate.one_of("data.name", fields["name"], tuple(_SOURCES))
    if name in TEXTS and not fields["tokenizer"]:
        raise ValueError("model.path must name the folder of a pretrained model, got ''")
    if name == "glyphs" and path:  # a run on glyphs, looked at on images from elsewhere
        return data.image_folder(path, split=split, **image_options(config))
    given, path = path, path or fields["path"]
    if name in _MADE and path:
        raise ValueError(f"data.path must be empty for {name}, which are made and not read, got {path!r}")
    if not path and name not in (*_MADE, "tfds"):
        raise ValueError(f"data.path must name the folder of {name}, got {path!r}")
    if name == "tfds" and not fields["set"]:
        raise ValueError(f"data.set must name a set of TensorFlow Datasets, got {fields['set']!r}")
    for field, having in (("set", ("tfds",)), ("splits", ("tfds", "image_folder"))):
        if fields[field] and name not in having:
            raise ValueError(f"data.{field} is for {' and '.join(having)}, not for {name}, got {fields[field]!r}")
    if name in ("squad", "multiple_choice") and given:
        fields |= {"names": {"test": 1}, "languages": {}}
    if name == "text" and given:
        fields |= {"names": {"test": 1}, "domain": "", "divides": "class", "test_path": given}
    if name in TEXTS and given and split != "test":
        raise ValueError(f"split must be 'test' for other texts, which are not divided, got {split!r}")
    source = _SOURCES[name](path, split, fields)
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
    if fields["name"] != "text":
        return None
    (file,) = text_files(path or fields["test_path"] or fields["path"])
    parts = [part for part in parts_of(file) if part.startswith("oos")]
    if not parts:
        return None
    return with_features(config, data.text(file, split="test", splits={"test": 1}, parts=parts, **text_options(config)))


def text_options(config: Config) -> dict[str, Any]:
    """How texts from outside become tokens like those of the run.

    >>> from experiments.configs import proto_lora_clinc
    >>> text_options(proto_lora_clinc.get_config())["max_length"]
    24
    """
    fields = _fields(config)
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
    if config["data"]["name"] not in TEXTS or config["model"]["name"] != "pretrained":
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
    if config["data"]["name"] != "text":
        raise ValueError(
            f"model.frozen must be False for {config['data']['name']}, which is no labelled text, got True"
        )
    fields = config["model"]
    dtype = _validate.one_of("model.dtype", fields["dtype"], ("float32", "bfloat16"))
    base = pretrained.load_pretrained_model(fields["path"], head=pretrained_head(config), dtype=dtype)
    return pretrained.features(base.model, base.params, source)


def base_sha256(config: Config) -> str | None:
    """A hash of the weights that a frozen model has, which are in no checkpoint; None where they are not frozen.

    >>> from experiments.configs import maml_sinusoids
    >>> base_sha256(maml_sinusoids.get_config())
    """
    if not config["model"].get("frozen", False):
        return None
    digest = hashlib.sha256()
    for file in sorted(pathlib.Path(config["model"]["path"]).glob("*.safetensors")):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


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
    continued = config["learner"]["name"] == "in_context" or config["data"]["name"] == "multiple_choice"
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
    """Whether a choice of a question is scored by the logits of its tokens, and not by one output."""
    return config["data"]["name"] == "multiple_choice" and pretrained_head(config) == "tokens"


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
        splits=_named(fields["names"]), **text_options({"data": fields, "model": {}}),
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


_SOURCES: dict[str, _Open] = {
    "glyphs": lambda path, split, fields: data.glyphs(split, size=fields["size"] or _CHARACTER),
    "omniglot": _omniglot,
    "image_folder": _folder,
    "tfds": _tfds,
    **{name: _published(name) for name in _PUBLISHED},
    "cycles": lambda path, split, fields: data.cycles(split=split, vocab=fields["vocab"], length=fields["length"]),
    "text": _text,
    "squad": _squad,
    "multiple_choice": _multiple_choice,
    "sinusoids": lambda path, split, fields: data.sinusoids(split=split),
}
