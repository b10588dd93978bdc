"""`experiments.train` as a process: it trains, resumes bit by bit, and refuses what it must without writing."""

import fcntl
import functools
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import launchers
import numpy as np
import pytest
import worlds

import metajax
from metajax.run import _job
from metajax.run import _train as train

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_DEFAULT = "--config=experiments/configs/prototypical_glyphs.py"
_SMALL = [
    f"{_DEFAULT}:data=image_folder", "--config.model.width=4", "--config.model.depth=1", "--config.data.size=8",
    "--config.data.channels=1", "--config.episode.ways=3", "--config.episode.queries=2",
    "--config.training.meta_batch=2",
    "--config.train_episode.ways=3", "--config.train_episode.queries=2", "--config.log.every=5",
    "--config.validation.every=20", "--config.validation.episodes=4", "--config.evaluation.episodes=20",
    "--config.checkpoint.every=10",
]  # fmt: skip


def _flags(pictures, workdir, *more, steps=40):
    own = (f"--config.data.path={pictures}", f"--workdir={workdir}", f"--config.training.steps={steps}")
    return [*_SMALL, *own, *more]


def _results(workdir):
    return json.loads((workdir / "results.json").read_text())


@pytest.fixture(scope="module")
def whole_run(launch, pictures, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("train") / "whole"
    done = launch("train", *_flags(pictures, workdir), forked=False)
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_a_run_leaves_everything_about_itself(whole_run):
    workdir, done = whole_run
    results = _results(workdir)
    assert set(results) == {
        "learner", "ways", "shots", "queries", "episodes", "metric", "accuracy_mean", "accuracy_ci95", "transductive",
        "normalisation", "seed", "train_seconds", "steps", "params_sha256",
    }  # fmt: skip
    assert done.stdout.splitlines()[-1].startswith(f"accuracy {100 * results['accuracy_mean']:.2f} +- ")
    assert done.stdout.splitlines()[-1].endswith("% (20 episodes)")
    assert json.loads((workdir / "config.json").read_text())["episode"]["ways"] == 3
    assert {"git_commit", "seed", "versions"} <= set(json.loads((workdir / "run.json").read_text()))
    lines = metajax.training.read_metrics(workdir)
    assert [line["step"] for line in lines if "loss" in line] == [1, *range(5, 41, 5)]
    assert [line["step"] for line in lines if "validation_accuracy" in line] == [20, 40]
    assert (workdir / "report.png").read_bytes()[1:4] == b"PNG"
    assert any((workdir / "tensorboard").iterdir())
    learner, params = metajax.load_run(workdir)
    assert metajax.training.params_sha256(params) == results["params_sha256"]
    assert learner.problem is None
    metajax.load_run(workdir, checkpoint="best")


_CONTRAST = (
    f"{_DEFAULT}:data=image_folder,learner=contrastive,hypergrad=unrolled", "--config.sampler=batches",
    "--config.learner.momentum=0.99", "--config.learner.queue=12", "--config.learner.dim=4",
    "--config.learner.hidden=8", "--config.model.normalisation=layer", "--config.training.meta_batch=6",
)  # fmt: skip


@pytest.mark.slow
def test_a_run_begins_with_the_backbone_that_contrast_has_made(launch, pictures, tmp_path):
    before, after = tmp_path / "moco", tmp_path / "maml"
    done = launch("train", *_flags(pictures, before, *_CONTRAST, steps=10))
    assert done.returncode == 0, done.stderr
    _, params = metajax.load_run(before)
    assert sorted(params) == ["backbone", "head", "momentum", "queue"]
    assert _results(before)["accuracy_mean"] > 0.4, "the nearest class mean in its features, 3-way"
    assert {"loss", "accuracy", "grad_norm"} <= set(metajax.training.read_metrics(before)[0])
    begins = (
        f"{_DEFAULT}:data=image_folder,learner=maml,learner.inner=sgd,optimizer=sgd",
        "--config.optimizer.learning_rate=0",
        "--config.learner.inner.learning_rate=0.4", "--config.model.normalisation=layer", f"--config.init={before}",
    )  # fmt: skip
    done = launch("train", *_flags(pictures, after, *begins, steps=2))
    assert done.returncode == 0, done.stderr
    told = f"begins with 3 arrays of {before} (step 10); new: head/bias, head/kernel"
    assert told in done.stdout.splitlines()
    _, begun = metajax.load_run(after)
    close = functools.partial(np.testing.assert_allclose, atol=1e-9)
    jax.tree.map(close, begun["block_0"], params["backbone"]["block_0"])
    assert begun["head"]["bias"].shape == (3,)


@pytest.mark.slow
def test_a_run_that_keeps_an_average_is_judged_by_it_and_trains_as_without(launch, pictures, tmp_path):
    found = {}
    for average in (0.0, 0.9):
        workdir = tmp_path / f"average_{average}"
        done = launch("train", *_flags(pictures, workdir, f"--config.training.average={average}", steps=10))
        assert done.returncode == 0, done.stderr
        _, params = metajax.load_run(workdir)
        assert metajax.training.params_sha256(params) == _results(workdir)["params_sha256"]
        found[average] = params, [line["loss"] for line in metajax.training.read_metrics(workdir) if "loss" in line]
    assert found[0.0][1] == found[0.9][1]
    averaged = metajax.training.warm_start(workdir / "checkpoints", found[0.0][0])  # `params` of the state
    jax.tree.map(np.testing.assert_array_equal, averaged, found[0.0][0])
    moved = jax.tree.map(lambda one, other: np.abs(one - other).max(), *(params for params, _ in found.values()))
    assert max(jax.tree.leaves(moved)) > 1e-4
    done = launch("train", *_flags(pictures, tmp_path / "refused", "--config.training.average=1.0"))
    assert (done.returncode, "training.average must be a number of at least 0 and below 1, got 1.0" in done.stderr) == (
        2,
        True,
    )


@pytest.mark.slow
def test_a_run_that_goes_on_does_not_begin_again(launch, pictures, tmp_path):
    """What it began with may be gone by then."""
    before, after = tmp_path / "moco", tmp_path / "proto"
    assert launch("train", *_flags(pictures, before, *_CONTRAST, steps=10)).returncode == 0
    begins = (f"--config.init={before}", "--config.model.normalisation=layer")
    _, told = _stopped(after, pictures, signal.SIGTERM, *begins)
    assert "continues" in told
    shutil.rmtree(before)
    done = launch("train", *_flags(pictures, after, *begins, "--resume"))
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stdout
    assert "begins with" not in done.stdout


def _stopped(workdir, pictures, sent, *more, step=15, **options):
    """Starts a run, sends it a signal when it has taken so many steps, and gives the process and what it told."""
    command = [sys.executable, "-m", "experiments.train", *_flags(pictures, workdir, "--resume", *more, **options)]
    process = launchers.Forked(command)
    give_up = time.monotonic() + 100
    while time.monotonic() < give_up and process.poll() is None:
        if any(line["step"] >= step for line in metajax.training.read_metrics(workdir)):
            break
        time.sleep(0.02)
    process.send_signal(sent)
    return process, process.communicate(timeout=100)[1]


@pytest.fixture(scope="module")
def killed_run(pictures, tmp_path_factory):
    """A run that was killed, when the checkpoint of step 10 at least was whole; tests copy it."""
    workdir = tmp_path_factory.mktemp("train") / "killed"
    _stopped(workdir, pictures, signal.SIGKILL, step=25)
    return workdir


def _copy(workdir, to):
    shutil.copytree(workdir, to)
    return to


def test_a_killed_run_resumes_to_the_same_parameters(whole_run, killed_run, launch, pictures, tmp_path):
    workdir = _copy(killed_run, tmp_path / "killed")
    done = launch("train", *_flags(pictures, workdir, "--resume"))
    assert done.returncode == 0, done.stderr
    assert _results(workdir)["params_sha256"] == _results(whole_run[0])["params_sha256"]
    steps = [line["step"] for line in metajax.training.read_metrics(workdir) if "loss" in line]
    assert steps == sorted(set(steps))


def test_a_preempted_run_saves_ends_with_its_own_status_and_resumes_to_the_same_parameters(
    whole_run, launch, pictures, tmp_path
):
    process, told = _stopped(tmp_path / "run", pictures, signal.SIGTERM)
    assert process.returncode == 75
    assert "preempted; step" in told
    assert "--resume" in told
    assert _latest(tmp_path / "run") >= 15  # no multiple of checkpoint.every
    done = launch("train", *_flags(pictures, tmp_path / "run", "--resume"))
    assert done.returncode == 0, done.stderr
    assert _results(tmp_path / "run")["params_sha256"] == _results(whole_run[0])["params_sha256"]


def test_a_profile_that_is_none_is_refused_before_anything_is_written(pictures, tmp_path):
    with pytest.raises(ValueError, match="profile must be STEP:COUNT"):
        train.run(launchers.small_config(pictures, {}), tmp_path / "run", profile="5")
    assert not (tmp_path / "run").exists()


def _latest(workdir):
    return metajax.training.Checkpoints(workdir / "checkpoints").latest()


@pytest.mark.parametrize("stored", ["as it is", "another", "none"])
def test_a_resumed_stream_starts_at_the_position_of_the_checkpoint(killed_run, tmp_path, monkeypatch, stored):
    workdir = _copy(killed_run, tmp_path / "killed")
    restore = metajax.training.Checkpoints.restore
    step = _latest(workdir)
    expected = {"as it is": 2 * step, "another": 7, "none": 2 * step}[stored]

    def changed(checkpoints, like):
        state, extra = restore(checkpoints, like)
        assert extra["position"] == 2 * step  # tasks
        if stored == "none":  # older checkpoints have none
            del extra["position"]
        else:
            extra["position"] = expected
        return state, extra

    monkeypatch.setattr(metajax.training.Checkpoints, "restore", changed)
    starts = []

    def watched(job, start):
        starts.append(start)
        raise InterruptedError("seen enough")

    monkeypatch.setattr(_job.Job, "stream", watched)
    config = metajax.run.load_config(workdir)
    with pytest.raises(InterruptedError, match="seen enough"):
        train.run(config, workdir, resume=True)
    assert starts == [expected]


@pytest.mark.parametrize(
    "sampler", worlds.few_by_default(["pipeline", "device"], lambda sampler: sampler == "pipeline")
)
def test_a_spike_rolls_the_run_back_to_the_last_checkpoint_and_to_other_episodes(
    pictures, tmp_path, monkeypatch, capsys, sampler
):
    config = launchers.small_config(
        pictures, {"training.steps": 12, "checkpoint.every": 5, "validation.every": 12, "log.every": 4}
    )
    config.update_from_flattened_dict({"watch.spike": "rollback", "watch.window": 2, "sampler": sampler})
    config.update_from_flattened_dict({"evaluation.episodes": 4, "validation.episodes": 4})
    rolled = []

    def spiking(watcher, step, metrics):
        if step == 8 and len(rolled) < 2:
            rolled.append(float(metrics["loss"]))
            raise metajax.training.Rollback(step, 9.0, 1.0)
        if step == 6:
            seen.append(float(metrics["loss"]))

    seen = []
    monkeypatch.setattr(metajax.training.Spikes, "_look", spiking)
    train.run(config, tmp_path / "run")
    assert capsys.readouterr().out.count("back to step 5, with other episodes (rollback") == 2
    assert len(set(seen)) == len(seen) == 3  # step 6 was taken three times, each time on other episodes
    assert [line["step"] for line in metajax.training.read_metrics(tmp_path / "run") if "loss" in line] == [1, 4, 8, 12]

    rolled.clear()
    config.watch.rollbacks = 1
    with pytest.raises(metajax.training.LossSpike, match="the loss of step 8"):
        train.run(config, tmp_path / "given_up")


_ON_DEVICE = "--config.sampler=device"
_WITHOUT_TENSORFLOW = """
import runpy, sys
sys.modules["tensorflow"] = None
runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def device_run(pictures, tmp_path_factory):
    """A run whose episodes are drawn on the device, where TensorFlow is not installed."""
    workdir = tmp_path_factory.mktemp("train") / "device"
    command = [sys.executable, "-c", _WITHOUT_TENSORFLOW, *_flags(pictures, workdir, _ON_DEVICE, steps=300)]
    done = subprocess.run(command, cwd=_ROOT, env=launchers.environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_a_run_on_the_device_needs_no_tensorflow(device_run):
    workdir, done = device_run
    assert "TensorFlow is not installed: " in done.stdout.splitlines()[1]
    assert not (workdir / "tensorboard").exists()
    lines = metajax.training.read_metrics(workdir)
    assert [line["step"] for line in lines if "loss" in line] == [1, *range(5, 301, 5)]
    assert [line["step"] for line in lines if "validation_accuracy" in line] == list(range(20, 301, 20))
    assert _results(workdir)["steps"] == 300


def test_the_pipeline_without_tensorflow_says_what_to_do(pictures, tmp_path):
    command = [sys.executable, "-c", _WITHOUT_TENSORFLOW, *_flags(pictures, tmp_path / "run", steps=2)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "error: sampler must be 'device' here, got 'pipeline': episodes() and batches() need" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_interrupted_run_on_the_device_resumes_to_the_same_parameters(device_run, launch, pictures, tmp_path):
    workdir = tmp_path / "interrupted"
    process, told = _stopped(workdir, pictures, signal.SIGINT, _ON_DEVICE, steps=300)
    assert process.returncode == 130, told
    assert "--resume" in told
    step = _latest(workdir)
    assert step < 300
    done = launch("train", *_flags(pictures, workdir, _ON_DEVICE, "--resume", steps=300))
    assert done.returncode == 0, done.stderr
    assert f"resuming at step {step}" in done.stdout
    assert _results(workdir)["params_sha256"] == _results(device_run[0])["params_sha256"]
    steps = [line["step"] for line in metajax.training.read_metrics(workdir) if "loss" in line]
    assert steps == [1, *range(5, 301, 5)]
    assert any((workdir / "tensorboard").iterdir())


def test_a_finished_run_is_left_as_it_is(whole_run, launch, pictures):
    workdir, _ = whole_run
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    done = launch("train", *_flags(pictures, workdir, "--resume"))
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(launch, pictures, tmp_path):
    workdir = tmp_path / "wild"
    wild = ["--config.optimizer.adam.learning_rate.init_value=1e30", "--config.model.normalisation=none"]
    done = launch("train", *_flags(pictures, workdir, *wild, "--config.checkpoint.every=1"))
    assert done.returncode == 2
    assert "at step " in done.stderr or "after step " in done.stderr
    assert not (workdir / "results.json").exists()
    _, params = metajax.load_run(workdir)
    metajax.training._loop.require_finite_params(1, metajax.MetaState(params, (), (), 1, None))


_MAML = {"learner": "maml", "learner.inner": "sgd", "learner.inner.learning_rate": 0.4}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"episode.ways": 99}, "ways is 99"),
        ({"episode.queries": 50}, r"shots \+ queries is 1 \+ 50"),
        ({"episode.ways": 0}, "ways must be an integer of at least 1.*, got 0"),
        ({"episode.shots": -1}, "shots must be an integer of at least 1.*, got -1"),
        ({"train_episode.ways": -3}, "ways must be an integer of at least 1.*, got -3"),
        ({**_MAML, "learner.num_steps": 0}, "learner.num_steps must be an integer of at least 1, got 0"),
        ({"learner": "maml"}, "learner.inner must be given for maml"),
        ({"learner.scale": "wide"}, "learner.scale must be a number, or None, got 'wide'"),
        ({"training.steps": -5}, "training.steps must be an integer of at least 1, got -5"),
        ({"training.meta_batch": 0}, "training.meta_batch must be an integer of at least 1, got 0"),
        ({"log.every": 0}, "log.every must be an integer of at least 1, got 0"),
        ({"evaluation.episodes": 1}, "evaluation.episodes must be an integer of at least 2, got 1"),
        ({"learner.name": "maleml"}, "learner.name must be one of"),
        ({"hypergrad.name": "exact"}, "hypergrad.name must be one of"),
        ({"hypergrad.name": "displacement"}, "displacement.. needs a learner with an inner problem"),
        ({**_MAML, "learner.adapts": "tail"}, "adapts must pick at least one leaf, got 'tail'"),
        ({"model.depth": 5, "model.pool": True}, "inputs must be at least 32 pixels high and wide"),
        ({"model.normalisation": "weight"}, "normalisation must be one of"),
        ({"data.path": "no/such/folder"}, "no/such/folder"),
        ({"data.path": None}, "data.path must be given for image_folder"),
        ({"init": "no/such/run"}, "there is no checkpoint in"),
        ({"learner": "contrastive", "learner.momentum": 0.9}, "model must not normalise by statistics of the batch"),
        ({"learner": "contrastive", "learner.queue": -1}, "learner.queue must be an integer of"),
        ({"sampler": "host"}, "sampler must be one of 'pipeline', 'device', 'batches', got 'host'"),
        ({"sampler": "device", "episode.ways": 99}, "ways is 99"),
        ({"mesh.task": 3}, "mesh must divide the 8 devices into its axes, got task=3, fsdp=1, model=1"),
        (
            {"mesh.fsdp": 2, "training.meta_batch": 3},
            r"training.meta_batch must be a multiple of mesh.task \* mesh.fsdp, 8",
        ),
        ({"mesh.fsdp": 2, "sampler": "batches", "learner": "pretrain"}, "the tasks in a step of batches must be"),
        ({"mesh.model": 2, "training.meta_batch": 4}, "mesh.rules must divide something over 'model', which has 2"),
        ({"mesh.rules": ("kernel",)}, "mesh.rules must be pairs such as"),
        ({"mesh.fsdp": 8, "training.meta_batch": 8, "mesh.rules": (("tail", ("fsdp",)),)}, "rules must each match"),
        ({"watch.nonfinite": "skp"}, "watch.nonfinite must be one of 'stop', 'skip', got 'skp'"),
        ({"watch.spike": "jump"}, "watch.spike must be one of 'off', 'count', 'stop', 'rollback', got 'jump'"),
        ({"watch.spike": "count", "watch.window": 1}, "window must be an integer of at least 2, got 1"),
        ({"watch.rollbacks": -1}, "watch.rollbacks must be an integer of at least 0, got -1"),
        ({"watch.stall": -1.0}, "watch.stall must be"),
        ({"training.task_batching": "all"}, "task_batching must be one of"),
        ({"model": "decoder"}, "model.vocab must be given for decoder"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(pictures, tmp_path, changes, told):
    with pytest.raises(ValueError, match=told):
        train.run(launchers.small_config(pictures, changes), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_folder_that_holds_something_else_is_refused(pictures, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="workdir must be a new or empty folder"):
        train.run(launchers.small_config(pictures, {}), tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_another_run_and_a_changed_config_are_refused(whole_run):
    workdir, _ = whole_run
    config = metajax.run.load_config(workdir)
    with pytest.raises(ValueError, match="holds a run"):
        train.run(config, workdir)
    config.learner.scale = 0.7
    with pytest.raises(ValueError, match=r"config.learner.scale was None, is 0.7"):
        train.run(config, workdir, resume=True)


def test_a_run_goes_on_with_another_mesh_and_not_with_another_version(killed_run, launch, pictures, tmp_path):
    workdir = _copy(killed_run, tmp_path / "moved")
    done = launch("train", *_flags(pictures, workdir, "--resume", "--config.watch.spike=stop"))
    assert done.returncode == 2
    assert "config.watch.spike was 'off', is 'stop'" in done.stderr
    done = launch("train", *_flags(pictures, workdir, "--resume", "--config.mesh.task=2"))
    assert done.returncode == 0, done.stderr
    stored = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps({**stored, "config_version": 0}))
    with pytest.raises(ValueError, match=f"config_version of the run in {str(workdir)!r} must be 1, got 0"):
        metajax.load_run(workdir)


def test_an_unknown_config_key_is_refused(launch, tmp_path):
    done = launch("train", f"--workdir={tmp_path / 'none'}", "--config.learner.scales=3")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "--config.learner.scales=3" in line
    assert not (tmp_path / "none").exists()


def test_a_missing_config_file_is_named(launch):
    done = launch("train", "--config=no/such/config.py")
    assert done.returncode == 2
    told = "config must be a Python file, got 'no/such/config.py' (given --config=no/such/config.py)"
    assert done.stderr == f"error: {told}\n"


def test_a_folder_that_another_process_writes_into_is_refused(whole_run, launch, pictures, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(whole_run[0], copy)
    (copy / "results.json").unlink()
    with open(copy / ".lock", "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = launch("train", *_flags(pictures, copy, "--resume"))
    assert done.returncode == 2
    assert f"workdir {str(copy)!r} is in use by another process" in done.stderr


@pytest.mark.slow
def test_an_interrupt_while_the_first_step_compiles(pictures, tmp_path):
    workdir = tmp_path / "early"
    command = [sys.executable, "-m", "experiments.train", *_flags(pictures, workdir)]
    environment = launchers.environment(JAX_ENABLE_COMPILATION_CACHE="0")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it, with heirs
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    give_up = time.monotonic() + 100
    while time.monotonic() < give_up and not (workdir / "run.json").exists():
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=100)[1]
    assert process.returncode == 130, told
    assert "--resume" in told
