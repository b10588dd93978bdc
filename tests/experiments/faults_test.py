"""`experiments.faults` in short: several processes train as one, and what was killed ends as what was not."""

import os
import signal
import types

import launchers
import numpy as np
import pytest

from experiments import faults
from metajax.run import _process

_STEPS = 60


@pytest.fixture(scope="module", autouse=True)
def _forks():
    """Its processes are forks of one that has imported the libraries."""

    def start(command, env, **_):
        return launchers.Forked(command, env={**env, "XLA_FLAGS": launchers.environment()["XLA_FLAGS"]})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "subprocess", types.SimpleNamespace(Popen=start, DEVNULL=None, PIPE=None))
        yield


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """What a run in one process of two devices ends with."""
    return _finish(tmp_path_factory.mktemp("faults") / "whole", devices=2)


def _finish(workdir, **options):
    ended = faults.end(faults.start(workdir, steps=_STEPS, **options), workdir)
    assert not any(ended.statuses), ended.told
    return faults.results(workdir)


def _losses(found):
    return np.array([line["loss"] for line in found["metrics"] if "loss" in line])


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_end_with_the_bits_of_one(whole_run, tmp_path):
    workdir = tmp_path / "run"
    started = faults.start(workdir, steps=_STEPS, processes=2, silence=20)
    assert faults.wait_for_step(started, workdir, 12)
    ended = faults.end(started, workdir, signal.SIGKILL, to=1)
    # the other one ends by itself: 134 where JAX is the first to notice
    assert ended.statuses in ([_process.LOST_PEER, -signal.SIGKILL], [-signal.SIGABRT, -signal.SIGKILL])
    assert ended.seconds < 60
    assert not (workdir / "results.json").exists()
    assert _finish(workdir, processes=2) == whole_run
    assert {path.name for path in workdir.glob("heartbeat*")} == {"heartbeat.json", "heartbeat-1.json"}


@pytest.mark.slow  # `tests/training/watch_test.py` has the signal alone
def test_a_preempted_job_saves_and_goes_on_in_one_process_to_the_same_bits(whole_run, tmp_path):
    workdir = tmp_path / "run"
    started = faults.start(workdir, steps=_STEPS, processes=2)
    assert faults.wait_for_step(started, workdir, 12)
    ended = faults.end(started, workdir, signal.SIGTERM, to=1)
    assert ended.statuses == [os.EX_TEMPFAIL] * 2, ended.told
    assert all("is saved" in told for told in ended.told)
    assert _finish(workdir, devices=2) == whole_run


@pytest.mark.slow
def test_four_processes_train_as_one(whole_run, tmp_path):
    found = _finish(tmp_path / "run", processes=4)
    np.testing.assert_allclose(_losses(found), _losses(whole_run), rtol=1e-4)
    assert found["accuracy"] == pytest.approx(whole_run["accuracy"], abs=0.02)


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        (
            "--config.learner.distance=cosine",
            "got process 1 that differs from process 0: config.learner.distance was 'euclidean', is 'cosine'",
        ),
        pytest.param(
            "--workdir={elsewhere}",
            "process 1: workdir must be one folder that all hosts share, got",
            marks=pytest.mark.slow,
        ),
        pytest.param("--config.episode.ways=99", "process 1: ", marks=pytest.mark.slow),
    ],
    ids=["config", "folder", "data"],
)
def test_processes_that_do_not_fit_together_all_end_and_say_why(tmp_path, flag, told):
    workdir = tmp_path / "run"
    last = [flag.format(elsewhere=tmp_path / "elsewhere")]
    ended = faults.end(faults.start(workdir, steps=_STEPS, processes=2, last=last), workdir)
    assert ended.statuses == [2, 2]
    assert all(told in text.splitlines()[-1] for text in ended.told), ended.told


def test_what_does_not_describe_a_job_is_refused(refusals):
    told = refusals(
        "train",
        [
            ["--coordinator=host:1", "--process_id=0"],
            ["--coordinator=host", "--process_id=0", "--num_processes=2"],
            ["--coordinator=host:1", "--process_id=2", "--num_processes=2"],
            ["--coordinator=host:1", "--process_id=0", "--num_processes=2", "--peer_timeout=0"],
            ["--distributed"],
        ],
    )
    assert "must be given together, got no num_processes" in told[0]
    assert "coordinator must be HOST:PORT, got 'host'" in told[1]
    assert "process_id must be from 0 to num_processes - 1, got 2 of 2" in told[2]
    assert "peer_timeout must be at least 1 second, got 0" in told[3]
    assert "distributed found no job to join" in told[4]


def test_the_table_is_written(launch, tmp_path):
    done = launch("faults", "--only=kills,storage", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2
    assert "only must hold kills, processes, preempted, elastic, got 'storage'" in done.stderr
    assert not (tmp_path / "out").exists()
