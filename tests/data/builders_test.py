"""Builders for TensorFlow Datasets: what is prepared is what the images were, in both formats and several shards."""

import importlib
import inspect
import pickle
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from metajax.data import image_folder, omniglot, tfds_source

tfds = pytest.importorskip("tensorflow_datasets", reason="needs tensorflow-datasets to prepare sets")
pytest.importorskip("tensorflow", reason="tensorflow-datasets writes TFRecord files with TensorFlow")
pytest.importorskip("array_record", reason="needs array_record to write ArrayRecord files (Linux only)")

builders = importlib.import_module("metajax.data.builders")
FORMATS = ("array_record", "tfrecord")
EVERYTHING = {"train": 1.0}


@pytest.fixture(autouse=True)
def own_cache(request, monkeypatch, tmp_path):
    monkeypatch.setenv("METAJAX_CACHE", str(tmp_path / "cache"))


def saved(path, array, form="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, form)


def tree(root, classes, *, each=3, shape=(6, 5, 3), form="PNG", seed=0):
    rng = np.random.default_rng(seed)
    for name in classes:
        for k in range(each):
            saved(root / name / f"{k}.{form.lower()}", rng.integers(256, size=shape, dtype=np.uint8), form)
    return root


def prepare(builder, shards=3):
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=shards))
    return builder


def plainly(builder, form, split):
    """The examples as TFDS itself reads them."""
    if form == "array_record":
        return builder.as_data_source(split)
    return builder.as_dataset(split=split).as_numpy_iterator()


def by_class(source):
    """The images of each class as bytes, sorted."""
    return {
        name: sorted(image.tobytes() for image in source.inputs[members])
        for name, members in zip(source.class_names, source.members, strict=True)
    }


@pytest.mark.parametrize("form", FORMATS)
def test_a_folder_comes_back(tmp_path, form):
    classes = ["cats/lion", "cats/lynx", "dogs/wolf", "dogs/lion"]
    folder = tree(tmp_path / "images", classes, each=5)
    builder = prepare(builders.ImageFolder(folder, name="beasts", data_dir=tmp_path / "sets", file_format=form))
    assert len(list((tmp_path / "sets" / "beasts" / "1.0.0").glob(f"*.{form}-*-of-00003"))) == 3
    assert builder.info.features["image"].shape == (None, None, 3)
    for split in ("train", "val", "test"):
        read = tfds_source("beasts", split, data_dir=tmp_path / "sets")
        plain = image_folder(folder, split=split)
        assert read.class_names == plain.class_names
        assert by_class(read) == by_class(plain)
        assert {node: members.tolist() for node, members in read.nodes.items()} == {
            node: members.tolist() for node, members in plain.nodes.items()
        }
    assert read.name == "beasts:1.0.0"


def test_what_plain_tfds_reads(tmp_path):
    folder = tree(tmp_path / "images", ["owl", "elk"], shape=(6, 5))
    expected = {
        f"{name}/{k}.png": (np.asarray(Image.open(folder / name / f"{k}.png")).tolist(), name)
        for name in ("owl", "elk")
        for k in range(3)
    }
    for form in FORMATS:
        builder = builders.ImageFolder(folder, name="grey", data_dir=tmp_path / form, file_format=form)
        prepare(builder)
        assert builder.info.features["image"].shape == (None, None, 1)
        names = builder.info.features["label"].names
        found = {
            example["file_name"].decode(): (example["image"][..., 0].tolist(), names[int(example["label"])])
            for example in plainly(builder, form, "train")
        }
        assert found == expected


def test_files_are_stored_as_they_are(tmp_path):
    folder = tree(tmp_path / "images", ["owl"], form="JPEG", shape=(40, 30, 3))
    builder = prepare(builders.ImageFolder(folder, name="owls", data_dir=tmp_path, file_format="array_record"))
    decoders = {"image": tfds.decode.SkipDecoding()}
    stored = builder.as_data_source(split="train", decoders=decoders)
    files = {bytes(example["image"]) for example in stored}
    assert files == {path.read_bytes() for path in folder.rglob("*.jpeg")}
    assert tfds_source("owls", splits=EVERYTHING, data_dir=tmp_path, size=20).inputs.shape == (3, 20, 20, 3)


@pytest.mark.parametrize("layout", ["folders", "zips", "zip"])
def test_splits_that_are_there(tmp_path, layout):
    root = tmp_path / "images"
    for split, classes in {"train": ["a", "b"], "val": ["c"], "test": ["d", "e"]}.items():
        tree(root / split, classes, seed=len(split))
        if layout == "zips":
            shutil.make_archive(str(root / split), "zip", root / split)
            shutil.rmtree(root / split)
    path = shutil.make_archive(str(root), "zip", root) if layout == "zip" else root
    builder = prepare(builders.ImageFolder(path, name="parts", data_dir=tmp_path, file_format="array_record"), shards=1)
    assert {split: info.num_examples for split, info in builder.info.splits.items()} == {
        "train": 6,
        "val": 3,
        "test": 6,
    }
    assert builder.info.features["label"].names == ["a", "b", "c", "d", "e"]
    for split in ("train", "val", "test"):
        read = tfds_source("parts", split, parts=(split,), splits={split: 1.0}, data_dir=tmp_path)
        assert by_class(read) == by_class(image_folder(path, split=split))
    anew = {"train": ["a", "d"], "test": ["c"]}
    assert by_class(tfds_source("parts", splits=anew, data_dir=tmp_path)) == by_class(image_folder(path, splits=anew))


def test_channels(tmp_path):
    folder = tree(tmp_path / "images", ["a"], shape=(6, 5))
    tree(folder, ["b"], shape=(6, 5, 3))
    with pytest.raises(
        ValueError, match=r"different channels: 'a/0.png' has 1 and '.*images/b/0.png' has 3; give chann"
    ):
        prepare(builders.ImageFolder(folder, name="mixed", data_dir=tmp_path, file_format="array_record"))
    for channels in (1, 3):
        options = {"name": f"mixed{channels}", "data_dir": tmp_path, "file_format": "array_record"}
        prepare(builders.ImageFolder(folder, channels=channels, **options))
        read = tfds_source(f"mixed{channels}", splits=EVERYTHING, data_dir=tmp_path)
        assert by_class(read) == by_class(image_folder(folder, splits=EVERYTHING, channels=channels))


def test_what_is_refused_leaves_nothing_behind(tmp_path):
    folder = tree(tmp_path / "images", ["a", "b"])
    options = {"name": "bad", "data_dir": tmp_path / "sets", "file_format": "array_record"}
    (folder / "b" / "9.png").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"'.*images/b/9.png' is not a readable PNG, JPEG or BMP image"):
        prepare(builders.ImageFolder(folder, **options))
    assert not [path for path in (tmp_path / "sets").rglob("*") if path.is_file()]
    (folder / "b" / "9.png").unlink()
    (folder / "b").rename(folder / " b")
    with pytest.raises(ValueError, match=r"path must hold classes whose names fit on a line, got ' b' in '.*images'"):
        builders.ImageFolder(folder, **options)
    for name in ("Birds", "../birds", "1", "", None):
        with pytest.raises(ValueError, match=r"name must be of lower-case letters, digits and underscores, got "):
            builders.ImageFolder(folder, **{**options, "name": name})
    with pytest.raises(ValueError, match=r"channels must be one of None, 1, 3, got 4"):
        builders.ImageFolder(folder, channels=4, **options)
    with pytest.raises(ValueError, match=r"path must be a folder or a zip file, got '.*nowhere', which does not exist"):
        builders.ImageFolder(tmp_path / "nowhere", **options)
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../a/1.png", b"")
    with pytest.raises(ValueError, match=r"entry '../a/1.png' .* points outside the zip"):
        builders.ImageFolder(tmp_path / "evil.zip", **options)


def characters(folder, *, zipped=True, size=105):
    """Both parts of Omniglot with two drawings of some characters: black ink on white, one bit a pixel."""
    alphabets = {"background": ["Greek", "Latin"], "evaluation": ["ULOG", "Oriya"]}
    for part, names in alphabets.items():
        for number, name in enumerate(f"{alphabet}/character{k:02d}" for alphabet in names for k in (1, 2)):
            for k in range(2):
                pixels = np.full([size, size], 255, np.uint8)
                pixels[10 * number : 10 * number + 8, 10 * k : 10 * k + 5] = 0
                path = folder / f"images_{part}" / name / f"{number:04d}_{k + 1:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).convert("1").save(path)
        if zipped:
            shutil.make_archive(str(folder / f"images_{part}"), "zip", folder, f"images_{part}")
            shutil.rmtree(folder / f"images_{part}")
    return folder


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("zipped", [True, False])
def test_omniglot(tmp_path, form, zipped):
    path = characters(tmp_path / "omniglot", zipped=zipped)
    builder = prepare(builders.Omniglot(path, data_dir=tmp_path, file_format=form), shards=2)
    assert builder.info.full_name == "metajax_omniglot/1.0.0"
    assert {split: info.num_examples for split, info in builder.info.splits.items()} == {
        "background": 8,
        "evaluation": 8,
    }
    splits = {"train": ["Greek/character02", "ULOG/character01"], "test": ["Latin/character01"]}
    read = tfds_source("metajax_omniglot", splits=splits, data_dir=tmp_path)
    assert read.class_names == ("Greek/character02", "ULOG/character01")
    assert read.inputs.shape == (4, 105, 105, 1)
    for name, first in (("Greek/character02", 10), ("ULOG/character01", 0)):
        images = read.inputs[read.members[read.class_names.index(name)], ..., 0]
        assert set(np.unique(images)) == {0, 255}, "ink is 0, as published"
        found = {tuple(np.argwhere(image == 0)[0]) for image in images}
        assert found == {(first, 0), (first, 10)}
        assert ((images == 0).sum(axis=(1, 2)) == 8 * 5).all()
    ink = tfds_source("metajax_omniglot", splits=splits, data_dir=tmp_path, invert=True)
    np.testing.assert_array_equal(ink.inputs, 255 - read.inputs)
    part = tfds_source("metajax_omniglot", splits=EVERYTHING, parts=("evaluation",), data_dir=tmp_path)
    assert set(part.nodes) == {"ULOG", "Oriya"}
    values = {int(example["image"].max()) for example in plainly(builder, form, "background")}
    assert values == {255}, "also where TFDS decodes"


def test_what_is_no_omniglot(tmp_path):
    path = characters(tmp_path / "omniglot")
    (path / "images_evaluation.zip").unlink()
    with pytest.raises(
        ValueError, match=r"path must hold images_background and images_evaluation .* without images_eval"
    ):
        builders.Omniglot(path, data_dir=tmp_path)
    small = characters(tmp_path / "small", size=60)
    with pytest.raises(
        ValueError, match=r"'.*images_background.zip/.*0000_01.png' must be an image of 105 x 105 pixels, got 60 x 60"
    ):
        prepare(builders.Omniglot(small, data_dir=tmp_path, file_format="array_record"))


def test_builders_can_be_pickled(tmp_path):
    folder = tree(tmp_path / "images", ["a"], shape=(6, 5))
    options = {"data_dir": tmp_path, "file_format": "array_record"}
    for builder in (
        builders.ImageFolder(folder, name="copied", channels=3, **options),
        builders.Omniglot(characters(tmp_path / "omniglot"), **options),
    ):
        copy = pickle.loads(pickle.dumps(builder))
        assert (copy.name, copy.data_dir, copy.info.features.keys()) == (
            builder.name,
            builder.data_dir,
            builder.info.features.keys(),
        )
        assert copy.info.features["image"].shape == builder.info.features["image"].shape
        assert copy.info.file_format == builder.info.file_format


def test_imports(tmp_path):
    folder = tree(tmp_path / "images", ["a"])
    prepare(builders.ImageFolder(folder, name="some", data_dir=tmp_path, file_format="tfrecord"))
    code = f"""
import sys, metajax
assert "tensorflow_datasets" not in sys.modules
assert not hasattr(metajax.data, "builders")
import metajax.data.builders
metajax.data.tfds_source("some", splits={EVERYTHING}, data_dir={str(tmp_path)!r})
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in builders.__all__:
        assert ">>> " in inspect.getdoc(getattr(builders, name))
    assert list(builders.__all__) == sorted(builders.__all__)
    assert tfds.builder_cls("omniglot").__module__.startswith("tensorflow_datasets"), "no name of TFDS is taken"


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_the_published_omniglot(shared_data, tmp_path, form):
    path = shared_data / "omniglot"
    prepare(builders.Omniglot(path, data_dir=tmp_path, file_format=form))
    for split, count in (("val", 172), ("test", 423)):
        plain = omniglot(path, split=split, size=105)
        read = tfds_source(
            "metajax_omniglot", split, splits={split: list(plain.class_names)}, data_dir=tmp_path, invert=True
        )
        assert read.num_classes == count
        assert read.class_names == plain.class_names
        assert by_class(read) == by_class(plain)
