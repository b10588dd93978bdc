"""The benchmark beside peers: what it computes from times, and how it treats its workers. Nothing is timed."""

import contextlib
import pathlib

import numpy as np
import pytest

from experiments import _benchmark_speed, _speed_job


def _found(seconds, left_out):
    facts = {name: {"peak_bytes": 10**6 * index} for index, name in enumerate(seconds, 1)}
    facts["metajax unrolled"] |= {"flops": 6e9, "temporary_bytes": 2 * 10**6}
    return {"seconds": seconds, "facts": facts, "left_out": left_out}


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "inputs.npz"
    _speed_job.write(path, _speed_job.draw(1, width=2, side=16, ways=2, queries=1))
    return path


def test_ratios_are_to_the_fastest_peer_and_the_limit_is_that_of_the_matmul_peak():
    seconds = {"metajax mixed mode": 0.5, "metajax unrolled": 0.25, "PyTorch loop": 2.0, "higher": 1.0}
    found = _benchmark_speed.summary("conv4_step", _found(seconds, {}), {}, 4, 100.0)
    assert found["ratio"] == {"metajax mixed mode": 2, "metajax unrolled": 4, "PyTorch loop": 0.5, "higher": 1}
    assert found["ratio_to_fastest_peer"] == 4
    assert found["tasks_per_second"]["metajax unrolled"] == 16
    assert found["least_seconds"] == pytest.approx(0.06)
    assert found["fraction_of_peak"]["higher"] == pytest.approx(0.06)
    assert found["peak_memory_bytes"]["higher"] == 4 * 10**6
    assert found["temporary_bytes"] == {"metajax unrolled": 2 * 10**6}


def test_without_a_peer_there_is_no_ratio_and_the_table_says_why():
    lacking = {"higher": "No module named 'higher'"}
    job = _benchmark_speed.summary("conv4_step", _found({"metajax unrolled": 0.25}, lacking), {}, 4, None)
    assert job["ratio_to_fastest_peer"] is None
    figures = {
        "conv4_step": job, "adapt": job, "tasks": 4, "matmul_peak_gflops": None, "versions": {"jax": "1.2"},
        "device": "cpu", "least_seconds": {"conv4_step": None, "adapt": None},
    }  # fmt: skip
    told = _benchmark_speed.report(figures)
    assert "higher               left out: No module named 'higher'" in told
    assert "metajax unrolled        0.2500      -        1        2    16.00       -" in told


def test_inputs_are_read_as_they_were_written(tiny):
    drawn = _speed_job.draw(1, width=2, side=16, ways=2, queries=1)
    read = _speed_job.read(str(tiny), "float64")
    assert list(read.params) == list(drawn.params)
    np.testing.assert_array_equal(read.params["head/kernel"], drawn.params["head/kernel"])
    np.testing.assert_array_equal(read.query[0], drawn.query[0])
    assert (read.params["head/bias"].dtype, read.query[0].dtype, read.query[1].dtype) == ("float64", "float64", "int32")


def test_a_worker_writes_what_is_checked(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    worker = _benchmark_speed.Worker(tmp_path, "jax by hand", "adapt", tiny, "float64", 0.01)
    with contextlib.closing(worker):
        about = worker.ask(120, "check", path=str(tmp_path / "out.npz"))
    assert about["accelerator"] is False
    with np.load(tmp_path / "out.npz") as archive:
        result = {name: archive[name] for name in archive.files}
    params = _speed_job.read(str(tiny), "float64").params
    assert {name: (value.shape, value.dtype) for name, value in result.items()} == {
        name: (value.shape, np.dtype("float64")) for name, value in params.items()
    }
    # the biases of the head move against the mean of (probability - label), so their sum stays
    assert 0 < np.abs(result["head/bias"]).max() < 0.05
    assert result["head/bias"].sum() == pytest.approx(0, abs=1e-12)


def test_a_variant_whose_package_is_missing_is_left_out_by_name(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    reference = {"head/bias": np.ones(2)}

    class Reference:
        def ask(self, limit, do, path):
            np.savez(path, **reference)
            return {}

        def close(self):
            pass

    start = _benchmark_speed.Worker
    monkeypatch.setattr(
        _benchmark_speed,
        "Worker",
        lambda folder, name, *rest: Reference() if name == "metajax" else start(folder, name, *rest),
    )
    inputs = _speed_job.draw(1, width=2, side=16, ways=2, queries=1)
    errors, left_out, _ = _benchmark_speed.check(
        pathlib.Path(tmp_path), "adapt", inputs, 60.0, ("metajax", "PyTorch loop")
    )
    assert errors == {"metajax": 0.0}
    assert left_out == {"PyTorch loop": "ModuleNotFoundError: No module named 'torch'"}


def test_a_worker_that_does_not_answer_in_time_is_given_up(tiny, tmp_path):
    worker = _benchmark_speed.Worker(tmp_path, "metajax", "adapt", tiny, "float32", 0.1)
    late = pytest.raises(_benchmark_speed.Failed, match=r"compile: more than 0\.01 s")
    with contextlib.closing(worker), late:
        worker.ask(0.01, "compile")


def test_the_relative_error_is_over_all_arrays():
    reference = {"a": np.array([3.0]), "b": np.array([4.0])}
    assert _benchmark_speed.relative_error({"a": np.array([3.5]), "b": np.array([4.0])}, reference) == 0.1
