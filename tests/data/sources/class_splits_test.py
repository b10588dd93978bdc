"""How classes are divided: shares, lists, and what is refused."""

import itertools

import pytest

from metajax.data.sources._class_splits import divide

NAMES = [f"class{index}" for index in range(50)]


@pytest.mark.parametrize("shares", [None, {"train": 0.9, "val": 0.05, "test": 0.05}, {"val": 0.5, "test": 0.5}])
@pytest.mark.parametrize("count", [3, 4, 10, 50])
def test_shares_divide_all_classes(shares, count):
    splits = shares or ("train", "val", "test")
    found = {split: divide(NAMES[:count], split, shares, "here") for split in splits}
    assert sorted(itertools.chain(*found.values())) == sorted(NAMES[:count]), "each once"
    assert all(found.values()), "none is empty"
    if shares and count == 50:
        assert {split: len(names) for split, names in found.items()} == {
            split: round(50 * share) if share < 0.9 else 46 for split, share in shares.items()
        }


def test_one_split_takes_all():
    assert divide(NAMES, "test", {"test": 1.0}, "here") == sorted(NAMES)


def test_too_many_splits():
    with pytest.raises(
        ValueError, match=r"here has 2 class\(es\); dividing them into train, val, test takes at least 3"
    ):
        divide(NAMES[:2], "train", None, "here")


@pytest.mark.parametrize("splits", [[], 3, {}])
def test_not_a_mapping(splits):
    with pytest.raises(ValueError, match="splits must map splits to class names or to shares, got"):
        divide(NAMES, "train", splits, "here")


def test_names_of_published_lists():
    with pytest.raises(ValueError, match=r"name must be one of 'cifar_fs', .*, got 'train'"):
        divide(NAMES, "train", "train", "here")


def test_a_number_in_front_does_not_matter():
    names = ["001.Black_footed_Albatross", "Laysan albatross", "00014", "3d printer"]
    splits = {"train": ["Black footed albatross", "002.Laysan_Albatross"], "val": ["00014"], "test": ["3D_printer"]}
    assert divide(names, "train", splits, "here") == ["001.Black_footed_Albatross", "Laysan albatross"]
    assert divide(names, "val", splits, "here") == ["00014"]
    assert divide(names, "test", splits, "here") == ["3d printer"]
