"""`experiments.reweighting` as a process: wrong labels weigh less, and learning what they weigh pays."""

import json

import numpy as np
import pytest


@pytest.mark.slow  # three ways of training on two problems, in a process of its own
def test_wrong_labels_weigh_less_and_the_test_images_gain(launch, tmp_path):
    done = launch("reweighting", "--seeds=2", "--steps=40", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "reweighting.json").read_text())
    wrong, right = (np.array(found[f"weight_of_{name}"]) for name in ("wrong", "right"))
    assert np.all(wrong < 0.5 * right)
    accuracy = {name: np.array(values) for name, values in found["accuracy"].items()}
    assert np.all(accuracy["learned"] > accuracy["plain"] + 3)
    assert np.all(accuracy["known"] > accuracy["plain"] + 3)
    told = done.stdout.splitlines()
    assert told[0] == "test accuracy in %, 2 problems: mean and 95 % interval"
    assert told[4].split() == [
        "with",
        "learned",
        "weights",
        f"{accuracy['learned'].mean():.2f}",
        "+-",
        told[4].split()[-1],
    ]
    assert len(told) == 10


@pytest.mark.slow
def test_bad_input_is_refused(refuses, tmp_path):
    (tmp_path / "file").write_text("")
    cases = [
        ([f"--out={tmp_path / 'file'}"], "out must be a folder, got"),
        (["--train=0"], "train must be an integer from 1 to 160, got 0"),
        (["--train=161"], "train must be an integer from 1 to 160, got 161"),
        (["--wrong=1"], "wrong must be a number above 0 and below 1, got 1.0"),
        (["--seeds=1"], "seeds must be at least 2 and steps at least 1, got 1 and 60"),
        (["--steps=0"], "seeds must be at least 2 and steps at least 1, got 10 and 0"),
    ]
    refuses("reweighting", cases)
