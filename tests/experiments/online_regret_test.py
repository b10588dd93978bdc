"""`experiments.online_regret` as a process: the meta-leader loses least already on short streams."""

import json

import numpy as np
import pytest


@pytest.mark.slow  # five strategies on two streams, in a process of its own
def test_the_meta_leader_loses_less_than_what_learns_no_prior(launch, tmp_path):
    done = launch("online_regret", "--seeds=2", "--rounds=40", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "online_regret.json").read_text())
    regret = {name: np.array(values) for name, values in found["regret"].items()}
    assert set(regret) == {"leader", "once", "longer", "tuned", "scratch"}
    assert np.all(regret["leader"] < regret["scratch"])
    assert (tmp_path / "online_regret.png").stat().st_size > 10_000
    assert len(done.stdout.splitlines()) == 8


@pytest.mark.slow
def test_bad_input_is_refused(refuses, tmp_path):
    (tmp_path / "file").write_text("")
    cases = [
        ([f"--out={tmp_path / 'file'}"], "out must be a folder, got"),
        (["--seeds=1"], "seeds must be at least 2 and rounds at least 10, got 1 and 200"),
        (["--rounds=9"], "seeds must be at least 2 and rounds at least 10, got 10 and 9"),
    ]
    refuses("online_regret", cases)
