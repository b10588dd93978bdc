"""image_folder: how the classes are divided, and what is refused."""

import io
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from metajax.data import EpisodeSpec, episode_batch
from metajax.data.sources._image_folder import image_folder


def picture(value, size=6):
    file = io.BytesIO()
    Image.new("L", (size, size), value).save(file, "PNG")
    return file.getvalue()


def tree(root, classes, each=3):
    """A folder whose images all have the number of their class."""
    for index, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for k in range(each):
            (root / name / f"{k}.png").write_bytes(picture(index))
    return root


def zipped(folder):
    return shutil.make_archive(str(folder), "zip", folder)


def names(path, **options):
    return {split: set(image_folder(path, split=split, **options).class_names) for split in ("train", "val", "test")}


@pytest.mark.parametrize("count", [3, 4, 5, 7, 25, 100])
def test_classes_are_divided(tmp_path, count):
    classes = [f"class{index:03d}" for index in range(count)]
    found = names(tree(tmp_path / "x", classes, each=2))
    assert sorted(name for split in found.values() for name in split) == classes, "each class is in one split"
    assert len(found["val"]) == max(1, round(0.16 * count))
    assert len(found["test"]) == max(1, round(0.20 * count))
    if count == 100:
        assert len(found["train"]) == 64
        assert found["train"] != set(classes[:64]), "not in alphabetical order"
    assert found == names(zipped(tmp_path / "x")), "the same on every machine, from a zip, and every time"


def test_the_division_is_pinned(tmp_path):
    # Numbers that were published with one division must not change meaning with a later version.
    classes = ["ant", "bee", "cow", "dog", "elk", "fox", "gnu"]
    expected = {"train": {"ant", "bee", "elk", "fox", "gnu"}, "val": {"cow"}, "test": {"dog"}}
    assert names(tree(tmp_path, classes)) == expected


def test_images_and_labels(tmp_path):
    source = image_folder(tree(tmp_path, ["a", "b", "c", "d", "e"]))
    assert source.inputs.shape == (9, 6, 6, 1)
    assert source.inputs.dtype == np.uint8
    number = {name: index for index, name in enumerate("abcde")}
    for image, label in zip(source.inputs, source.labels, strict=True):
        assert (image == number[source.class_names[label]]).all()
    assert list(source.class_names) == sorted(source.class_names)
    assert (source.name, source.split) == (str(tmp_path), "train")
    assert episode_batch(source, EpisodeSpec(3, 1, 2), seed=0, start=0, count=2).query.inputs.shape == (2, 6, 6, 6, 1)


def test_own_splits(tmp_path):
    tree(tmp_path, ["a", "b", "c", "d"])
    splits = {"train": ["c", "a"], "test": ("d",)}
    train = image_folder(tmp_path, splits=splits)
    assert train.class_names == ("a", "c")
    assert sorted(set(train.inputs.ravel())) == [0, 2]
    assert image_folder(tmp_path, split="test", splits=splits).class_names == ("d",)
    with pytest.raises(ValueError, match=r"splits must name classes for split 'val'"):
        image_folder(tmp_path, split="val", splits=splits)


@pytest.mark.parametrize(
    ("splits", "text"),
    [
        ({"train": ["a", "x"]}, r"path '.*' lacks 1 of the 2 classes that splits\['train'\] names, the first is 'x'"),
        ({"train": ["a", "b"], "test": ["b"]}, r"splits names class 'b' twice \(train, test\)"),
        ({"train": ["a", "a"]}, r"splits names class 'a' twice \(train, train\)"),
        ({"all": ["a"]}, "a key of splits must be one of 'train', 'val', 'test', got 'all'"),
        ({"train": "abc"}, r"splits\['train'\] must be a list of class names, got 'abc'"),
        ({"train": []}, "splits must name classes for split 'train'"),
        ({}, "splits must map splits to class names or to shares, got {}"),
        (
            {"train": 0.5, "test": 0.4},
            r"shares in splits must sum to 1, got {.*}, which sum to 0.9",
        ),
        ({"train": 1.5, "test": -0.5}, r"splits\['test'\] must be"),
        ({"train": 0.5, "test": ["a"]}, "splits must hold lists of class names or shares, not both"),
        ({"val": 0.5, "test": 0.5}, "splits must name a share for split 'train'"),
    ],
)
def test_bad_splits(tmp_path, splits, text):
    tree(tmp_path, ["a", "b", "c"])
    with pytest.raises(ValueError, match=text):
        image_folder(tmp_path, splits=splits)


@pytest.mark.parametrize("form", ["folders", "zips", "zip of folders", "zip with a folder around"])
def test_splits_that_are_there(tmp_path, form):
    root = tmp_path / "data"
    for split, classes in {"train": ["a", "b"], "val": ["c", "d"], "test": ["train", "e"]}.items():
        tree(root / split, classes)
        if form == "zips":
            zipped(root / split)
            shutil.rmtree(root / split)
    path = root
    if form == "zip of folders":
        path = zipped(root)
    if form == "zip with a folder around":
        path = shutil.make_archive(str(tmp_path / "around"), "zip", tmp_path, "data")
    assert names(path) == {"train": {"a", "b"}, "val": {"c", "d"}, "test": {"train", "e"}}
    assert image_folder(path).inputs.shape == (6, 6, 6, 1)
    anew = {"train": ["a", "e"], "test": ["c"]}
    assert image_folder(path, splits=anew).class_names == ("a", "e"), "looked up in all parts"
    assert image_folder(path, split="test", splits=anew).class_names == ("c",)


def test_a_split_that_is_not_there(tmp_path):
    tree(tmp_path / "folders" / "train", ["a", "b"])
    tree(tmp_path / "zips" / "train", ["a", "b"])
    zipped(tmp_path / "zips" / "train")
    shutil.rmtree(tmp_path / "zips" / "train")
    for path in (tmp_path / "folders", tmp_path / "zips"):
        assert image_folder(path).num_classes == 2
        with pytest.raises(ValueError, match=r"split 'val' is not in path '.*', which holds other splits"):
            image_folder(path, split="val")


def test_a_class_in_two_splits(tmp_path):
    tree(tmp_path / "train", ["a", "b"])
    tree(tmp_path / "test", ["c", "b"])
    with pytest.raises(ValueError, match=r"class 'b' stands in two splits of path '.*' \(train, test\)"):
        image_folder(tmp_path)
    together = image_folder(tmp_path, splits={"train": ["a", "b"], "test": ["c"]})
    assert together.counts.tolist() == [3, 6], "divided anew, a class has the images of both"


def test_names_are_matched_by_letters_and_digits(tmp_path):
    tree(tmp_path, ["Red_Fox", "owl-2", "elk", "ELK"])
    splits = {"train": ["red fox", "OWL 2"], "test": ["elk"]}
    assert image_folder(tmp_path, splits=splits).class_names == ("Red_Fox", "owl-2")
    assert image_folder(tmp_path, splits=splits, split="test").class_names == ("elk",), "an exact match goes first"
    with pytest.raises(ValueError, match=r"names class 'Elk', which may be 'ELK' or 'elk' in path"):
        image_folder(tmp_path, splits={"train": ["Elk"]})


@pytest.mark.parametrize("around", ["", "around"])
def test_groups_are_nodes(tmp_path, around):
    root = tmp_path / "data"
    tree(root / around, ["cats/lion", "cats/lynx", "dogs/wolf", "dogs/lion"])
    source = image_folder(root, splits={"train": ["cats/lion", "cats/lynx", "dogs/lion"], "test": ["dogs/wolf"]})
    assert source.class_names == ("cats/lion", "cats/lynx", "dogs/lion")
    assert {name: members.tolist() for name, members in source.nodes.items()} == {"cats": [0, 1], "dogs": [2]}
    shutil.move(root / around, tmp_path / "moved" / "train")
    assert image_folder(tmp_path / "moved").class_names == ("cats/lion", "cats/lynx", "dogs/lion", "dogs/wolf")


def test_shares(tmp_path):
    tree(tmp_path, [f"c{index}" for index in range(10)], each=1)
    found = {
        split: image_folder(tmp_path, split=split, splits={"train": 0.7, "test": 0.3}) for split in ("train", "test")
    }
    assert [found[split].num_classes for split in ("train", "test")] == [7, 3]
    assert not set(found["train"].class_names) & set(found["test"].class_names)


def test_classes_that_are_named_like_splits_are_classes(tmp_path):
    tree(tmp_path, ["train", "tram", "test"])
    assert set.union(*names(tmp_path).values()) == {"train", "tram", "test"}


def test_too_few_classes_to_divide(tmp_path):
    tree(tmp_path, ["a", "b"])
    with pytest.raises(ValueError, match=r"has 2 class\(es\); dividing them .* give splits="):
        image_folder(tmp_path)
    assert image_folder(tmp_path, splits={"train": ["a", "b"]}).num_classes == 2


def test_a_class_with_one_image(tmp_path):
    tree(tmp_path, ["a", "b", "c"])
    for name in ("1.png", "2.png"):
        (tmp_path / "b" / name).unlink()
    source = image_folder(tmp_path, splits={"train": ["a", "b", "c"]})
    with pytest.raises(
        ValueError, match=rf"shots \+ queries is 1 \+ 1 = 2, but class 'b' of {tmp_path} \(train\) has 1"
    ):
        source.check(EpisodeSpec(2, 1, 1))
    assert source.at_least(2).class_names == ("a", "c")


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"split": "all"}, "split must be one of 'train', 'val', 'test', got 'all'"),
        ({"size": -1}, "size must be an integer of at least 1, got -1"),
        ({"channels": 4}, "channels must be one of None, 1, 3, got 4"),
        ({"invert": "no"}, "invert must be True, False or 'auto', got 'no'"),
    ],
)
def test_bad_options(tmp_path, bad, text):
    with pytest.raises(ValueError, match=text):
        image_folder(tree(tmp_path, ["a", "b", "c"]), **bad)


def test_missing_empty_and_unsafe(tmp_path):
    with pytest.raises(ValueError, match=r"path must be a folder or a zip file, got '.*gone', which does not exist"):
        image_folder(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"path must hold images as CLASS/NAME.png, got '.*', which holds no files"):
        image_folder(tmp_path)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("../a/1.png", picture(0))
    with pytest.raises(ValueError, match=r"entry '../a/1.png' .* points outside the zip"):
        image_folder(tmp_path / "x.zip")


def test_options_reach_the_images(tmp_path):
    tree(tmp_path, ["a", "b", "c"])
    source = image_folder(tmp_path, size=4, channels=3, invert=True, splits={"train": ["b", "c"]})
    assert source.inputs.shape == (6, 4, 4, 3)
    assert sorted(set(source.inputs.ravel())) == [253, 254]


def test_cifar_fs(shared_data):
    sizes = {split: image_folder(shared_data / "cifar_fs", split=split) for split in ("train", "val", "test")}
    assert [source.num_classes for source in sizes.values()] == [64, 16, 20]
    assert sizes["test"].inputs.shape == (2000, 32, 32, 3)
    assert sizes["test"].class_names[:2] == ("baby", "bed")
