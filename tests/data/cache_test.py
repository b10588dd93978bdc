"""The cache of decoded arrays: it saves work, and nothing that is wrong with it reaches the result."""

import os

import numpy as np
import pytest

from metajax.data import _cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("METAJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Maker:
    """Makes arrays, and counts how often."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"x": np.arange(5000), "names": np.array(["a", "bc"])}


def assert_made(arrays):
    assert sorted(arrays) == ["names", "x"]
    np.testing.assert_array_equal(arrays["x"], np.arange(5000))
    assert arrays["names"].tolist() == ["a", "bc"]


def test_makes_once(folder):
    make = Maker()
    for _ in range(3):
        assert_made(_cache.cached("key", make))
    assert make.calls == 1
    assert_made(_cache.cached("other key", make))
    assert make.calls == 2
    assert len(list(folder.iterdir())) == 2, "no temporary files are left"


def test_keys_of_any_text_stay_inside_the_folder(folder):
    make = Maker()
    for key in ("../../a", "/b", "x" * 5000, "", "ä\n"):
        _cache.cached(key, make)
    assert len(list(folder.iterdir())) == 5
    assert [entry.name for entry in folder.parent.iterdir()] == ["cache"]


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped", "pickle"])
def test_a_damaged_file_is_made_anew(folder, damage):
    make = Maker()
    _cache.cached("key", make)
    (file,) = folder.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "empty":
        content = b""
    elif damage == "text":
        content = b"not a zip"
    elif damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[2000] ^= 255
    if damage == "pickle":
        np.savez(file, x=np.array([{}], dtype=object))
    else:
        file.write_bytes(content)
    assert_made(_cache.cached("key", make))
    assert make.calls == 2
    assert_made(_cache.cached("key", make))
    assert make.calls == 2, "the damaged file was replaced"


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    monkeypatch.setenv("METAJAX_CACHE", str(blocked / "cache"))
    assert_made(_cache.cached("key", Maker()))
    assert blocked.read_text() == "a file where the folder should be"


def test_a_full_disk_leaves_nothing_behind(folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert_made(_cache.cached("key", Maker()))
    assert list(folder.iterdir()) == []


def test_an_empty_variable_turns_it_off(tmp_path, monkeypatch):
    monkeypatch.setenv("METAJAX_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    make = Maker()
    for _ in range(2):
        assert_made(_cache.cached("key", make))
    assert make.calls == 2
    assert os.listdir(tmp_path) == []


def test_the_home_folder_is_the_default(tmp_path, monkeypatch):
    monkeypatch.delenv("METAJAX_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    _cache.cached("key", Maker())
    assert len(list((tmp_path / ".cache" / "metajax").iterdir())) == 1
