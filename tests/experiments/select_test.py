"""`experiments.select` as a process: one family, few steps."""

import json

import pytest


@pytest.mark.slow  # ten strategies are compiled and trained twice, in a process of its own
def test_a_family_has_a_row(launch, tmp_path):
    done = launch("select", "--families=1", "--budget=80", "--episodes=20", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "select.json").read_text())["families"]
    assert row["family"] == "LATIN"
    assert len(row["all"]) == 10
    assert row["best_accuracy"][0] == max(mean for mean, _ in row["all"].values())
    assert row["chosen_accuracy"] == pytest.approx(row["all"][row["chosen"]], abs=0.02), (
        "trained as far, by the same steps"
    )
    assert row["share_of_steps"] < 0.4
    assert row["within"] == (row["chosen_accuracy"][0] >= row["best_accuracy"][0] - row["best_accuracy"][1])
    assert (tmp_path / "latin.png").read_bytes()[1:4] == b"PNG"
    assert "chosen within one interval of the best: " in done.stdout


def test_bad_input_is_refused(refuses, tmp_path):
    (tmp_path / "file").write_text("")
    cases = [
        ([f"--out={tmp_path / 'file'}"], "out must be a folder, got"),
        ([f"--out={tmp_path / 'out'}", "--families=7"], "families must be an integer from 1 to 6, got 7"),
        ([f"--out={tmp_path / 'out'}", "--together=0"], "together must be an integer of at least 1, got 0"),
        ([f"--out={tmp_path / 'out'}", "--budget=19"], "budget must be at least 20 meta steps"),
    ]
    refuses("select", cases)
