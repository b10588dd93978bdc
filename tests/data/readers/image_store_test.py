"""Images that are decoded when they are asked for: equal to those in memory, and bounded."""

import gc
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import worlds
from PIL import Image

from metajax.data import EpisodeSpec, device_sampler, episode_batch, episodes, image_folder
from metajax.data.readers._image_store import StoredImages, read_images

SPEC = EpisodeSpec(3, 1, 2)


def picture(row):
    return np.full([2, 3, 1], row, np.uint8)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(5):
        (tmp_path / f"class{index}").mkdir()
        for k in range(6):
            image = Image.fromarray(rng.integers(0, 256, [8, 8, 3], np.uint8))
            image.save(tmp_path / f"class{index}" / f"{k}.png")
    return tmp_path


def lazy(folder, cache_bytes):
    return image_folder(folder, splits={"train": [f"class{index}" for index in range(5)]}, cache_bytes=cache_bytes)


KEPT = [(form, kept) for form in ("folder", "zip", "zips") for kept in (0, 7, 100)]


# every form with a cache that is filled and emptied; none, and one that holds all, for folders
@pytest.mark.parametrize(
    ("form", "images_kept"), worlds.few_by_default(KEPT, lambda form, kept: form == "folder" or kept == 7)
)
def test_the_same_images_whatever_is_kept(folder, images_kept, form):
    if form != "folder":
        name = folder / "zips" / "train" if form == "zips" else folder.with_name("images")
        folder = pathlib.Path(shutil.make_archive(name, "zip", folder))
        folder = folder.parent if form == "zips" else folder
    source, whole = lazy(folder, 192 * images_kept + 5), lazy(folder, None)
    stream, expected = (episodes(one, SPEC, batch=4, seed=1) for one in (source, whole))
    for _ in range(20):
        jax.tree.map(np.testing.assert_array_equal, next(stream), next(expected))
    stream.close()
    gc.collect()
    assert source.inputs.kept_bytes == 192 * min(images_kept, 30)
    pair = (episode_batch(one, SPEC, seed=3, start=0, count=2) for one in (source, whole))
    jax.tree.map(np.testing.assert_array_equal, *pair)


def test_on_the_device(folder):
    """What is decoded on demand is put on the device whole."""
    found = [device_sampler(source, SPEC) for source in (lazy(folder, 0), lazy(folder, None))]
    drawn = [sample(data, jax.random.key(3)) for data, sample in found]
    jax.tree.map(np.testing.assert_array_equal, *drawn)


def test_kept_images_are_decoded_once():
    asked = []
    images = StoredImages(lambda row: (asked.append(row), picture(row))[1], (9, 2, 3, 1), cache_bytes=3 * 6)
    for rows in ([4, 4, 5], [5, 6, 7], [4, 5, 6], [7, -1, 7]):
        found = images.take(np.array(rows))
        assert found.shape == (3, 2, 3, 1)
        assert [int(image.max()) for image, row in zip(found, rows, strict=True) if row >= 0] == [
            row for row in rows if row >= 0
        ]
    assert asked == [4, 5, 6, 7, 7], "the first three are kept; the fourth is decoded each time, once a call"
    assert images.kept_bytes == 18


def test_many_threads():
    images = StoredImages(picture, (200, 2, 3, 1), cache_bytes=100 * 6)
    wrong = []

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(200):
            rows = rng.integers(0, 200, [16])
            if (images.take(rows)[:, 0, 0, 0] != rows).any():
                wrong.append(rows)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert images.kept_bytes == 600
    assert sorted(images._place[images._place >= 0]) == list(range(100)), "no place is given twice"


def test_what_is_wrong_is_found_when_it_is_read(folder):
    (folder / "class1" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nhello")
    Image.new("RGB", (9, 8)).save(folder / "class2" / "3.png")
    with pytest.raises(ValueError, match=r"class1/3.png' is not a readable PNG, JPEG or BMP image"):
        lazy(folder, None)
    source = lazy(folder, 0)
    with pytest.raises(ValueError, match=r"class1/3.png' is not a readable PNG, JPEG or BMP image"):
        source.inputs.take(np.array([0, 9]))
    with pytest.raises(ValueError, match=r"'class0/0.png' is 8 x 8 and 'class2/3.png' is 8 x 9"):
        source.inputs.take(np.array([15]))
    stream = episodes(source, SPEC, batch=4, seed=1)
    with pytest.raises(ValueError, match=r"class1/3.png|class2/3.png"):
        [next(stream) for _ in range(50)]


@pytest.mark.parametrize("cache_bytes", [-1, 1.5, True])
def test_bad_cache_bytes(cache_bytes):
    with pytest.raises(ValueError, match=f"cache_bytes must be an integer of at least 0, got {cache_bytes}"):
        read_images(picture, str, 3, where="here", cache_bytes=cache_bytes)


_STREAM = """
import json, resource, sys
from metajax import data
from metajax.data import _pipeline
_pipeline.tensorflow()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
source = data.image_folder(sys.argv[1], splits={"train": 1.0}, cache_bytes=int(sys.argv[2]))
stream = data.episodes(source, data.EpisodeSpec(5, 1, 5), batch=8, seed=0)
next(stream)
before, most = resident(), 0
for _ in range(int(sys.argv[3])):
    next(stream)
    most = max(most, resident())
print(json.dumps({"grown": most - before, "size": source.inputs.nbytes, "kept": source.inputs.kept_bytes}))
"""


@pytest.mark.slow  # 300 large images; the number of kept bytes is checked above
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
def test_memory_is_bounded_by_the_cache(tmp_path):
    """A real process streams a set of three times the cache, many times over."""
    for index in range(6):
        (tmp_path / f"class{index}").mkdir()
        for k in range(50):
            Image.new("RGB", (256, 256), (index, k, 0)).save(tmp_path / f"class{index}" / f"{k}.bmp")
    size = 300 * 256 * 256 * 3
    done = subprocess.run(
        [sys.executable, "-c", _STREAM, tmp_path, str(size // 3), "20"], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["size"] == size
    assert size // 3 - 2**20 < found["kept"] <= size // 3
    # besides the cache, batches that wait: 4 + 3 of 8 episodes of 30 images are 310 MB at most
    batch = 8 * 30 * 256 * 256 * 3
    assert found["grown"] < size // 3 + 9 * batch, found
