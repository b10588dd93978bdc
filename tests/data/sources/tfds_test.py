"""tfds_source: sets of TensorFlow Datasets, prepared here in both formats; what is read, and what is refused."""

import io
import json
import os
import pathlib
import shlex
import shutil
import socket
import struct
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from PIL import Image

from metajax.data import EpisodeSpec, device_sampler, episode_batch, episodes, tfds_source
from metajax.data.readers import _images
from metajax.data.sources import _class_splits, _records, _tfds

tfds = pytest.importorskip("tensorflow_datasets", reason="needs tensorflow-datasets to prepare sets")
pytest.importorskip("tensorflow", reason="tensorflow-datasets writes TFRecord files with TensorFlow")
pytest.importorskip("array_record", reason="needs array_record to write ArrayRecord files (Linux only)")

FORMATS = ("array_record", "tfrecord")
CLASSES = ("ant", "bee", "cow", "dog", "elk")
SPLITS = {"train": ["cow", "ant"], "val": ["dog"], "test": ["bee"]}


def picture(value, size=6, form="PNG"):
    """A grey image of one value (or given as an array)."""
    array = np.full([size, size], value) if np.isscalar(value) else value
    file = io.BytesIO()
    Image.fromarray(np.asarray(array, np.uint8)).save(file, form)
    return file.getvalue()


class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A set of the given examples, `{TFDS split: [example]}`."""

    name = "made"
    code_path = None  # where TFDS would look for checksums of downloads

    def __init__(self, features, examples, version="1.0.0", **options):
        self.given, self.examples, self.VERSION = features, examples, tfds.core.Version(version)
        super().__init__(**options)

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self.given))

    def _split_generators(self, dl_manager):
        return {part: self._generate_examples(examples) for part, examples in self.examples.items()}

    def _generate_examples(self, examples):
        yield from enumerate(examples)


class MadeTwice(Made, skip_registration=True):
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name, version="1.0.0") for name in ("big", "small")]  # noqa: RUF012


def write(data_dir, form, features, examples, *, shards=1, builder=Made, **options):
    """Prepares a set, and returns its folder."""
    made = builder(features, examples, data_dir=data_dir, file_format=form, **options)
    made.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=shards))
    return pathlib.Path(made.data_dir)


def features(label=None, image=None):
    return {
        "image": image or tfds.features.Image(shape=(None, None, 1)),
        "label": label or tfds.features.ClassLabel(names=CLASSES),
    }


def examples(start, each):
    """Class k has images of the values 10 k + start and on."""
    return [
        {"image": picture(10 * number + start + k), "label": name}
        for k in range(each)
        for number, name in enumerate(CLASSES)
    ]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("METAJAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module", params=FORMATS)
def form(request):
    return request.param


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, form):
    """`made` with 4 examples a class in "train" and 2 in "test", in 3 shards each."""
    folder = tmp_path_factory.mktemp(form)
    write(folder, form, features(), {"train": examples(0, 4), "test": examples(4, 2)}, shards=3)
    return folder


@pytest.fixture
def copy(data_dir, tmp_path):
    """A copy that may be damaged: the folder of the version."""
    shutil.copytree(data_dir, tmp_path / "copy")
    return tmp_path / "copy" / "made" / "1.0.0"


def by_class(source):
    """The values of the images of each class, sorted."""
    images = source.inputs.take(np.arange(len(source.labels)), axis=0)
    return {
        name: sorted(images[members, 0, 0, 0].tolist())
        for name, members in zip(source.class_names, source.members, strict=True)
    }


def test_classes_have_their_images(data_dir):
    source = tfds_source("made", splits=SPLITS, data_dir=data_dir)
    assert (source.name, source.split, source.class_names) == ("made:1.0.0", "train", ("ant", "cow"))
    assert source.inputs.shape == (12, 6, 6, 1)
    assert source.inputs.dtype == np.uint8
    assert by_class(source) == {"ant": [*range(6)], "cow": [*range(20, 26)]}
    for split, expected in (("val", {"dog": [*range(30, 36)]}), ("test", {"bee": [*range(10, 16)]})):
        assert by_class(tfds_source("made", split, splits=SPLITS, data_dir=data_dir)) == expected


def test_classes_are_divided_by_shares(data_dir):
    for splits in (None, {"train": 0.6, "test": 0.4}):
        for split in splits or ("train", "val", "test"):
            source = tfds_source("made", split, splits=splits, data_dir=data_dir)
            assert list(source.class_names) == _class_splits.divide(CLASSES, split, splits, "here")
            assert source.counts.tolist() == [6] * source.num_classes


def test_parts(data_dir):
    read = {parts: by_class(tfds_source("made", splits=SPLITS, data_dir=data_dir, parts=parts)) for parts in (
        ("train",), ("test",), ("test", "train"))}  # fmt: skip
    assert read["train",] == {"ant": [0, 1, 2, 3], "cow": [20, 21, 22, 23]}
    assert read["test",] == {"ant": [4, 5], "cow": [24, 25]}
    one, other = (tfds_source("made", data_dir=data_dir, parts=parts) for parts in (("test", "train"), None))
    np.testing.assert_array_equal(one.inputs, other.inputs)
    for bad in (("train", "val"), "train", ()):
        with pytest.raises(ValueError, match=r"parts must be TFDS splits of the set '.*' \(test, train\), got "):
            tfds_source("made", data_dir=data_dir, parts=bad)


def test_rows_have_one_order_whatever_the_format_and_shards(tmp_path):
    rows = []
    for form in FORMATS:
        for shards in (1, 4):
            made = {"b": examples(0, 4), "a": examples(4, 2)}
            folder = write(tmp_path / f"{form}{shards}", form, features(), made, shards=shards)
            source = tfds_source("made", splits={"train": CLASSES}, data_dir=folder.parents[1])
            rows.append((source.inputs[:, 0, 0, 0].tolist(), source.labels.tolist()))
            if form == "array_record":  # as TFDS itself reads them
                parts = tfds.builder_from_directory(folder).as_data_source()
                theirs = [example for part in ("a", "b") for example in parts[part]]
                assert rows[-1][0] == [int(example["image"].max()) for example in theirs]
                assert rows[-1][1] == [int(example["label"]) for example in theirs]
    assert all(other == rows[0] for other in rows)
    assert rows[0][0] != sorted(rows[0][0]), "TFDS shuffled them"


def test_reading_when_asked_for(data_dir, monkeypatch):
    eager = tfds_source("made", splits=SPLITS, data_dir=data_dir)
    room = 5 * 36
    lazy = tfds_source("made", splits=SPLITS, data_dir=data_dir, cache_bytes=room)
    assert lazy.inputs.cache_bytes == room
    rows = np.random.default_rng(0).integers(12, size=(20, 10))
    for _ in range(2):
        np.testing.assert_array_equal(lazy.inputs.take(rows), eager.inputs[rows])
        assert lazy.inputs.kept_bytes == room
    np.testing.assert_array_equal(lazy.labels, eager.labels)

    spec = EpisodeSpec(ways=2, shots=1, queries=3)
    both = [episode_batch(source, spec, seed=0, start=0, count=5) for source in (eager, lazy)]
    np.testing.assert_array_equal(*(batch.query.inputs for batch in both))


def test_only_the_split_is_read_after_the_labels(data_dir, monkeypatch):
    tfds_source("made", data_dir=data_dir)
    decoded = []
    decode = _images.decode
    monkeypatch.setattr(_images, "decode", lambda *args, **options: decoded.append(args[1]) or decode(*args, **options))
    monkeypatch.setattr(_records.ArrayRecordFile, "scan", lambda self: pytest.fail("the labels are cached"))
    monkeypatch.setattr(_records.TfRecordFile, "scan", lambda self: pytest.fail("the labels are cached"))
    source = tfds_source("made", "test", splits=SPLITS, data_dir=data_dir)
    assert len(set(decoded)) == len(source.labels) == 6
    lazy = tfds_source("made", "test", splits=SPLITS, data_dir=data_dir, cache_bytes=0)
    decoded.clear()
    lazy.inputs.take(np.array([3]))
    assert len(decoded) == 1


def test_many_threads_and_few_open_files(data_dir, monkeypatch):
    monkeypatch.setattr(_tfds, "_OPEN_FILES", 2)  # of 6
    before = len(os.listdir("/proc/self/fd"))
    source = tfds_source("made", splits={"train": CLASSES}, data_dir=data_dir, cache_bytes=0)
    eager = tfds_source("made", splits={"train": CLASSES}, data_dir=data_dir)
    rows = np.random.default_rng(0).integers(30, size=(64, 8))
    with ThreadPoolExecutor(8) as pool:
        for images, wanted in zip(pool.map(source.inputs.take, rows), rows, strict=True):
            np.testing.assert_array_equal(images, eager.inputs[wanted])
    assert len(os.listdir("/proc/self/fd")) <= before + 4
    del source, eager, images
    assert len(os.listdir("/proc/self/fd")) == before


def test_episodes_and_the_device_sampler(data_dir):
    source = tfds_source("made", splits={"train": CLASSES}, data_dir=data_dir, cache_bytes=1000)
    spec = EpisodeSpec(ways=3, shots=2, queries=3)
    stream = episodes(source, spec, batch=4, seed=0)
    batch = next(stream)
    stream.close()
    expected = episode_batch(source, spec, seed=0, start=0, count=4)
    np.testing.assert_array_equal(batch.query.inputs, expected.query.inputs)
    data, sample = device_sampler(source, spec)
    drawn = jax.vmap(sample, in_axes=(None, 0))(data, jax.random.split(jax.random.key(0), 4))
    for episode in (batch, drawn):
        support, query = (np.asarray(part.inputs)[..., 0, 0, 0] for part in (episode.support, episode.query))
        assert support.shape == (4, 6)
        assert query.shape == (4, 9)
        for one in range(4):
            assert len(set(support[one]) | set(query[one])) == 15, "no image twice"
            classes = dict(zip(episode.support.targets[one].tolist(), (support[one] // 10).tolist(), strict=True))
            assert [classes[target] for target in episode.query.targets[one].tolist()] == (query[one] // 10).tolist()


def test_the_network_is_not_needed(data_dir, monkeypatch):
    def refuse(*args, **options):
        raise OSError("no network in this test")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    assert tfds_source("made", data_dir=data_dir).num_classes == 3
    with pytest.raises(ValueError, match="this command prepares it"):
        tfds_source("cifar100", data_dir=data_dir)


def test_what_is_not_prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for name in ("cifar100", "name/config:1.0.0"):
        with pytest.raises(
            ValueError, match=rf"must be a set that is prepared in '{tmp_path}', got '{name}'; "
        ) as told:
            tfds_source(name)
        command = shlex.split(str(told.value).partition("prepares it: ")[2])
        assert command[:2] == ["python", "-c"]
        code = f"tfds.builder({name!r}, data_dir={str(tmp_path)!r}).download_and_prepare()"
        assert command[2] == f"import tensorflow_datasets as tfds; {code}"
    with pytest.raises(ValueError, match=r"builders.Omniglot\('FOLDER', data_dir='here'\).download_and_prepare\(\)"):
        tfds_source("metajax_omniglot", data_dir="here")
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=rf"prepared in '{tmp_path}/tensorflow_datasets'"):
        tfds_source("cifar100")
    for bad in ("", "../made", "made/..", "made:1", "made:1.0", "kaggle:made", None):
        with pytest.raises(ValueError, match=r"dataset must be as 'NAME', 'NAME/CONFIG' or 'NAME/CONFIG:1.0.0', got "):
            tfds_source(bad)


def test_versions(copy):
    root = copy.parents[1]
    for version in ("1.0.1", "1.0.10", "0.9.0"):
        text = (copy / "dataset_info.json").read_text()
        shutil.copytree(copy, copy.parent / version)
        (copy.parent / version / "dataset_info.json").write_text(text.replace('"1.0.0"', f'"{version}"'))
    (copy.parent / "2.0.0").mkdir()  # not prepared to its end
    for asked, version in {"": "1.0.10", ":1.0.1": "1.0.1", ":0.*.*": "0.9.0", ":*.0.*": "1.0.10"}.items():
        assert tfds_source(f"made{asked}", data_dir=root).name == f"made:{version}"
    with pytest.raises(ValueError, match=r"got 'made:2.0.0', of which only 0.9.0, 1.0.0, 1.0.1, 1.0.10 is there; this"):
        tfds_source("made:2.0.0", data_dir=root)


def test_configs(tmp_path):
    write(tmp_path, "array_record", features(), {"train": examples(0, 2)}, builder=MadeTwice, config="small")
    for name in ("made_twice", "made_twice/small", "made_twice/small:1.0.0"):
        assert tfds_source(name, data_dir=tmp_path).name == "made_twice/small:1.0.0"
    with pytest.raises(ValueError, match=r"must be a set that is prepared in .*, got 'made_twice/big'; "):
        tfds_source("made_twice/big", data_dir=tmp_path)
    write(tmp_path, "array_record", features(), {"train": examples(0, 3)}, builder=MadeTwice, config="big")
    assert tfds_source("made_twice/big", data_dir=tmp_path).counts.tolist() == [3, 3, 3]
    with pytest.raises(ValueError, match=r"config of 'made_twice' in .* is meant: made_twice/big, made_twice/small"):
        tfds_source("made_twice", data_dir=tmp_path)


def test_labels_without_names_and_examples_without_labels(tmp_path):
    made = [{"image": picture(10 * label + k), "label": label} for k in range(2) for label in (3, 7, 12)]
    for label in (np.int64, tfds.features.ClassLabel(num_classes=20)):
        shutil.rmtree(tmp_path / "made", ignore_errors=True)
        test = [{"image": picture(0), "label": -1}] * 3
        write(tmp_path, "array_record", features(label=label), {"train": made, "test": test})
        source = tfds_source("made", splits={"train": ["12", "3"], "test": ["7"]}, data_dir=tmp_path)
        assert source.class_names == ("12", "3"), "class names are texts, and sorted so"
        assert by_class(source) == {"12": [120, 121], "3": [30, 31]}
        with pytest.raises(ValueError, match=r"the set .* '4'"):
            tfds_source("made", splits={"train": ["4"]}, data_dir=tmp_path)
        with pytest.raises(ValueError, match=r"the set .* has 0 class\(es\)"):
            tfds_source("made", data_dir=tmp_path, parts=("test",))


def test_sizes_channels_and_inversion(tmp_path):
    grey, rgb = np.full([8, 6], 40), np.full([4, 4, 3], [10, 20, 30])
    made = [{"image": picture(grey, form="JPEG"), "label": "ant"}, {"image": picture(rgb), "label": "ant"}]
    write(tmp_path, "array_record", features(image=tfds.features.Image()), {"train": made})
    options = {"splits": {"train": ["ant"]}, "data_dir": tmp_path}
    source = tfds_source("made", size=5, **options)
    assert source.inputs.shape == (2, 5, 5, 3), "grey files too: the set declares RGB"
    assert sorted(source.inputs[:, 2, 2].tolist()) == [[10, 20, 30], [40, 40, 40]]
    assert sorted(tfds_source("made", size=5, invert=True, **options).inputs[:, 2, 2, 0].tolist()) == [215, 245]
    assert tfds_source("made", size=5, channels=1, **options).inputs.shape == (2, 5, 5, 1)
    place = r"made-train.array_record-00000-of-00001 at record \d' is \d x \d"
    with pytest.raises(ValueError, match=rf"images in the set .* have different sizes: '.*{place} and '.*{place}"):
        tfds_source("made", **options)
    for bad, text in [
        ({"size": 0}, "size must be"),
        ({"channels": 2}, "channels must be"),
        ({"split": "all"}, "split must be"),
        ({"cache_bytes": -1}, "cache_bytes must be"),
    ]:
        with pytest.raises(ValueError, match=text):
            tfds_source("made", **{"size": 5, **options, **bad})


def test_features_that_are_not_there_or_of_another_kind(tmp_path):
    kinds = {
        "image": tfds.features.Image(shape=(6, 6, 1)), "deep": tfds.features.Image(shape=(6, 6, 1), dtype=np.uint16),
        "label": tfds.features.ClassLabel(names=CLASSES), "text": tfds.features.Text(),
        "line": tfds.features.Tensor(shape=(2,), dtype=np.int64),
    }  # fmt: skip
    made = {"image": picture(0), "deep": picture(0), "label": 0, "text": "", "line": [0, 1]}
    write(tmp_path, "array_record", kinds, {"train": [made]})
    options = {"splits": {"train": ["ant"]}, "data_dir": tmp_path}
    assert tfds_source("made", **options).num_classes == 1
    listed = "'deep', 'image', 'label', 'line', 'text'"
    for bad, text in [
        ({"image": "img"}, rf"image must be one of the features of the set '.*' \({listed}\), got 'img'"),
        ({"label": "class"}, rf"label must be one of the features of the set '.*' \({listed}\), got 'class'"),
        ({"image": "deep"}, r"image must be an Image feature of type uint8, got 'deep', which is Image\(.*uint16\) in"),
        ({"image": "line"}, r"image must be an Image feature of type uint8, got 'line', which is Tensor"),
        ({"label": "text"}, r"label must be a ClassLabel or an integer, got 'text', which is Text"),
        ({"label": "line"}, r"label must be a ClassLabel or an integer, got 'line', which is Tensor"),
    ]:
        with pytest.raises(ValueError, match=text):
            tfds_source("made", **options, **bad)


def starts(path):
    """Where the records of a TFRecord file start, and where it ends."""
    content, places = path.read_bytes(), [0]
    while places[-1] < len(content):
        (length,) = struct.unpack_from("<Q", content, places[-1])
        places.append(places[-1] + 16 + length)
    return places


def flip(path, place, *, quietly=False):
    content, state = bytearray(path.read_bytes()), path.stat()
    content[place] ^= 16
    path.write_bytes(content)
    if quietly:
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.fixture(scope="module")
def noisy(tmp_path_factory, form):
    """A set of images that do not compress, so that most bytes of a shard matter."""
    rng = np.random.default_rng(0)
    made = [{"image": picture(rng.integers(256, size=(64, 64))), "label": name} for name in CLASSES for _ in range(8)]
    return write(tmp_path_factory.mktemp("noisy"), form, features(), {"train": made}, shards=2)


@pytest.fixture
def shard(noisy, tmp_path, form):
    """The second shard of a copy of it."""
    shutil.copytree(noisy.parents[1], tmp_path / "noisy")
    return tmp_path / "noisy" / "made" / "1.0.0" / f"made-train.{form}-00001-of-00002"


@pytest.mark.parametrize("cache_bytes", [None, 0])
def test_a_damaged_shard(shard, form, cache_bytes):
    root = shard.parents[2]
    options = {"splits": {"train": CLASSES}, "data_dir": root, "cache_bytes": cache_bytes}
    tfds_source("made", **options)
    middle = shard.stat().st_size * 5 // 16  # inside of a record, in both formats
    flip(shard, middle, quietly=True)  # the index of labels is cached: found when the image is read
    where = r"'.*made-train.array_record-00001-of-00002 at record \d+' is damaged \(.*hash mismatch"
    if form == "tfrecord":
        place = max(place for place in starts(shard) if place <= middle)
        where = rf"'.*made-train.tfrecord-00001-of-00002 at byte {place}' is damaged: the checksum of its \d+ bytes is"
    with pytest.raises(ValueError, match=where):
        tfds_source("made", **options).inputs.take(np.arange(40), axis=0)
    os.utime(shard)  # found when the labels are read
    with pytest.raises(ValueError, match=where):
        tfds_source("made", **options)


def test_a_shard_that_is_cut_off(shard, form):
    content = shard.read_bytes()
    kept = len(content) * 5 // 16
    where = r"made-train.array_record-00001-of-00002' is no whole ArrayRecord file: it is damaged or cut off"
    if form == "tfrecord":
        place = max(place for place in starts(shard) if place <= kept)
        where = rf"-00001-of-00002 at byte {place}' has \d+ bytes and is cut off: the file has {kept} bytes"
    shard.write_bytes(content[:kept])
    with pytest.raises(ValueError, match=where):
        tfds_source("made", data_dir=shard.parents[2])
    if form == "tfrecord":
        shard.write_bytes(content)
        shard.write_bytes(content[: starts(shard)[2]])
        with pytest.raises(ValueError, match=r"has 2 records, dataset_info.json says 20: it is cut off"):
            tfds_source("made", data_dir=shard.parents[2])
    shard.write_bytes(b"")
    with pytest.raises(ValueError, match=r"-00001-of-00002' (has 0 records, dataset_info.json says 20|is no whole)"):
        tfds_source("made", data_dir=shard.parents[2])
    shard.unlink()
    with pytest.raises(ValueError, match=rf"the set .* lacks the shard 'made-train.{form}-00001-of-00002'"):
        tfds_source("made", data_dir=shard.parents[2])


def test_the_index_follows_the_shards(copy, form, tmp_path, monkeypatch):
    root, calls = copy.parents[1], []
    scan = _tfds._Shards._scan
    monkeypatch.setattr(_tfds._Shards, "_scan", lambda self, label: calls.append(label) or scan(self, label))
    for _ in range(2):
        assert by_class(tfds_source("made", splits=SPLITS, data_dir=root))["cow"] == [*range(20, 26)]
    assert len(calls) == 1
    tfds_source("made", splits=SPLITS, data_dir=root, parts=("train",))
    assert len(calls) == 2
    turned = [{**example, "label": CLASSES[::-1][CLASSES.index(example["label"])]} for example in examples(0, 4)]
    other = write(tmp_path / "other", form, features(), {"train": turned, "test": examples(4, 2)}, shards=3)
    for path in copy.glob("made-train*"):
        shutil.copyfile(other / path.name, path)
    read = by_class(tfds_source("made", splits=SPLITS, data_dir=root))
    assert read == {"ant": [4, 5, 40, 41, 42, 43], "cow": [*range(20, 26)]}
    assert len(calls) == 3


def test_an_example_that_is_none(tmp_path):
    folder = write(tmp_path, "tfrecord", features(), {"train": [{"image": b"hello", "label": "ant"}]})
    (shard,) = folder.glob("*tfrecord*")
    options = {"splits": {"train": ["ant"]}, "data_dir": tmp_path}
    with pytest.raises(ValueError, match=r"'.*-train.tfrecord-00000-of-00001 at byte 0' is not a readable PNG"):
        tfds_source("made", **options)

    def framed(record):
        length = len(record).to_bytes(8, "little")
        return length + _records._masked(length) + record + _records._masked(record)

    example = tfds.proto.tf_example_pb2.Example()
    example.features.feature["label"].int64_list.value.extend([0, 1])
    for record in (b"\xff" * 20, b"", example.SerializeToString()):
        shard.write_bytes(framed(record))
        with pytest.raises(ValueError, match=r"at byte 0' is no example with one value of 'label' \(int64_list\)"):
            tfds_source("made", **options)


def rewritten(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_descriptions_that_nobody_has_vouched_for(copy, form):
    root = copy.parents[1]
    saved = {name: (copy / name).read_text() for name in ("features.json", "dataset_info.json", "label.labels.txt")}

    def refused(text):
        with pytest.raises(ValueError, match=text):
            tfds_source("made", data_dir=root)
        for name, content in saved.items():
            (copy / name).write_text(content)

    def foreign(content):
        content["featuresDict"]["features"]["image"]["pythonClassName"] = "antigravity.Image"

    def outside(content):
        content["splits"][0]["filepathTemplate"] = "../{SPLIT}-{SHARD_INDEX}"

    def fewer(content):
        content["featuresDict"]["features"]["label"]["classLabel"]["numClasses"] = "2"

    rewritten(copy / "features.json", foreign)
    refused(r"the set '.*' cannot be read: features.json names antigravity.Image, which is no feature of TensorFlow")
    assert "antigravity" not in sys.modules
    rewritten(copy / "dataset_info.json", outside)
    refused(r"the set '.*' must have its shards below its folder, got '.*\.\./")
    rewritten(copy / "dataset_info.json", lambda content: content.update(fileFormat="parquet"))
    refused(r"the set '.*' must be stored as array_record or tfrecord, got parquet")
    for name in ("features.json", "dataset_info.json"):
        (copy / name).write_text("{")
        refused(r"the set '.*' cannot be read: ")
    rewritten(copy / "features.json", fewer)
    (copy / "label.labels.txt").write_text("ant\nbee\n")
    refused(r"the set '.*' has 2 classes, but one of its labels is 4")
    assert tfds_source("made", data_dir=root).num_classes == 3
