"""Omniglot: protocols, rotations and what is refused; on a stand-in with all 1623 class names, and on the real one."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from metajax.data import EpisodeSpec, episode_batch
from metajax.data.sources import _omniglot
from metajax.data.sources._omniglot import omniglot

VAL_ALPHABETS = {"Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"}
EVALUATION = [
    "Angelic",
    "Atemayar_Qelisayer",
    "Atlantean",
    "Aurek-Besh",
    "Avesta",
    "Ge_ez",
    "Glagolitic",
    "Gurmukhi",
    "Kannada",
    "Keble",
    "Malayalam",
    "Manipuri",
    "Mongolian",
    "Old_Church_Slavonic_(Cyrillic)",
    "Oriya",
    "Sylheti",
    "Syriac_(Serto)",
    "Tengwar",
    "Tibetan",
    "ULOG",
]


def drawing(stroke):
    """A 105 x 105 one-bit image, white, with black ink at the given rows and columns."""
    pixels = np.full([105, 105], 255, np.uint8)
    pixels[stroke] = 0
    file = io.BytesIO()
    Image.fromarray(pixels).convert("1").save(file, "PNG")
    return file.getvalue()


TOP_LEFT = drawing((slice(0, 50), slice(0, 20)))
TOP_RIGHT = drawing((slice(0, 50), slice(85, 105)))


def write(folder, classes, files=None):
    """Both zips, with two drawings of each class."""
    for part, evaluation in (("images_background", False), ("images_evaluation", True)):
        with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
            for name in classes:
                if (name.split("/")[0] in EVALUATION) == evaluation:
                    archive.writestr(f"{part}/{name}/0001_01.png", TOP_LEFT)
                    archive.writestr(f"{part}/{name}/0001_02.png", TOP_RIGHT)
            for name, content in (files or {}).items():
                if name.startswith(part):
                    archive.writestr(name, content)
    return folder


def all_classes():
    return sorted(set.union(*map(set, _omniglot._classes().values())))


@pytest.fixture(autouse=True)
def own_cache(request, monkeypatch, tmp_path_factory):
    if "shared_data" not in request.fixturenames:
        monkeypatch.setenv("METAJAX_CACHE", str(tmp_path_factory.getbasetemp() / "omniglot_cache"))


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    return write(tmp_path_factory.mktemp("omniglot"), all_classes())


def test_the_list_of_classes():
    classes = _omniglot._classes()
    assert {split: len(names) for split, names in classes.items()} == {"train": 1028, "val": 172, "test": 423}
    assert len(all_classes()) == 1623
    assert {name.split("/")[0] for name in classes["val"]} == VAL_ALPHABETS
    shared = {name.split("/")[0] for name in classes["train"]} & {name.split("/")[0] for name in classes["test"]}
    assert shared == {"Gurmukhi"}


@pytest.mark.parametrize(
    ("protocol", "sizes"), [("vinyals", (1028, 172, 423)), ("lake", (792, 172, 659))], ids=["vinyals", "lake"]
)
def test_protocols(standin, protocol, sizes):
    names = {}
    for split, size in zip(("train", "val", "test"), sizes, strict=True):
        source = omniglot(standin, split=split, protocol=protocol, rotations=False)
        assert (source.name, source.split, source.num_classes) == (f"omniglot-{protocol}", split, size)
        assert source.inputs.shape == (2 * size, 28, 28, 1)
        assert source.inputs.dtype == np.uint8
        names[split] = set(source.class_names)
        alphabets = {name.split("/")[0] for name in names[split]}
        if protocol == "vinyals":
            assert names[split] == _omniglot._classes()[split]
        elif split == "test":
            assert alphabets == set(EVALUATION)
        else:
            assert not alphabets & set(EVALUATION)
            assert (alphabets == VAL_ALPHABETS) if split == "val" else not alphabets & VAL_ALPHABETS
    assert not names["train"] & names["val"] | names["train"] & names["test"] | names["val"] & names["test"]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_rotations_are_for_training_unless_asked_for(standin, split):
    plain, turned = (omniglot(standin, split=split, rotations=rotations) for rotations in (False, True))
    default = omniglot(standin, split=split)
    assert turned.num_classes == 4 * plain.num_classes
    assert turned.name == "omniglot-vinyals-rotated"
    assert default.class_names == (turned if split == "train" else plain).class_names
    assert default.name == (turned if split == "train" else plain).name


def test_ink_is_bright_and_rotations_turn_it(standin):
    source = omniglot(standin, split="val", rotations=True)
    corners = {"": (0, 0), "/rot90": (27, 0), "/rot180": (27, 27), "/rot270": (0, 27)}  # of TOP_LEFT, anticlockwise
    for suffix, corner in corners.items():
        label = source.class_names.index(f"Hebrew/character07{suffix}")
        first = source.inputs[source.members[label]][0, ..., 0]
        assert first[corner] == 255
        assert sum(first[other] == 0 for other in corners.values()) == 3
        assert first[14, 14] == 0
    ink = source.inputs[: 2 * 172].astype(float).mean()
    assert ink == pytest.approx(255 * 50 * 20 / 105**2, rel=0.01), "resizing keeps the amount of ink"


def test_mirror_images_are_classes_only_when_asked_for(standin):
    plain, mirrored = (omniglot(standin, split="val", rotations=True, mirrored=mirrored) for mirrored in (False, True))
    assert mirrored.num_classes == 2 * plain.num_classes
    assert mirrored.name == "omniglot-vinyals-rotated-mirrored"
    for suffix in ("", "/rot90"):
        one, other = (
            mirrored.inputs[mirrored.members[mirrored.class_names.index(f"Hebrew/character07{suffix}{end}")]]
            for end in ("", "/mirrored")
        )
        np.testing.assert_array_equal(one[:, :, ::-1], other)


def test_rotations_may_meet_in_an_episode(standin):
    source = omniglot(standin, split="val", rotations=True)
    assert source.groups is None
    batch = episode_batch(source, EpisodeSpec(20, 1, 1), seed=0, start=0, count=100)
    assert batch.support.inputs.shape == (100, 20, 28, 28, 1)


def test_size(standin):
    assert omniglot(standin, split="val", size=20).inputs.shape == (344, 20, 20, 1)
    assert omniglot(standin, split="val", size=105).inputs.shape == (344, 105, 105, 1)


def test_folders_are_zips(standin, tmp_path):
    with zipfile.ZipFile(standin / "images_background.zip") as archive:
        archive.extractall(tmp_path)
    one, other = (omniglot(path, split="val") for path in (standin, tmp_path))
    assert one.class_names == other.class_names
    np.testing.assert_array_equal(one.inputs, other.inputs)
    with pytest.raises(
        ValueError, match=r"path must hold images_background and images_evaluation .* without images_ev"
    ):
        omniglot(tmp_path, split="test")


def test_the_cache_is_used_and_follows_the_files(tmp_path, monkeypatch):
    monkeypatch.setenv("METAJAX_CACHE", str(tmp_path / "cache"))
    classes = all_classes()
    write(tmp_path, classes)
    calls = []
    decode = _omniglot._decode
    monkeypatch.setattr(_omniglot, "_decode", lambda *args: calls.append(args) or decode(*args))
    first = omniglot(tmp_path, split="val")
    again = omniglot(tmp_path, split="val")
    np.testing.assert_array_equal(first.inputs, again.inputs)
    assert len(calls) == 1
    omniglot(tmp_path, split="val", size=14)
    assert len(calls) == 2
    write(tmp_path, classes, {"images_background/Hebrew/character01/0001_03.png": TOP_LEFT})
    assert len(omniglot(tmp_path, split="val").inputs) == len(first.inputs) + 1
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"split": "background"}, "split must be one of 'train', 'val', 'test', got 'background'"),
        ({"protocol": "ravi"}, "protocol must be one of 'vinyals', 'lake', got 'ravi'"),
        ({"rotations": 4}, "rotations must be True, False or None, got 4"),
        ({"mirrored": 1}, "mirrored must be True or False, got 1"),
        ({"size": 0}, "size must be an integer of at least 1, got 0"),
    ],
)
def test_bad_options(standin, bad, text):
    with pytest.raises(ValueError, match=text):
        omniglot(standin, **bad)


def test_missing_files(tmp_path):
    with pytest.raises(ValueError, match=r"path must be a folder or a zip file, got '.*gone', which does not exist"):
        omniglot(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"path must hold images_background and images_evaluation .*, got"):
        omniglot(tmp_path)
    (tmp_path / "images_background").mkdir()
    with pytest.raises(ValueError, match=r"path must hold images_background/ALPHABET.*, which is empty"):
        omniglot(tmp_path, split="val")


def test_an_incomplete_copy(tmp_path):
    classes = all_classes()
    write(tmp_path, [name for name in classes if name != "Hebrew/character03"])
    with pytest.raises(ValueError, match=r"lacks 1 of the 172 val classes, the first is 'Hebrew/character03'"):
        omniglot(tmp_path, split="val")
    with pytest.raises(ValueError, match=r"has 963 of the 964 classes of images_background"):
        omniglot(tmp_path, protocol="lake")
    assert omniglot(tmp_path, split="test").num_classes == 423


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("images_background/Hebrew/character01/0001_03.png", b"hello", r"0001_03.png' is not a readable PNG"),
        (
            "images_background/Hebrew/notes.txt",
            b"hello",
            r"images_background/ALPHABET/characterNN/NAME.png, got '.*notes",
        ),
        ("images_background/../../evil.png", TOP_LEFT, "points outside the zip"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, text):
    write(tmp_path, ["Hebrew/character01"], {name: content})
    with pytest.raises(ValueError, match=text):
        omniglot(tmp_path, split="val")


def test_the_published_files(shared_data):
    path = shared_data / "omniglot"
    train, val, test = (omniglot(path, split=split) for split in ("train", "val", "test"))
    assert [len(source.inputs) for source in (train, val, test)] == [4 * 1028 * 20, 172 * 20, 423 * 20]
    assert {len(members) for source in (train, val, test) for members in source.members} == {20}
    assert omniglot(path, protocol="lake", split="test").num_classes == 659
    for source in (val, test):
        assert source.inputs.max() == 255
        assert 15 < source.inputs.mean() < 30, "thin bright strokes on black"
    # nearest neighbour on pixels is far above chance (20 %) and far below what is learned
    batch = episode_batch(test, EpisodeSpec(5, 1, 5), seed=0, start=0, count=100)
    support, query = (
        part.inputs.reshape(100, part.inputs.shape[1], -1).astype(np.float32) for part in (batch.support, batch.query)
    )
    support /= np.linalg.norm(support, axis=-1, keepdims=True)
    guessed = np.einsum("tqf,tsf->tqs", query, support).argmax(axis=-1)
    assert 0.4 < (guessed == batch.query.targets).mean() < 0.65
