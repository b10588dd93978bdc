"""`experiments.vehicle` as a process: a part of the training already tells the vehicles apart."""

import json

import numpy as np
import pytest


@pytest.mark.slow  # trains, and drives for 40 simulated seconds, in a process of its own
@pytest.mark.parametrize(("adaptation", "steps"), [("gradient", 3000), ("recurrent", 1000)])
def test_the_vehicle_that_adapts_keeps_its_lane_better(launch, tmp_path, adaptation, steps):
    done = launch("vehicle", f"--adaptation={adaptation}", "--seeds=2", f"--steps={steps}", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "vehicle.json").read_text())
    assert found["model_error"][1] < 0.8 * found["model_error"][0]
    later = {name: np.mean(found[name]["later"]) for name in ("adaptive", "frozen", "prior", "told")}
    assert later["told"] < later["frozen"]
    assert later["adaptive"] < later["frozen"]
    # until the change they are one vehicle, up to rounding
    np.testing.assert_allclose(found["adaptive"]["before"], found["frozen"]["before"], rtol=1e-3)
    assert (tmp_path / "vehicle.png").stat().st_size > 10_000
    told = done.stdout.splitlines()
    assert told[3].split()[:5] == ["adapts", "to", "the", "last", "steps"]
    assert len(told) == 8


@pytest.mark.slow
def test_bad_input_is_refused(refuses, tmp_path):
    (tmp_path / "file").write_text("")
    cases = [
        ([f"--out={tmp_path / 'file'}"], "out must be a folder, got"),
        (["--before=0"], "before and after must be frictions above 0 and up to 2, got (0.0, 0.35)"),
        (["--after=-0.1"], "before and after must be frictions above 0 and up to 2, got (0.9, -0.1)"),
        (["--seeds=1"], "seeds must be at least 2 and steps at least 1, got 1 and 8000"),
        (["--steps=0"], "seeds must be at least 2 and steps at least 1, got 10 and 0"),
        (["--window=0"], "window must be an integer from 1 to 80, got 0"),
        (["--window=81"], "window must be an integer from 1 to 80, got 81"),
    ]
    refuses("vehicle", cases)
