"""Curriculum and replay of `experiments.train`: what each step trains on, and that a resumed run goes on alike."""

import jax
import launchers
import numpy as np
import pytest

import metajax
from metajax.run import _job
from metajax.run import _train as train

_CURRICULUM = {
    "curriculum.until": (5, 10), "curriculum.ways": (2, 0), "curriculum.shots": (2, 0), "curriculum.size": (4, 6),
}  # fmt: skip
_REPLAY = {"replay.capacity": 6, "replay.count": 2}


_SHORT = {
    "training.steps": 15, "training.meta_batch": 2, "log.every": 4, "validation.every": 15, "validation.episodes": 4,
    "evaluation.episodes": 4, "checkpoint.every": 3,
}  # fmt: skip


def _config(pictures, changes):
    return launchers.small_config(pictures, {**_SHORT, **changes})


@pytest.mark.slow
def test_each_step_sees_the_episodes_of_its_stage(pictures, tmp_path, monkeypatch):
    seen, fit = [], metajax.training.fit

    def watched(outer, state, episodes, **options):
        def told():
            for batch in episodes:
                seen.append((batch.support.inputs.shape, batch.query.class_mask.shape))
                yield batch

        class Stream:
            position = property(lambda self: episodes.position)
            __iter__ = lambda self: told()  # noqa: E731

        return fit(outer, state, Stream(), **options)

    monkeypatch.setattr(metajax.training, "fit", watched)
    train.run(_config(pictures, _CURRICULUM), tmp_path / "run")
    stages = [((2, 4, 4, 4, 1), (2, 2)), ((2, 3, 6, 6, 1), (2, 3)), ((2, 3, 8, 8, 1), (2, 3))]
    assert seen == [stages[0]] * 5 + [stages[1]] * 5 + [stages[2]] * 5
    lines = metajax.training.read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [1, 4, 8, 12, 15]


@pytest.mark.parametrize(
    "changes",
    [
        _CURRICULUM,
        pytest.param({**_CURRICULUM, "sampler": "device"}, marks=pytest.mark.slow),
        pytest.param(_REPLAY, marks=pytest.mark.slow),
        pytest.param({**_REPLAY, "replay.by_loss": True}, marks=pytest.mark.slow),
    ],
    ids=["curriculum", "curriculum on the device", "replay", "replay by loss"],
)
@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_parameters(pictures, tmp_path, monkeypatch, changes):
    config = _config(pictures, changes)
    train.run(config, tmp_path / "whole")
    beat = metajax.training.Heartbeat.__call__

    def interrupted(heartbeat, step, state, metrics):
        if step == 8:
            raise InterruptedError("the power went")
        beat(heartbeat, step, state, metrics)

    with monkeypatch.context() as broken:
        broken.setattr(metajax.training.Heartbeat, "__call__", interrupted)
        with pytest.raises(InterruptedError):
            train.run(config, tmp_path / "broken")
    train.run(config, tmp_path / "broken", resume=True)
    found = [metajax.load_run(tmp_path / name)[1] for name in ("whole", "broken")]
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(one, other)
    losses = [
        [line.get("loss") for line in metajax.training.read_metrics(tmp_path / name)] for name in ("whole", "broken")
    ]
    assert losses[0] == losses[1]


def test_what_comes_again_is_counted(pictures, tmp_path):
    train.run(_config(pictures, {**_REPLAY, "log.every": 1}), tmp_path / "run")
    lines = [line for line in metajax.training.read_metrics(tmp_path / "run") if "replayed" in line]
    assert [line["replayed"] for line in lines] == [0] + [2] * 14


@pytest.mark.slow
def test_a_rollback_into_the_stage_before_goes_through_both(pictures, tmp_path, monkeypatch, capsys):
    config = _config(pictures, {**_CURRICULUM, "checkpoint.every": 4, "watch.spike": "rollback", "watch.window": 2})
    rolled, stages = [], []
    at = _job.Job.at

    def spiking(watcher, step, metrics):
        if step == 7 and not rolled:
            rolled.append(step)
            raise metajax.training.Rollback(step, 9.0, 1.0)

    monkeypatch.setattr(metajax.training.Spikes, "_look", spiking)
    monkeypatch.setattr(_job.Job, "at", lambda job, step: stages.append(step) or at(job, step))
    train.run(config, tmp_path / "run")
    assert "back to step 4, with other episodes (rollback 1)" in capsys.readouterr().out
    assert stages == [0, 5, 4, 5, 10]


@pytest.mark.slow
def test_a_profile_is_of_one_stage(pictures, tmp_path, monkeypatch):
    traced = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: traced.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: traced.append("stop"))
    train.run(_config(pictures, _CURRICULUM), tmp_path / "run", profile="3:2")
    assert traced == ["start", "stop"]


_TWO = {"curriculum.until": (5,), "curriculum.ways": (2,)}
_MAML = {"learner": "maml", "learner.inner": "sgd", "learner.inner.learning_rate": 0.1}
_PRETRAIN = {"sampler": "batches", "learner": "pretrain"}
_EPISODES = "episodes that fit, got others until step 5: "


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({**_TWO, "curriculum.until": (5, 5)}, "must be ascending meta steps above 0 and below training.steps, 15"),
        ({**_TWO, "curriculum.until": (15,)}, r"curriculum.until must be ascending .*, got \(15,\)"),
        ({**_TWO, "curriculum.ways": (2, 2)}, "curriculum.ways must hold a number for each of the 1"),
        ({**_TWO, "curriculum.shots": (-1,)}, "curriculum.shots must be an integer of at least 0"),
        ({**_TWO, "curriculum.until": ()}, r"until must hold the steps until which .* are others, .* got \(\) and"),
        ({**_TWO, "curriculum.ways": ()}, r"until must hold the steps .* be empty where there are none, got \(5,\)"),
        ({**_TWO, "curriculum.ways": (99,)}, f"{_EPISODES}.*99"),
        (
            {**_TWO, "curriculum.ways": (4,), **_MAML},
            f"{_EPISODES}ways must be at most 3, the number",
        ),
        ({**_TWO, **_PRETRAIN}, "curriculum.until must be empty for the sampler 'batches'"),
        ({**_REPLAY, **_PRETRAIN}, "replay.capacity must be 0 for the sampler 'batches'"),
        ({**_REPLAY, "replay.count": 7}, "replay.count must be at most replay.capacity, 6, got 7"),
        ({**_REPLAY, "replay.count": 0}, "replay.count must be an integer of at least 1, got 0"),
        ({"replay.capacity": -1}, "replay.capacity must be an integer of at least 0, got -1"),
        (
            {**_REPLAY, "replay.count": 3, "mesh.fsdp": 2},
            r"training.meta_batch and replay.count must be a multiple of mesh.task \* mesh.fsdp, 8 here, got 2 and 3",
        ),
        ({**_REPLAY, **_CURRICULUM}, _EPISODES),
    ],
)
def test_refusals(pictures, tmp_path, changes, told):
    with pytest.raises(ValueError, match=told):
        train.run(_config(pictures, changes), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_job_of_a_step(pictures):
    job = _job.open_job(_config(pictures, _CURRICULUM))
    assert [job.at(step)[1] for step in (0, 4, 5, 9, 10, 14)] == [5, 5, 10, 10, 15, 15]
    assert job.at(12)[0] is job


@pytest.mark.slow
def test_the_device_draws_the_episodes_of_a_stage(pictures):
    job = _job.open_job(_config(pictures, {**_CURRICULUM, "sampler": "device"}))
    shapes = []
    for step in (0, 5, 10):
        data, sample = job.at(step)[0].sampler
        shapes.append(sample(data, jax.random.key(0)).support.inputs.shape)
    assert shapes == [(4, 4, 4, 1), (3, 6, 6, 1), (3, 8, 8, 1)]


def test_tasks_that_come_again_are_divided_like_new_ones(pictures):
    assert _job.open_job(_config(pictures, {"replay.capacity": 6, "replay.count": 3})).mesh.size == 1
    assert _job.open_job(_config(pictures, {"replay.capacity": 6, "replay.count": 4})).mesh.size == 2
