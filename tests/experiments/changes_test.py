"""`experiments.changes` as a process: what looks for changes loses less than what does not."""

import json

import numpy as np
import pytest


@pytest.mark.slow  # prototypes are trained, in a process of its own
def test_detection_loses_less_than_a_long_window(launch, tmp_path):
    done = launch("changes", "--seeds=2", "--steps=150", "--train_steps=60", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "changes.json").read_text())
    rows = {name: values for name, values in found.items() if isinstance(values, dict)}
    assert set(rows) == {
        "told when it changes",
        "change points",
        "the last step",
        "the last 5 steps",
        "the last 20 steps",
    }
    regret = {name: np.mean(row["regret"]) for name, row in rows.items()}
    assert regret["told when it changes"] == 0
    assert 0 < regret["change points"] < regret["the last 20 steps"]
    assert (tmp_path / "changes.png").stat().st_size > 10_000


@pytest.mark.slow
def test_bad_input_is_refused(refuses, tmp_path):
    (tmp_path / "file").write_text("")
    cases = [
        ([f"--out={tmp_path / 'file'}"], "out must be a folder, got"),
        (["--seeds=1"], "seeds must be at least 2 and steps at least 40, got 1 and 400"),
        (
            ["--seed=4", "--seeds=2", "--steps=40"],
            "steps must be enough for a change with 10 steps before and after it",
        ),
        (["--steps=39"], "seeds must be at least 2 and steps at least 40, got 10 and 39"),
    ]
    refuses("changes", cases)
