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
    sizes = ("--pretrain_steps=8", "--meta_steps=8", "--width=8", "--episodes=20")
    done = launch("pretraining", f"--data={folder}", f"--out={out}", *sizes)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "pretraining.json").read_text())
    seconds = found["seconds"]
    assert 0.5 < seconds["scratch"] / seconds["moco"] < 2
    assert [len(curve) for curve in found["validation"].values()] == [9, pytest.approx(9, abs=9)]
    gain = found["accuracy"]["moco"][0] - found["accuracy"]["scratch"][0]
    assert found["gain_percent"][0] == pytest.approx(100 * gain)
    assert len(done.stdout.splitlines()) == 5
    assert (out / "pretraining.png").read_bytes()[1:4] == b"PNG"


def test_bad_input_is_refused(refusals, tmp_path):
    (tmp_path / "file").write_text("")
    cases = [
        (["--data=x", f"--out={tmp_path / 'file'}"], "out must be a folder, got"),
        (["--data=x", "--meta_steps=3"], "pretrain_steps and meta_steps must be at least 8, got 1000 and 3"),
        (["--data=no/such/folder"], "no/such/folder"),
    ]
    for text, (_, expected) in zip(refusals("pretraining", [flags for flags, _ in cases]), cases, strict=True):
        assert expected in text
