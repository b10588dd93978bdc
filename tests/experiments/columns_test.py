"""`experiments.columns` as a process: three ways that begin alike and then differ."""

import json

import numpy as np
import pytest


@pytest.mark.slow  # two streams, each learned three times, in a process of its own
def test_columns_learn_every_alphabet(launch, tmp_path):
    done = launch("columns", "--seeds=2", "--steps=25", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    accuracy = {
        name: np.array(rows) for name, rows in json.loads((tmp_path / "columns.json").read_text())["accuracy"].items()
    }
    assert {rows.shape for rows in accuracy.values()} == {(2, 5)}
    for rows in accuracy.values():
        assert np.all(rows > 40)  # of ten letters
        np.testing.assert_array_equal(rows[:, 0], accuracy["own"][:, 0])  # nothing stands beside the first
    assert np.any(accuracy["columns"][:, 1:] != accuracy["untrained"][:, 1:])
    assert np.any(accuracy["columns"][:, 1:] != accuracy["own"][:, 1:])
    told = done.stdout.splitlines()
    more = (accuracy["columns"] - accuracy["untrained"])[:, 1:].mean()
    assert float(told[5].split()[-3]) == pytest.approx(more, abs=0.06)
    assert (tmp_path / "columns.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_bad_input_is_refused(refuses, tmp_path):
    (tmp_path / "file").write_text("")
    cases = [
        ([f"--out={tmp_path / 'file'}"], "out must be a folder, got"),
        (["--seeds=1"], "seeds must be at least 2 and steps at least 1, got 1 and 100"),
        (["--steps=0"], "seeds must be at least 2 and steps at least 1, got 10 and 0"),
        ([f"--data={tmp_path / 'none'}"], "path must be a folder or a zip file, got"),
    ]
    refuses("columns", cases)
