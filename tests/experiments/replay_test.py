"""`experiments.replay` as a process: a memory keeps what was learned from being forgotten."""

import json

import numpy as np
import pytest


@pytest.mark.slow  # two streams, each learned three times, in a process of its own
def test_a_memory_keeps_alphabets_from_being_forgotten(launch, tmp_path):
    done = launch("replay", "--seeds=2", "--steps=25", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "replay.json").read_text())
    tables = {name: np.array(values) for name, values in found["accuracy"].items()}
    assert {table.shape for table in tables.values()} == {(2, 5, 5)}  # streams, after each alphabet, of each
    final = {name: table[:, -1].mean(axis=-1) for name, table in tables.items()}
    forgotten = {name: (table.max(axis=1) - table[:, -1])[:, :-1].mean(axis=-1) for name, table in tables.items()}
    for name in ("reservoir", "balanced"):
        assert np.all(final[name] > final["without"] + 20)
        assert np.all(forgotten[name] < 0.5 * forgotten["without"])
        np.testing.assert_allclose(found["rows"][name]["accuracy"], final[name])
        np.testing.assert_allclose(found["rows"][name]["forgetting"], forgotten[name])
        np.testing.assert_allclose(found[name]["gain"][0], np.mean(final[name] - final["without"]))
    assert all(len(set(names)) == 5 for names in found["order"])
    for name, row in found["rows"].items():
        assert np.all(np.array(row["of_own_alphabet"]) >= final[name])  # fewer letters to choose from
    assert np.all(np.array(found["rows"]["reservoir"]["of_own_alphabet"]) > found["rows"]["without"]["of_own_alphabet"])
    told = done.stdout.splitlines()
    assert told[0] == "2 streams of 5 alphabets of 10 letters, 25 meta steps on each"
    assert told[3].split()[:3] == ["a", "reservoir", f"{final['reservoir'].mean():.1f}"]
    assert (tmp_path / "replay.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_bad_input_is_refused(refuses, tmp_path):
    (tmp_path / "file").write_text("")
    cases = [
        ([f"--out={tmp_path / 'file'}"], "out must be a folder, got"),
        (["--seeds=1"], "seeds must be at least 2 and steps at least 1, got 1 and 100"),
        (["--steps=0"], "seeds must be at least 2 and steps at least 1, got 10 and 0"),
        (["--capacity=29"], "capacity must be at least 30, the images of a step, got 29"),
        ([f"--data={tmp_path / 'none'}"], "path must be a folder or a zip file, got"),
    ]
    refuses("replay", cases)
