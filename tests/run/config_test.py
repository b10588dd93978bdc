"""Configs: how a file is read, what a flag changes, and what is refused in one line."""

import json

import pytest

from metajax import run
from metajax.run import _config


@pytest.fixture
def file(tmp_path):
    def write(text, name="my_config.py"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_sections_are_selected_and_bring_their_arguments(file):
    path = file("def get_config():\n    return {'training': {'steps': 7}}\n")
    config = run.load(path, "learner=maml,learner.inner=adam,hypergrad=truncated,optimizer=sgd")
    assert (config.learner.num_steps, config.learner.inner.b2, config.training.steps) == (1, 0.999, 7)
    assert config.hypergrad.k is None
    assert config.optimizer.name == "sgd"
    with pytest.raises(ValueError, match="must be FILE:SECTION=NAME"):
        run.load(path, "learner=maml,learner.num_steps=3")
    with pytest.raises(ValueError, match=r"learner\.inner is no argument of prototypical, which takes distance, loss"):
        run.load(path, "learner.inner=sgd")
    with pytest.raises(
        ValueError, match=r"config must be FILE:SECTION=NAME,\.\.\. with sections of data, .*, got 'lerner.inner=sgd'"
    ):
        run.load(path, "lerner.inner=sgd")


def test_a_section_without_a_name_changes_the_default_one():
    config = run.complete({"model": {"width": 8}, "optimizer": {"adam": {"learning_rate": {"init_value": 1.0}}}})
    assert (config.model.name, config.model.width, config.model.pool) == ("conv4", 8, False)
    assert config.optimizer.adam.learning_rate.init_value == 1.0
    assert config.optimizer.clip_by_global_norm.max_norm == 10.0


def test_a_config_survives_its_file():
    learner = {"name": "maml", "inner": {"name": "sgd"}}
    given = {"wrap": [{"name": "lora"}, {"name": "lora", "rank": 2}], "learner": learner}
    config = run.complete({**given, "model": {"name": "vit"}})
    assert config.wrap.order == ("lora", "lora_")
    again = run.complete(json.loads(json.dumps(_config.resolved(config))))
    assert _config.resolved(again) == _config.resolved(config)


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("learner.distance=cosine", "learner.distance", "cosine"),
        ("learner.scale=2", "learner.scale", 2),
        ("episode.ways=(5, 20)", "episode.ways", (5, 20)),
        ("learner=reptile", "learner.num_steps", 5),
        ("learner.name=reptile", "learner.num_steps", 5),
        ("optimizer.adam.learning_rate=0.1", "optimizer.adam.learning_rate", 0.1),
        ("optimizer.adam.learning_rate=constant_schedule", "optimizer.adam.learning_rate.name", "constant_schedule"),
        ("optimizer.clip_by_global_norm=None", "optimizer.clip_by_global_norm", None),
        ("training.trainable=head", "training.trainable", "head"),
    ],
)
def test_changed(setting, path, value):
    found = run.changed(run.complete({}), [setting])
    for name in path.split("."):
        found = found[name]
    assert found == value


@pytest.mark.parametrize("setting", ["learner.speed=2", "learner", "inner.rate=1", "training.steps.more=1"])
def test_settings_of_no_field_are_refused(setting):
    with pytest.raises(ValueError, match=r"override must be FIELD=VALUE of a field of the run's config, got"):
        run.changed(run.complete({}), [setting])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def get_config(:\n", "cannot be read: line 1: "),
        ("x = 1\n", r"must have a function get_config\(\) that returns sections"),
        ("import no_such_module\n", "cannot be read: line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config():\n    return 1 / 0\n", "failed: line 2: ZeroDivisionError: division by zero"),
        ("def get_config():\n    return 3\n", "must return sections by name, got 3"),
    ],
)
def test_a_config_file_that_is_none(file, text, told):
    with pytest.raises(ValueError, match=told) as caught:
        run.load(file(text))
    assert "\n" not in str(caught.value)


def test_variants(file):
    path = file("def get_config(size='small'):\n    return {'training': {'steps': 1 if size == 'small' else 9}}\n")
    assert run.load(path).training.steps == 1
    assert run.load(path, "large,learner=maml").training.steps == 9
    with pytest.raises(ValueError, match="has no variants, got 'large'"):
        run.load(file("def get_config():\n    return {}\n", "other.py"), "large")
