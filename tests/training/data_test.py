"""open_source: every source that a config can name, and what it refuses."""

import numpy as np
import pytest
import worlds
from PIL import Image

from experiments.configs._base import base
from metajax.data import EpisodeSpec, builders, class_lists, episode
from metajax.training import image_options, open_source


def config(**fields):
    found = base()
    found.data.update(**fields)
    return found


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
        ({"name": "cifar_fs", "size": 0}, 16, (32, 32, 3)),
        ({"name": "fc100", "size": 8, "cache_mib": 1}, 20, (8, 8, 3)),
        ({"name": "image_folder", "size": 0}, 16, (8, 8, 3)),
        ({"name": "image_folder", "size": 4, "channels": 1, "splits": "fc100"}, 20, (4, 4, 1)),
    ],
)
def test_images_of_a_folder(cifar, fields, classes, shape):
    source = open_source(config(path=str(cifar), **fields), "val")
    assert (source.num_classes, source.split, source.inputs.shape[1:]) == (classes, "val", shape)
    assert hasattr(source.inputs, "kept_bytes") == ("cache_mib" in fields)
    assert episode(source, EpisodeSpec(5, 1, 1), seed=0, index=0).support.inputs.shape == (5, *shape)


def test_a_set_of_tfds(cifar, tmp_path):
    builder = builders.ImageFolder(cifar, name="small", data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    fields = {"name": "tfds", "set": "small", "path": str(tmp_path), "size": 0}
    source = open_source(config(**fields), "train")
    assert (source.num_classes, source.name, source.inputs.dtype) == (64, "small:1.0.0", np.uint8)
    published = open_source(config(splits="cifar_fs", cache_mib=1, **fields), "test")
    assert published.class_names == class_lists("cifar_fs")["test"]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"name": "mnist"}, "data.name must be one of 'glyphs', 'omniglot', .*, got 'mnist'"),
        ({"name": "cub"}, "data.path must name the folder of cub, got ''"),
        ({"name": "sinusoids", "path": "x"}, "data.path must be empty for sinusoids, which are made and not read"),
        ({"name": "glyphs", "path": "x"}, "data.path must be empty for glyphs, which are made and not read"),
        ({"name": "tfds"}, "data.set must name a set of TensorFlow Datasets, got ''"),
        ({"name": "omniglot", "path": "x", "set": "y"}, "data.set is for tfds, not for omniglot, got 'y'"),
        ({"name": "cub", "path": "x", "splits": "cub"}, "data.splits is for tfds and image_folder, not for cub"),
        ({"name": "image_folder", "path": "x", "splits": "y"}, "name must be one of 'cifar_fs', .* got 'y'"),
        ({"name": "image_folder", "path": "x", "cache_mib": -1}, "data.cache_mib must be an integer of at least 0"),
    ],
)
def test_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        open_source(config(**fields), "test")


def test_configs_of_old_runs_lack_fields():
    found = config()
    for name in ("set", "splits", "cache_mib", "sampler"):
        del found.data[name]
    assert open_source(found.to_dict(), "val").num_classes == 54


def test_images_from_outside_are_read_as_those_of_the_run():
    assert image_options(config(name="cifar_fs", size=32)) == {"size": 32, "channels": 3, "invert": False}
    assert image_options(config(name="omniglot")) == {"size": 28, "channels": 1, "invert": "auto"}
    assert image_options(config(name="tfds", size=0)) == {"size": None, "channels": None, "invert": False}


def test_small_classes_are_left_out(tmp_path):
    rows = [("alarm", 3), ("timer", 2), ("weather", 1)]
    texts = [f'{{"text": "{label} {k}", "label": "{label}"}}' for label, count in rows for k in range(count)]
    (tmp_path / "rows.jsonl").write_text("\n".join(texts))
    worlds.word_tokenizer(5).save(str(tmp_path / "tokenizer.json"))
    fields = {"name": "text", "path": str(tmp_path / "rows.jsonl"), "tokenizer": str(tmp_path),
              "names": {"test": tuple(label for label, _ in rows)}}  # fmt: skip
    found = open_source(config(at_least=2, **fields), "test")
    assert found.class_names == ("alarm", "timer")
    assert open_source(config(**fields), "test").num_classes == 3
    with pytest.raises(ValueError, match=r"data\.at_least must be at most 3, the examples of the largest class.*got 4"):
        open_source(config(at_least=4, **fields), "test")
    with pytest.raises(ValueError, match=r"data\.at_least must be 0 for sinusoids, which has no classes, got 2"):
        open_source(config(name="sinusoids", at_least=2), "test")
