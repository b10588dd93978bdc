"""Small trained runs, and launchers as processes of their own."""

import json
import pathlib
import subprocess
import sys

import jax
import launchers
import numpy as np
import pytest
from PIL import Image

import metajax
from metajax import run

ROOT = pathlib.Path(__file__).resolve().parents[2]


def draw_classes(folder, names, *, images, seed=0, size=8):
    """Writes CLASS/K.png: a pattern for each class (a function of its name), dark on white, with noise."""
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).mkdir(parents=True)
        pattern = np.random.default_rng(list(name.encode())).random((size, size, 1)) < 0.5
        for number in range(images):
            ink = 200.0 * pattern + rng.normal(0, 25, (size, size, 1))
            ink[[0, -1]] = ink[:, [0, -1]] = 0  # a white border
            Image.fromarray((255 - ink).clip(0, 255).astype(np.uint8)[..., 0]).save(folder / name / f"{number}.png")
    return folder


def make_run(workdir, steps=30, **changes):
    """Trains for a few steps in this process and leaves a run folder."""
    given = {"optimizer": {"name": "adam", "learning_rate": 5e-3}, "training": {"steps": steps, "meta_batch": 4}}
    config = run.complete({**changes, **given})
    train = run.open_source(config, "train")
    facts = run.facts_of(train, metajax.data.EpisodeSpec(**config.episode.to_dict()))
    experiment = run.build(config, facts)
    outer = metajax.outer_update(
        experiment.trained, experiment.optimizer, hypergrad=experiment.hypergrad, before=False, task_batching="vmap"
    )
    batches = [
        metajax.data.episode_batch(train, experiment.train_spec, seed=0, start=4 * step, count=4)
        for step in range(steps)
    ]
    state = outer.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], batches[0]))
    state = metajax.training.fit(outer, state, batches, steps=steps)
    workdir.mkdir(parents=True)
    checkpoints = metajax.training.Checkpoints(workdir / "checkpoints")
    checkpoints.save(steps, state, {})
    checkpoints.close()
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    (workdir / "run.json").write_text(json.dumps({"data": facts.to_json()}))
    return workdir


_NAMES = [f"class{number:02d}" for number in range(40)]
_IMAGES = {"name": "image_folder", "size": 8, "channels": 1, "invert": "auto", "path": ""}
_CONV = {"name": "conv4", "width": 4, "depth": 1}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 40 classes of 12 images."""
    return draw_classes(tmp_path_factory.mktemp("pictures"), _NAMES, images=12)


def _metric(pictures):
    return {
        "data": {**_IMAGES, "path": str(pictures)},
        "model": {**_CONV, "normalisation": "batch"},
        "episode": {"ways": 4, "shots": 2, "queries": 3},
    }


@pytest.fixture(scope="session")
def metric_run(tmp_path_factory, pictures):
    """A run of a prototypical network, 4-way 2-shot."""
    return make_run(tmp_path_factory.mktemp("runs") / "metric", **_metric(pictures))


@pytest.fixture(scope="session")
def shorter_run(tmp_path_factory, pictures):
    """The first steps of the same run."""
    return make_run(tmp_path_factory.mktemp("runs") / "shorter", 3, **_metric(pictures))


@pytest.fixture(scope="session")
def head_run(tmp_path_factory, pictures):
    """A run of MAML with a head of 4 outputs and inductive predictions."""
    return make_run(
        tmp_path_factory.mktemp("runs") / "head",
        data={**_IMAGES, "path": str(pictures)},
        model={**_CONV, "normalisation": "support"},
        learner={"name": "maml", "num_steps": 3, "inner": {"name": "sgd", "learning_rate": 0.5}},
        episode={"ways": 4, "shots": 2, "queries": 3},
    )


@pytest.fixture(scope="session")
def wave_run(tmp_path_factory):
    """A run of MAML on sinusoids."""
    return make_run(
        tmp_path_factory.mktemp("runs") / "waves",
        data={"name": "sinusoids"},
        model={"name": "mlp", "hidden": (16,)},
        learner={"name": "maml", "inner": {"name": "sgd", "learning_rate": 0.01}},
        episode={"ways": 1, "shots": 5, "queries": 5},
    )


@pytest.fixture(scope="session")
def launch():
    """Runs `python -m experiments.NAME --flags`, in a fork or all of it, and gives the finished process."""

    def launched(name, *flags, forked=True):
        command = [sys.executable, "-m", f"experiments.{name}", *map(str, flags)]
        if forked:
            return launchers.run(command)
        return subprocess.run(
            command, cwd=ROOT, env=launchers.environment(), capture_output=True, text=True, timeout=120
        )

    return launched


_REFUSALS = """
import importlib, json, sys
from absl import flags
ours = sys.argv[1] in ("train", "evaluate", "adapt", "plan")
name = ("metajax.run._" if ours else "experiments.") + sys.argv[1]
launcher = importlib.import_module(name + ".__main__" * (sys.argv[1] == "vehicle"))
if ours:
    flags.FLAGS.append_flag_values(launcher.FLAGS)
told = []
for arguments in json.loads(sys.argv[2]):
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    try:
        flags.FLAGS([sys.argv[1], *arguments])
        if ours:
            launcher.FLAGS.mark_as_parsed()
        launcher.main()
        told.append("")
    except ValueError as error:
        told.append(str(error))
print(json.dumps(told))
"""


@pytest.fixture(scope="session")
def refusals():
    """Calls the launcher NAME with several lists of flags in one process, and gives the text of each ValueError."""

    def called(name, flags):
        command = [sys.executable, "-c", _REFUSALS, name, json.dumps([list(map(str, one)) for one in flags])]
        done = subprocess.run(
            command, cwd=ROOT, env=launchers.environment(), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return called


@pytest.fixture(scope="session")
def refuses(refusals):
    """Asserts of pairs `(flags, text)` that the launcher NAME refuses each list of flags with an error of that text."""

    def check(name, cases):
        told = refusals(name, [flags for flags, _ in cases])
        for text, (_, expected) in zip(told, cases, strict=True):
            assert expected in text

    return check


@pytest.fixture(scope="session")
def draw():
    """`draw_classes`, for tests that need folders of their own."""
    return draw_classes
