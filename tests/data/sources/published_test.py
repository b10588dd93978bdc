"""Published splits: the facts, and the sources that look their classes up in a folder of images."""

import importlib.resources
import io
import json
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from metajax import data
from metajax.data import EpisodeSpec, Imbalanced, class_lists
from metajax.data.sources import _published

SPLITS = ("train", "val", "test")
SIZES = {
    "cifar_fs": (64, 16, 20),
    "fc100": (60, 20, 20),
    "mini_imagenet": (64, 16, 20),
    "tiered_imagenet": (351, 97, 160),
    "cub": (100, 50, 50),
    "meta_dataset/ilsvrc_2012": (712, 158, 130),
    "meta_dataset/omniglot": (883, 81, 659),
    "meta_dataset/aircraft": (70, 15, 15),
    "meta_dataset/cu_birds": (140, 30, 30),
    "meta_dataset/dtd": (33, 7, 7),
    "meta_dataset/quickdraw": (241, 52, 52),
    "meta_dataset/fungi": (994, 200, 200),
    "meta_dataset/vgg_flower": (71, 15, 16),
    "meta_dataset/traffic_sign": (0, 0, 43),
    "meta_dataset/mscoco": (0, 40, 40),
}
THREE = ("ilsvrc_2012", "omniglot", "aircraft")
PUBLISHED = EpisodeSpec(ways=(5, 50), shots=Imbalanced(), queries=10, hierarchical=True)


def nodes(name, split):
    return _published._published(name)[split].nodes


def picture(colour=(10, 20, 30)):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


def fill(folder, names, each=2, mark=0):
    """A folder of class folders; the colour of an image is (mark, number of the class)."""
    for index, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for k in range(each):
            (folder / name / f"{k}.png").write_bytes(picture((mark, index // 256, index % 256)))
    return folder


# The facts


@pytest.mark.parametrize("name", SIZES)
def test_lists(name):
    lists = class_lists(name)
    assert tuple(map(len, lists.values())) == SIZES[name]
    assert tuple(lists) == SPLITS
    assert all(list(names) == sorted(names) for names in lists.values())
    together = [name for names in lists.values() for name in names]
    letters = {"".join(letter for letter in name.casefold() if letter.isalnum()) for name in together}
    assert len(letters) == len(together), "disjoint, and however a folder spells them"
    assert all(len(nodes(name, split)) == 0 or nodes(name, split).keys().isdisjoint(lists[split]) for split in SPLITS)
    file = importlib.resources.files("metajax.data.sources") / "_splits" / f"{name.replace('/', '_')}.json"
    assert "arXiv" in json.loads(file.read_text())["source"]


def test_there_are_no_other_lists():
    assert tuple(SIZES) == _published._NAMES
    with pytest.raises(ValueError, match=r"name must be one of 'cifar_fs', .* got 'imagenet'"):
        class_lists("imagenet")
    with pytest.raises(ValueError, match=r"name must be one of .*'meta_dataset/mscoco', got \['cub'\]"):
        class_lists(["cub"])


def test_cifar_fs_and_fc100_divide_one_hundred_classes():
    fs, fc = class_lists("cifar_fs"), class_lists("fc100")
    assert sorted(sum(fs.values(), ())) == sorted(sum(fc.values(), ()))
    superclasses = {}
    for split in SPLITS:
        for node, members in nodes("cifar_fs", split).items():
            superclasses.setdefault(node, []).extend(members)
    assert {len(members) for members in superclasses.values()} == {5}
    assert sorted(superclasses["people"]) == ["baby", "boy", "girl", "man", "woman"]
    # appendix of Oreshkin et al. 2018, with the superclasses of CIFAR-100 numbered in the order of the alphabet
    numbers = {"train": (1, 2, 3, 4, 5, 6, 9, 10, 15, 17, 18, 19), "val": (8, 11, 13, 16), "test": (0, 7, 12, 14)}
    for split, expected in numbers.items():
        assert sorted(nodes("fc100", split)) == [sorted(superclasses)[number] for number in expected]
        assert all(sorted(superclasses[node]) == list(members) for node, members in nodes("fc100", split).items())
    assert {"baby", "bed", "bicycle", "chimpanzee", "fox", "worm"} <= set(fs["test"])


def test_imagenet_splits():
    mini, tiered = class_lists("mini_imagenet"), class_lists("tiered_imagenet")
    assert mini["train"][0] == "n01532829", "house finch"
    # golden retriever, malamute, dalmatian, lion, ant, school bus, vase, trifle
    known = "n02099601 n02110063 n02110341 n02129165 n02219486 n04146614 n04522168 n07613480"
    assert set(known.split()) <= set(mini["test"])
    assert [len(nodes("tiered_imagenet", split)) for split in SPLITS] == [20, 6, 8]
    assert "n02099601" in nodes("tiered_imagenet", "val")["n02098550"], "the golden retriever is a sporting dog"
    every = set(sum(class_lists("meta_dataset/ilsvrc_2012").values(), ()))
    assert len(every) == 1000
    assert set(sum(mini.values(), ())) | set(sum(tiered.values(), ())) <= every
    categories = [node for split in SPLITS for node in nodes("tiered_imagenet", split)]
    assert len(set(categories)) == 34, "a category is in one split"


def test_cub_takes_every_second_bird_for_training():
    lists = class_lists("cub")
    numbers = {split: [int(name[:3]) for name in names] for split, names in lists.items()}
    assert numbers == {"train": [*range(1, 201, 2)], "val": [*range(2, 201, 4)], "test": [*range(4, 201, 4)]}
    assert lists["train"][0] == "001.Black_footed_Albatross"
    meta = class_lists("meta_dataset/cu_birds")
    assert sorted(sum(meta.values(), ())) == sorted(sum(lists.values(), ())), "the same birds"
    assert set(meta["val"]) != set(lists["val"]), "divided in another way"


@pytest.mark.parametrize("name", ["cifar_fs", "fc100", "tiered_imagenet", "meta_dataset/omniglot"])
def test_a_class_has_one_node(name):
    for split, names in class_lists(name).items():
        assert sorted(sum(nodes(name, split).values(), ())) == list(names)


def test_omniglot_of_meta_dataset():
    assert [len(nodes("meta_dataset/omniglot", split)) for split in SPLITS] == [25, 5, 20]
    validation = nodes("meta_dataset/omniglot", "val")
    assert {node: len(members) for node, members in validation.items()} == {
        "Alphabet_of_the_Magi": 20,
        "Blackfoot_(Canadian_Aboriginal_Syllabics)": 14,
        "Inuktitut_(Canadian_Aboriginal_Syllabics)": 16,
        "Ojibwe_(Canadian_Aboriginal_Syllabics)": 14,
        "Tagalog": 17,
    }
    smallest = min(len(members) for members in nodes("meta_dataset/omniglot", "train").values())
    assert smallest > 20, "the smallest alphabets of the background set validate"
    assert validation["Tagalog"][-1] == "Tagalog/character17"


@pytest.mark.parametrize(("split", "eligible", "most"), [("train", 113, 392), ("val", 18, 158), ("test", 15, 130)])
def test_nodes_of_wordnet(split, eligible, most):
    classes, hierarchy = class_lists("meta_dataset/ilsvrc_2012")[split], nodes("meta_dataset/ilsvrc_2012", split)
    assert set().union(*hierarchy.values()) == set(classes), "every class is reached"
    sizes = np.array([len(members) for members in hierarchy.values()])
    assert ((sizes >= 5).sum(), sizes.min(), sizes.max()) == (eligible, 2, most)
    large = [members for members in hierarchy.values() if len(members) >= 5]
    assert set().union(*large) == set(classes), "also with 5 ways and more"
    assert len(set(large)) == eligible


def test_known_nodes_of_wordnet():
    lists = class_lists("meta_dataset/ilsvrc_2012")
    assert nodes("meta_dataset/ilsvrc_2012", "val")["n02075296"] == lists["val"], "carnivores validate"
    assert nodes("meta_dataset/ilsvrc_2012", "test")["n03183080"] == lists["test"], "devices test"
    assert "n00001740" not in nodes("meta_dataset/ilsvrc_2012", "train"), "entity spans all 712"
    # great white shark, tiger shark and hammerhead; two rays besides make cartilaginous fish
    train = nodes("meta_dataset/ilsvrc_2012", "train")
    assert train["n01482330"] == ("n01484850", "n01491361", "n01494475")
    assert set(train["n01482071"]) - set(train["n01482330"]) == {"n01496331", "n01498041"}


# Sources over folders


@pytest.mark.parametrize(
    ("name", "split", "size"),
    [
        ("cifar_fs", "val", 32),
        ("fc100", "test", 32),
        ("mini_imagenet", "val", 84),
        ("tiered_imagenet", "val", 84),
        ("cub", "val", 84),
    ],
)
def test_a_source(tmp_path, name, split, size):
    lists = class_lists(name)
    fill(tmp_path, [*lists[split], lists["train"][0]])
    source = getattr(data, name)(tmp_path, split)
    count = len(lists[split])
    assert source.class_names == lists[split], "and not the class of another split"
    assert source.inputs.shape == (2 * count, size, size, 3)
    assert (source.inputs[:, 0, 0, 2] == source.labels).all()
    assert (source.name, source.split, source.whole_nodes) == (name, split, False)
    assert {node: tuple(source.class_names[index] for index in found) for node, found in source.nodes.items()} == nodes(
        name, split
    )
    stored = getattr(data, name)(tmp_path, split, size=5, cache_bytes=1000)
    assert (stored.inputs.shape, stored.inputs.cache_bytes) == ((2 * count, 5, 5, 3), 1000)


def test_folders_may_be_spelled_in_another_way(tmp_path):
    names = class_lists("fc100")["val"]
    fill(tmp_path, [name.replace("_", " ").title() for name in names])
    source = data.fc100(tmp_path, "val")
    assert source.class_names[:3] == ("Bear", "Camel", "Cattle")
    assert [source.class_names[index] for index in source.nodes["non-insect_invertebrates"]] == [
        "Crab", "Lobster", "Snail", "Spider", "Worm",
    ]  # fmt: skip


@pytest.mark.parametrize("zipped", [False, True])
def test_data_that_is_divided_in_another_way(tmp_path, zipped):
    names = class_lists("cub")["val"]
    for part, some in (("train", names[:30]), ("test", names[30:])):
        fill(tmp_path / part, some)
        if zipped:
            shutil.make_archive(str(tmp_path / part), "zip", tmp_path / part)
            shutil.rmtree(tmp_path / part)
    assert data.cub(tmp_path, "val", size=4).class_names == names


def test_an_incomplete_copy(tmp_path):
    names = class_lists("cifar_fs")["val"]
    fill(tmp_path, [name for name in names if name not in ("crab", "shark")])
    with pytest.raises(
        ValueError,
        match=rf"path '{tmp_path}' lacks 2 of the 16 classes that splits\['val'\] names, the first is 'crab'",
    ):
        data.cifar_fs(tmp_path, "val")
    fill(tmp_path, ["crab", "shark"], each=1)
    assert data.cifar_fs(tmp_path, "val").counts.sum() == 30, "classes may have fewer images"
    (tmp_path / "crab" / "0.png").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"0.png' is not a readable PNG"):
        data.cifar_fs(tmp_path, "val")


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"split": "all"}, "split must be one of 'train', 'val', 'test', got 'all'"),
        ({"size": None}, "size must be an integer of at least 1, got None"),
        ({"cache_bytes": -1}, "cache_bytes must be an integer of at least 0, got -1"),
        ({"path": "no/such"}, "path must be a folder or a zip file, got 'no/such', which does not exist"),
    ],
)
def test_bad_options(tmp_path, bad, text):
    fill(tmp_path / "dtd", class_lists("meta_dataset/dtd")["val"])
    fill(tmp_path / "cifar", class_lists("cifar_fs")["val"])
    with pytest.raises(ValueError, match=text):
        data.cifar_fs(**{"path": tmp_path / "cifar", "split": "val", **bad})
    with pytest.raises(ValueError, match=text):
        data.meta_dataset(**{"path": tmp_path, "split": "val", **bad})


def test_the_published_images(shared_data):
    path = shared_data / "cifar_fs"
    for split in SPLITS:
        found = data.cifar_fs(path, split, cache_bytes=0)
        assert found.class_names == data.image_folder(path, split=split, cache_bytes=0).class_names
        assert set(found.counts) == {100}
    source = data.fc100(path, "test")
    assert (source.num_classes, source.inputs.shape) == (20, (2000, 32, 32, 3))
    other = data.cifar_fs(path, "val")
    for name in ("otter", "butterfly"):
        here, there = (of.inputs[of.members[of.class_names.index(name)]] for of in (source, other))
        np.testing.assert_array_equal(here, there)
    spec = EpisodeSpec(5, 1, 1, hierarchical=True)
    bits = np.random.default_rng(0).integers(2**32, size=(200, source.bits(spec)), dtype=np.uint32)
    rows = source.draw(spec, source.tables(spec), bits).episode.support.inputs
    seen = {tuple(sorted(line)) for line in source.labels[rows].tolist()}
    assert seen == {tuple(members.tolist()) for members in source.nodes.values()}, "one superclass each"


# Meta-Dataset


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """ilsvrc_2012, omniglot, and aircraft as a zip; validation classes only."""
    folder = tmp_path_factory.mktemp("meta_dataset")
    for mark, name in enumerate(THREE):
        fill(folder / name, class_lists(f"meta_dataset/{name}")["val"], each=3, mark=mark)
    shutil.make_archive(str(folder / "aircraft"), "zip", folder / "aircraft")
    shutil.rmtree(folder / "aircraft")
    return folder


def test_episodes_of_meta_dataset(three):
    source = data.meta_dataset(three, "val", size=4)
    assert [part.name for part in source.sources] == list(THREE)
    assert [part.num_classes for part in source.sources] == [158, 81, 15]
    assert (source.name, source.split, source.num_classes) == ("meta_dataset", "val", 254)
    assert source.class_names[158] == "omniglot/Alphabet_of_the_Magi/character01"
    batch = data.episode_batch(source, PUBLISHED, seed=0, start=0, count=300)
    chosen = batch.support.inputs[:, 0, 0, 0, 0]
    assert stats.chisquare(np.bincount(chosen)).pvalue > 1e-3, "equally often"
    of_node = {name: set(map(frozenset, nodes(f"meta_dataset/{name}", "val").values())) for name in THREE}
    ways = {name: [] for name in THREE}
    for pixels, mask, mark in zip(batch.support.inputs[:, :, 0, 0], batch.support.mask, chosen, strict=True):
        assert (pixels[mask, 0] == mark).all(), "one source"
        name = THREE[mark]
        listed = class_lists(f"meta_dataset/{name}")["val"]
        classes = {listed[number] for number in (pixels[mask, 1].astype(int) * 256 + pixels[mask, 2]).tolist()}
        ways[name].append(len(classes))
        if name == "ilsvrc_2012" and len(classes) < 50:
            assert classes in of_node[name], "all classes below a synset"
        elif name != "aircraft":
            assert any(classes <= members for members in of_node[name]), "one alphabet"
    assert (min(ways["ilsvrc_2012"]), max(ways["ilsvrc_2012"])) == (5, 50)
    assert 5 <= min(ways["omniglot"]) <= max(ways["omniglot"]) <= 20
    assert set(ways["aircraft"]) == set(range(5, 16))


def test_named_sources(three):
    names = ["omniglot", "ilsvrc_2012"]
    source = data.meta_dataset(three, "val", sources=names, size=4)
    assert [part.name for part in source.sources] == names
    assert [len(part.nodes) for part in source.sources] == [5, 42]
    stored = data.meta_dataset(three, "val", sources=names, size=4, cache_bytes=1001)
    assert [part.inputs.cache_bytes for part in stored.sources] == [500, 500], "equal parts"
    one, other = (data.episode_batch(of, PUBLISHED, seed=1, start=0, count=4) for of in (source, stored))
    np.testing.assert_array_equal(one.query.inputs, other.query.inputs)
    assert data.meta_dataset(three, "val", sources=("aircraft",), size=4).num_classes == 15


def test_characters_are_bright_on_black(tmp_path):
    for name in class_lists("meta_dataset/omniglot")["val"]:
        (tmp_path / "omniglot" / name).mkdir(parents=True)
        image = np.full([105, 105], 255, np.uint8)
        image[40:60, 40:60] = 0
        Image.fromarray(image).convert("1").save(tmp_path / "omniglot" / name / "1.png")
    images = data.meta_dataset(tmp_path, "val", size=21).examples[0][0]
    assert images.shape == (81, 21, 21, 3)
    assert (images[:, 10, 10].min(), images[:, 0].max()) == (255, 0)


def test_a_slash_in_a_name_is_no_folder(tmp_path):
    names = class_lists("meta_dataset/aircraft")["train"]
    assert {"F-16A/B", "F/A-18"} <= set(names)
    with zipfile.ZipFile(tmp_path / "aircraft.zip", "w") as archive:
        for name in names:
            archive.writestr(f"{name.replace('/', '_')}/1.png", picture())
    assert data.meta_dataset(tmp_path, size=4).num_classes == 70


@pytest.mark.parametrize(
    ("sources", "text"),
    [
        ("dtd", "sources must be a list of sources of Meta-Dataset or None, got 'dtd'"),
        ([], r"sources must be a list of sources of Meta-Dataset or None, got \[\]"),
        (["omniglot", "mnist"], r"sources\[1\] must be one of 'ilsvrc_2012', .* got 'mnist'"),
        (["omniglot", "omniglot"], "sources must differ, got 'omniglot' twice"),
        (["traffic_sign"], "sources must have val classes, which 'traffic_sign' has not; ilsvrc_2012, .*, mscoco do"),
        (["omniglot", "dtd"], "sources names 'dtd', but path '.*' holds neither dtd nor dtd.zip"),
    ],
)
def test_bad_sources(three, sources, text):
    with pytest.raises(ValueError, match=text):
        data.meta_dataset(three, "val", sources=sources)


def test_no_sources_at_all(three, tmp_path):
    (tmp_path / "traffic_sign").mkdir()
    with pytest.raises(ValueError, match=r"path must hold folders or zips named ilsvrc_2012, .* holds none of them"):
        data.meta_dataset(tmp_path, "val")
    with pytest.raises(ValueError, match=r"ilsvrc_2012' lacks 130 of the 130 classes that splits"):
        data.meta_dataset(three, "test")
