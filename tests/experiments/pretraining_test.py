"""`experiments.pretraining` as a process, on noise: the arms take as long, and the figures agree."""

import json

import numpy as np
import pytest
from PIL import Image

import metajax


@pytest.fixture
def folder(tmp_path):
    """The classes of CIFAR-FS, 20 images each."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for name in metajax.data.class_lists("cifar_fs")[split]:
            (tmp_path / "data" / name).mkdir(parents=True)
            for number in range(20):
                image = rng.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(image).save(tmp_path / "data" / name / f"{number}.png")
    return tmp_path / "data"


@pytest.mark.slow  # three trainings, in a process of their own
def test_the_arms_take_as_long(launch, folder, tmp_path):
    out = tmp_path / "out"
    flags = [f"--data={folder}", f"--out={out}", "--pretrain_steps=8", "--meta_steps=8", "--width=8", "--episodes=20"]
    done = launch("pretraining", *flags)
    assert done.returncode == 0, done.stderr
    moco, scratch = (json.loads((out / f"{arm}.json").read_text()) for arm in ("moco", "scratch"))
    assert moco["steps"] == 8
    assert scratch["steps"] == round(moco["seconds"] / moco["cost"]) > 8
    assert moco["curve"][0][0] > 0
    assert len(moco["curve"]) == 9
    gain = 100 * np.mean(np.subtract(moco["accuracy"], scratch["accuracy"]))
    table = done.stdout.splitlines()[-6:]
    assert table[3].startswith("  more, episode by episode")
    assert float(table[3].split()[4]) == pytest.approx(gain, abs=0.006)
    supervised = json.loads((out / "supervised.json").read_text())
    assert table[4].startswith("labels, then prototypical")
    assert float(table[4].split()[3]) == pytest.approx(100 * np.mean(supervised["accuracy"]), abs=0.006)
    assert supervised["curve"][0][0] > 0
    assert (out / "pretraining.png").read_bytes()[1:4] == b"PNG"
    again = launch("pretraining", *flags)
    assert again.stdout.splitlines() == table, "nothing is trained again"


@pytest.mark.slow
def test_bad_input_is_refused(refuses, tmp_path):
    (tmp_path / "file").write_text("")
    cases = [
        (["--data=x", f"--out={tmp_path / 'file'}"], "out must be a folder, got"),
        (["--data=x", "--meta_steps=3"], "pretrain_steps and meta_steps must be at least 8, got 1000 and 3"),
        (["--data=x", "--scratch_steps=7"], "scratch_steps must be 0 or at least 8, got 7"),
        (["--data=no/such/folder"], "no/such/folder"),
        (["--data=x", "--arms=both"], "arms must be among scratch, moco, supervised, got ['both']"),
    ]
    refuses("pretraining", cases)
