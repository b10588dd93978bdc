"""open_source: sources that a config names, and what it refuses."""

import numpy as np
import pytest
import worlds
from PIL import Image

from metajax import run
from metajax.data import EpisodeSpec, builders, class_lists, episode


def opened(split, *, min_examples=0, **section):
    return run.open_source(run.complete({"data": section, "min_examples": min_examples}), split)


def fill(folder, names):
    for index, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for k in range(2):
            Image.new("RGB", (8, 8), (index, k, 0)).save(folder / name / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("cifar"), [name for names in class_lists("fc100").values() for name in names])


@pytest.mark.parametrize(
    ("fields", "classes", "shape"),
    [
        ({"name": "cifar_fs"}, 16, (32, 32, 3)),
        ({"name": "fc100", "size": 8, "cache_bytes": 2**20}, 20, (8, 8, 3)),
        ({"name": "image_folder"}, 16, (8, 8, 3)),
        ({"name": "image_folder", "size": 4, "channels": 1, "splits": "fc100"}, 20, (4, 4, 1)),
    ],
)
def test_images_of_a_folder(cifar, fields, classes, shape):
    source = opened("val", path=str(cifar), **fields)
    assert (source.num_classes, source.split, source.inputs.shape[1:]) == (classes, "val", shape)
    assert hasattr(source.inputs, "kept_bytes") == ("cache_bytes" in fields)
    assert episode(source, EpisodeSpec(5, 1, 1), seed=0, index=0).support.inputs.shape == (5, *shape)


def test_a_set_of_tfds(cifar, tmp_path):
    builder = builders.ImageFolder(cifar, name="small", data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    fields = {"name": "tfds_source", "dataset": "small", "data_dir": str(tmp_path)}
    source = opened("train", **fields)
    assert (source.num_classes, source.name, source.inputs.dtype) == (64, "small:1.0.0", np.uint8)
    published = opened("test", splits="cifar_fs", cache_bytes=2**20, **fields)
    assert published.class_names == class_lists("cifar_fs")["test"]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"name": "mnist"}, "data.name must be one of arrays, cifar_fs, .*, got 'mnist'"),
        ({"name": "cub"}, "data.path must be given for cub"),
        ({"name": "sinusoids", "path": "x"}, "data.path is no argument of sinusoids, which takes none, got 'x'"),
        ({"name": "glyphs", "pathh": "x"}, "data.pathh is no argument of glyphs, which takes per_family, size"),
        ({"name": "tfds_source"}, "data.dataset must be given for tfds_source"),
        ({"name": "image_folder", "path": "x", "size": 0.5}, "data.size must be an integer, or None, got 0.5"),
    ],
)
def test_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        opened("test", **fields)


def test_arguments_that_differ_between_splits(cifar):
    config = run.complete(
        {"data": {"name": "image_folder", "path": "none"}, "val_data": {"path": str(cifar), "size": 4}}
    )
    assert run.open_source(config, "val").inputs.shape[1:] == (4, 4, 3)
    with pytest.raises(ValueError, match="none"):
        run.open_source(config, "train")


def test_other_data_of_the_same_kind(cifar):
    assert opened("test", name="glyphs", size=14).inputs.shape[1:] == (14, 14, 1)
    elsewhere = run.open_source(run.complete({"data": {"name": "glyphs", "size": 14}}), "test", path=str(cifar))
    assert elsewhere.inputs.shape[1:] == (14, 14, 1)
    with pytest.raises(ValueError, match="data must not be given for a run on sinusoids, which is made and not read"):
        run.open_source(run.complete({"data": {"name": "sinusoids"}}), "test", path="x")


def test_small_classes_are_left_out(tmp_path):
    rows = [("alarm", 3), ("timer", 2), ("weather", 1)]
    texts = [f'{{"text": "{label} {k}", "label": "{label}"}}' for label, count in rows for k in range(count)]
    (tmp_path / "rows.jsonl").write_text("\n".join(texts))
    worlds.word_tokenizer(5).save(str(tmp_path / "tokenizer.json"))
    fields = {"name": "text", "files": str(tmp_path / "rows.jsonl"), "tokenizer": str(tmp_path),
              "splits": {"test": tuple(label for label, _ in rows)}}  # fmt: skip
    assert opened("test", min_examples=2, **fields).class_names == ("alarm", "timer")
    assert opened("test", **fields).num_classes == 3
    with pytest.raises(ValueError, match=r"min_examples must be at most 3, the examples of the largest class.*got 4"):
        opened("test", min_examples=4, **fields)
    with pytest.raises(ValueError, match=r"min_examples must be 0 for sinusoids, which has no classes, got 2"):
        opened("test", name="sinusoids", min_examples=2)
