"""`experiments.recurrent_replay` as a process: a stored state carries what a stretch does not show."""

import json

import numpy as np
import pytest


@pytest.mark.slow  # four trainings of two seeds, in a process of their own
def test_a_stored_state_beats_zeros(launch, tmp_path):
    done = launch("recurrent_replay", "--seeds=2", "--steps=600", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    error = json.loads((tmp_path / "recurrent_replay.json").read_text())["error"]
    assert {name: len(values) for name, values in error.items()} == dict.fromkeys(
        ("zero", "zero_burn_in", "stored", "stored_burn_in"), 2
    )
    assert np.all(np.array(error["stored"]) < 0.8 * np.array(error["zero"]))
    assert np.all(np.array(error["stored_burn_in"]) < 0.8 * np.array(error["zero"]))
    told = done.stdout.splitlines()
    assert told[2].split()[:2] == ["zeros", f"{np.mean(error['zero']):.3f}"]
    assert (tmp_path / "recurrent_replay.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_bad_input_is_refused(refuses, tmp_path):
    (tmp_path / "file").write_text("")
    cases = [
        ([f"--out={tmp_path / 'file'}"], "out must be a folder, got"),
        (["--seeds=1"], "seeds must be at least 2 and steps at least 1, got 1 and 4000"),
        (["--steps=0"], "seeds must be at least 2 and steps at least 1, got 10 and 0"),
        (["--burn_in=0"], "burn_in must be an integer from 1 to 23, got 0"),
        (["--burn_in=24"], "burn_in must be an integer from 1 to 23, got 24"),
    ]
    refuses("recurrent_replay", cases)
