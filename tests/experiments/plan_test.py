"""`experiments.plan`: what it tells of a small step, checked by hand, and the names of topologies."""

import json

import jax
import pytest

from experiments.configs import maml_lora_decoder, maml_sinusoids
from metajax import run
from metajax.run import _job, _topologies
from metajax.run import _plan as plan


def _decoder_job(**mesh):
    config = run.complete(maml_lora_decoder.get_config())
    config.data.update(vocab=32, length=8)
    config.model.update(vocab=32, width=16, depth=1, heads=2, dtype="bfloat16")
    config.wrap.lora.rank = 2
    config.learner.num_steps = 1
    config.mesh.update(**mesh)
    config.mesh.rules = (("embed|head", ("fsdp",)),)
    config.training.update(meta_batch=8, trainable="lora")
    return _job.open_job(config)


def test_a_divided_base_is_gathered_once_and_the_adapters_alone_are_reduced():
    found, _ = plan.make(_decoder_job(task=2, fsdp=4))
    whole, divided, adapters = 2 * (4 * 16 * 16 + 3 * 16 * 64 + 3 * 16), 2 * 2 * 32 * 16, 4 * 2 * 2 * 2 * 16
    assert found.devices == 8
    assert found.parameters == whole + divided // 4 + adapters
    assert found.gathered == divided - divided // 4
    assert found.optimizer in range(2 * adapters, 2 * adapters + 17)  # two moments and counters
    assert found.collectives["all-gather"] == divided
    assert adapters < found.collectives["all-reduce"] < adapters + 100
    assert set(found.collectives) == {"all-gather", "all-reduce"}


@pytest.mark.slow
def test_more_devices_with_as_many_tasks_each_communicate_as_much():
    found = []
    for devices in (2, 8):
        config = run.complete(maml_sinusoids.get_config())
        config.training.meta_batch = 2 * devices
        found.append(plan.make(_job.open_job(config, devices=jax.devices()[:devices]))[0])
    assert found[0].collectives == found[1].collectives
    assert found[0].flops == pytest.approx(found[1].flops, rel=1e-6)
    assert found[0].total == found[1].total


def test_the_roofline_is_the_slower_of_operations_and_memory_and_then_the_links():
    chip = _topologies.Chip(flops=100.0, memory=1e3, bandwidth=10.0, link=5.0, reached=0.5, source="made up")
    one = plan.Plan(4, {}, 0, 0, 0, 0, 0, 0, {"all-reduce": 10, "all-gather": 20}, 1000.0, 50.0, 0.0)
    assert plan.predict(one, chip) == {"computation": 20.0, "communication": pytest.approx(40 * 3 / 4 / 2.5)}
    assert plan.predict(one._replace(traffic=500.0), chip)["computation"] == 100.0
    assert plan.predict(one, chip, devices=1)["communication"] == 0


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [("v5p-256", "v5p", 128), ("v5e-16", "v5e", 16), ("h200-8", "h200", 8), ("cpu-8", "cpu", 8)],
)
def test_names_of_topologies(name, kind, count):
    assert _topologies.parse(name) == (kind, count)


@pytest.mark.parametrize("name", ["v9-8", "v5p-7", "v5p", "h200-0", "h100-12", "v5p-256-2", ""])
def test_topologies_that_are_none_are_refused(name):
    with pytest.raises(ValueError, match="topology must"):
        _topologies.parse(name)


def test_machines_of_several_gpus_are_joined_by_a_network():
    assert _topologies.chip("h100", 16).link < _topologies.chip("h100", 8).link


def test_the_command_plans_for_devices_that_are_not_here(launch, tmp_path):
    small = ["--config.model.width=4", "--config.model.depth=1", "--config.train_episode.ways=3"]
    more = ("--config.training.meta_batch=16", f"--output={tmp_path / 'plan'}")
    done = launch("plan", "--topology=v5p-32", *small, *more)
    assert done.returncode == 0, done.stderr
    assert "devices        16 of v5p-32: task 16, fsdp 1, model 1" in done.stdout
    assert "fits           yes, in 95 GB" in done.stdout
    assert json.loads((tmp_path / "plan").read_text())["collectives"].keys() == {"all-reduce"}
