"""`experiments.progressive` as a process: three schedules on the same data, of which the curriculum is the cheaper."""

import json

import pytest


@pytest.mark.slow  # six short runs, in a process of its own
def test_the_curriculum_takes_less_compute_and_the_control_as_much(launch, tmp_path):
    flags = ("--seeds=2", "--steps=20", "--width=4", "--episodes=20", f"--out={tmp_path}")
    done = launch("progressive", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "progressive.json").read_text())["schedules"]
    assert list(found) == ["fixed", "curriculum", "fixed, cut"]
    assert found["fixed"]["share"] == 1.0
    assert 0.3 < found["curriculum"]["share"] < 1.0  # 28 narrow steps and 6 whole ones, for 20 whole ones
    assert abs(found["fixed, cut"]["share"] - found["curriculum"]["share"]) < 0.05
    for row in found.values():
        assert len(row["accuracy"]) == len(row["seconds"]) == 2
        assert min(row["accuracy"]) > 25  # chance is 20
    told = [line for line in done.stdout.splitlines() if line.startswith("curriculum")]
    assert f"{found['curriculum']['share']:.2f}" in told[0]
    assert (tmp_path / "progressive.png").stat().st_size > 1000


@pytest.mark.slow
def test_bad_input_is_refused(refuses, tmp_path):
    (tmp_path / "file").write_text("")
    cases = [
        ([f"--out={tmp_path / 'file'}"], "out must be a folder, got"),
        (["--seeds=1"], "seeds must be at least 2 and steps at least 10, got 1 and 300"),
        (["--steps=9"], "seeds must be at least 2 and steps at least 10, got 10 and 9"),
        (["--width=5"], "width must be an even number of at least 2, got 5"),
    ]
    refuses("progressive", cases)
