"""Few-shot classification on any prepared set of TensorFlow Datasets, without the code of the set and tf.data."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from metajax.core import _validate
from metajax.data import _cache
from metajax.data._source import SPLITS, ClassSource, nodes_of_groups
from metajax.data.readers import _image_store, _images
from metajax.data.sources import _records
from metajax.data.sources._class_splits import Splits, divide

_VERSION = 1  # of the cached arrays
_OPEN_FILES = 128  # most open files of one source: systems allow a process some hundreds
_NAME = re.compile(r"(\w+)(?:/([\w+\-][\w+\-.]*))?(?::((?:\d+|\*)\.(?:\d+|\*)\.(?:\d+|\*)))?")


def tfds_source(
    dataset: str,
    split: str = "train",
    *,
    splits: Splits | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    parts: Sequence[str] | None = None,
    image: str = "image",
    label: str = "label",
    size: int | None = None,
    channels: int | None = None,
    invert: _images.Invert = False,
    cache_bytes: int | None = None,
) -> ClassSource:
    """Loads the classes of a classification set of TensorFlow Datasets that is prepared on disk.

    The examples of all TFDS splits are joined, and their classes are divided again. Nothing is downloaded; neither the
    code that created the set nor TensorFlow is needed. Shards may be ArrayRecord or TFRecord files. Each example is
    read by random access, so a set larger than memory needs no shuffle buffers. One pass over the shards reads the
    labels and checks all records; its result is cached on disk. Images of classes outside of the split are not decoded.

    Examples are in the order of the shards, with the TFDS splits sorted by name. Classes without examples and examples
    without a label (-1) are left out. Classes named `GROUP/CLASS` have the groups as nodes for hierarchical episodes.

    Args:
      dataset: as for `tfds.load`: "cifar100", "name:1.0.0", "name/config" or "name/config:1.0.0". Without a version,
        the newest prepared version is used; without a config, the only prepared config.
      split: "train", "val" or "test": selects the classes.
      splits: class names by split, or shares, as for `image_folder`; None gives 64 % train, 16 % val and 20 % test.
      data_dir: the folder of prepared sets; by default the folder in TFDS_DATA_DIR, or ~/tensorflow_datasets.
      parts: the TFDS splits to join, such as `("train", "test")`; None joins all. List them if some repeat the examples
        of others ("omniglot" has "small1" and "small2").
      image: the feature that holds the image.
      label: the feature that holds the class: a `ClassLabel`, or an integer, whose classes are named "0", "1" ...
      size: height and width to resize to, or None if all images have the same size.
      channels: 1 (grey) or 3 (RGB), or None for the channels that the set declares.
      invert: True, False, or "auto": images with a bright border are inverted.
      cache_bytes: None decodes all images now and keeps them in memory. A number decodes images when episodes need
        them and keeps at most this many bytes.

    Returns:
      A source with uint8 inputs `[n, height, width, channels]`, named after the set and its version.

    Raises:
      ValueError: the set is not prepared (the message states the command that prepares it); a split, part or feature
        does not exist or is of another kind; a shard is missing, damaged or cut off (the message names file and place);
        the split has no classes; images differ in size and `size` is None.

    >>> tfds_source("cifar100", data_dir="no/such/folder")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
      ...
    ValueError: dataset must be a set that is prepared in 'no/such/folder', got 'cifar100'; this command ...
    """
    _validate.one_of("split", split, SPLITS)
    _images.check_options(size, channels, invert)
    folder = _find(dataset, data_dir)
    where = f"the set {str(folder)!r}"
    info = _info(folder, where)
    _check_features(info, image, label, where)
    declared = info.features[image].shape[-1]
    if channels is None and declared in (1, 3):
        channels = declared  # a set may hold grey files among RGB ones
    shards = _Shards(info, parts, where)
    index = shards.index(label)

    values, numbers = np.unique(index.labels, return_inverse=True)
    names = _class_names(info.features[label], values, where)
    chosen = divide(names, split, splits, where)
    position = {class_name: number for number, class_name in enumerate(chosen)}
    labels = np.array([position.get(class_name, -1) for class_name in names], np.int32)[numbers]
    rows = np.flatnonzero(labels >= 0)
    own = _Index(*(column[rows] for column in index))

    def load(row: int) -> np.ndarray:
        file, place = shards.open(int(own.shards[row])), int(own.places[row])
        content = _value(file, place, file.read(place), image, "bytes_list")
        decoded = _images.decode(content, file.name(place), size=size, channels=channels)
        return _images.invert_images(decoded[None], invert)[0]

    def told(row: int) -> str:
        return shards.open(int(own.shards[row])).name(int(own.places[row]))

    images = _image_store.read_images(load, told, len(rows), where=where, cache_bytes=cache_bytes)
    return ClassSource(_title(info), split, images, labels[rows], tuple(chosen), nodes=nodes_of_groups(chosen))


def _find(name: str, data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    """Returns the folder of the newest prepared version."""
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise ValueError(f"dataset must be as 'NAME', 'NAME/CONFIG' or 'NAME/CONFIG:1.0.0', got {name!r}")
    if data_dir is None:
        data_dir = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root, (set_name, config, version) = pathlib.Path(data_dir).expanduser(), match.groups()
    top = root / set_name
    prepared = _prepared(top / config if config else top)
    if not config and not prepared and top.is_dir():
        configs = {below.name: found for below in sorted(top.iterdir()) if (found := _prepared(below))}
        if len(configs) > 1:
            listed = ", ".join(f"{set_name}/{one}" for one in configs)
            raise ValueError(f"name must say which config of {name!r} in {str(root)!r} is meant: {listed}")
        prepared = next(iter(configs.values()), {})
    wanted = (version or "*.*.*").split(".")
    fitting = [
        numbers for numbers in prepared
        if all(part in ("*", str(number)) for part, number in zip(wanted, numbers, strict=True))
    ]  # fmt: skip
    if fitting:
        return prepared[max(fitting)]
    there = ", ".join(folder.name for folder in prepared.values())
    sets = sorted(folder.name for folder in root.iterdir() if _any_prepared(folder)) if root.is_dir() else []
    if there:
        there = f", of which only {there} is there"
    elif sets:
        there = f"; there are {', '.join(sets)}"
    raise ValueError(
        f"dataset must be a set that is prepared in {str(root)!r}, got {name!r}{there}; this command prepares it: "
        f"{_command(name, root)}"
    )


def _any_prepared(folder: pathlib.Path) -> bool:
    return folder.is_dir() and bool(_prepared(folder) or any(_prepared(below) for below in folder.iterdir()))


def _prepared(folder: pathlib.Path) -> dict[tuple[int, ...], pathlib.Path]:
    """Returns the prepared versions below a folder."""
    found = {}
    for file in folder.glob("*/dataset_info.json"):
        if re.fullmatch(r"\d+\.\d+\.\d+", file.parent.name) and file.with_name("features.json").is_file():
            found[tuple(map(int, file.parent.name.split(".")))] = file.parent
    return dict(sorted(found.items()))


def _command(name: str, root: pathlib.Path) -> str:
    where = f"data_dir={str(root)!r}).download_and_prepare()"
    if name.partition(":")[0] == "metajax_omniglot":
        return f"python -c \"from metajax.data import builders; builders.Omniglot('FOLDER', {where}\""
    # not `tfds build`, which fails if apache_beam is not installed
    return f'python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}, {where}"'


def _info(folder: pathlib.Path, where: str) -> Any:
    """Returns the `DatasetInfo` of a prepared set, without the code of the set."""
    import tensorflow_datasets as tfds

    try:
        unknown = [name for name in _classes(json.loads((folder / "features.json").read_text())) if _foreign(name)]
        if unknown:  # it would be imported
            raise ValueError(f"features.json names {unknown[0]}, which is no feature of TensorFlow Datasets")
        return tfds.builder_from_directory(folder).info
    except Exception as error:  # the files may hold anything
        raise ValueError(f"{where} cannot be read: {str(error).strip().partition(chr(10))[0]}") from error


def _classes(node: Any) -> Iterator[str]:
    """Yields the Python classes that a features.json names."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if isinstance(value, str) and key in ("pythonClassName", "python_class_name", "type"):
            yield value
        yield from _classes(value)


def _foreign(name: str) -> bool:
    return not name.startswith("tensorflow_datasets.")


def _title(info: Any) -> str:
    """Returns `name:1.0.0` or `name/config:1.0.0`."""
    return ":".join(info.full_name.rsplit("/", 1))


def _check_features(info: Any, image: str, label: str, where: str) -> None:
    import tensorflow_datasets as tfds

    features = dict(info.features) if isinstance(info.features, tfds.features.FeaturesDict) else {}
    for argument, name in (("image", image), ("label", label)):
        if name not in features:
            listed = ", ".join(map(repr, sorted(features)))
            raise ValueError(f"{argument} must be one of the features of {where} ({listed}), got {name!r}")
    if not isinstance(features[image], tfds.features.Image) or features[image].np_dtype != np.uint8:
        raise ValueError(
            f"image must be an Image feature of type uint8, got {image!r}, which is {features[image]!r} in {where}"
        )
    if features[label].shape != () or not np.issubdtype(features[label].np_dtype, np.integer):
        raise ValueError(
            f"label must be a ClassLabel or an integer, got {label!r}, which is {features[label]!r} in {where}"
        )


def _class_names(feature: Any, values: np.ndarray, where: str) -> list[str]:
    """Returns the names of these labels."""
    import tensorflow_datasets as tfds

    if not isinstance(feature, tfds.features.ClassLabel) or feature.num_classes is None:
        return [str(value) for value in values]
    if len(values) and values[-1] >= feature.num_classes:
        raise ValueError(f"{where} has {feature.num_classes} classes, but one of its labels is {values[-1]}")
    return [feature.names[value] for value in values]


class _Index(NamedTuple):
    """The shard, the place in the shard and the label of each labelled example."""

    shards: np.ndarray
    places: np.ndarray
    labels: np.ndarray


class _Shards:
    """The files of a set."""

    def __init__(self, info: Any, parts: Sequence[str] | None, where: str) -> None:
        there = sorted(info.splits)
        if isinstance(parts, str) or (parts is not None and (not parts or set(parts) - set(there))):
            raise ValueError(f"parts must be TFDS splits of {where} ({', '.join(there)}), got {parts!r}")
        form = "tfrecord" if info.file_format is None else info.file_format.value
        if form not in _records.FORMATS:
            raise ValueError(f"{where} must be stored as {' or '.join(_records.FORMATS)}, got {form}")
        paths, self._lengths = list[pathlib.Path](), list[int]()
        for part in there if parts is None else sorted(set(parts)):
            paths += [pathlib.Path(path) for path in info.splits[part].filepaths]
            self._lengths += info.splits[part].shard_lengths
        for path in paths:
            if os.path.relpath(path, info.data_dir).startswith(os.pardir):
                raise ValueError(f"{where} must have its shards below its folder, got {str(path)!r}")
            if not path.is_file():
                raise ValueError(f"{where} lacks the shard {path.name!r}")
        self._paths = paths
        # a dropped file is closed when no thread reads it any more; a reference to self would keep it open in a cycle
        self.open: Callable[[int], _records.RecordFile] = functools.lru_cache(_OPEN_FILES)(
            lambda shard: _records.FORMATS[form](paths[shard])
        )

    def index(self, label: str) -> _Index:
        """Returns the index of all labelled examples, from the cache or by reading their labels."""
        states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in self._paths]
        key = f"tfds index version {_VERSION} of {label!r} in {states} with {self._lengths}"
        return _Index(**_cache.cached(key, functools.partial(self._scan, label)))

    def _scan(self, label: str) -> dict[str, np.ndarray]:
        def scan(shard: int) -> np.ndarray:
            file = self.open(shard)
            entries = [
                (shard, place, _value(file, place, record, label, "int64_list")) for place, record in file.scan()
            ]
            if len(entries) != self._lengths[shard]:
                raise ValueError(
                    f"{str(self._paths[shard])!r} has {len(entries)} records, dataset_info.json says "
                    f"{self._lengths[shard]}: it is cut off, or another file"
                )
            return np.array(entries, np.int64).reshape(-1, 3)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            table = np.concatenate([np.empty([0, 3], np.int64), *pool.map(scan, range(len(self._paths)))])
        table = table[table[:, 2] >= 0]  # -1: not labelled
        return dict(zip(_Index._fields, table.T, strict=True))


def _value(file: _records.RecordFile, place: int, record: bytes, feature: str, kind: str) -> Any:
    """Returns the single value of one feature of an example."""
    from google.protobuf import message
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        (value,) = getattr(tf_example_pb2.Example.FromString(record).features.feature[feature], kind).value
    except (message.DecodeError, ValueError) as error:
        raise ValueError(f"{file.name(place)!r} is no example with one value of {feature!r} ({kind})") from error
    return value
