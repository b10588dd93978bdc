"""What processes tell each other; `tests/experiments/faults_test.py` has jobs of several."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from metajax import parallel
from metajax.parallel import _processes


def test_one_process_tells_itself():
    assert parallel.exchange({"a": [1, None]}) == [{"a": [1, None]}]
    assert parallel.from_first(lambda: "text") == "text"
    assert parallel.agree(lambda: 7) == [7]
    with pytest.raises(ValueError, match="refused"):
        parallel.agree(_refuse)
    with pytest.raises(TypeError):
        parallel.exchange({1, 2})


def _refuse():
    raise ValueError("refused")


def _mesh_of(processes, **sizes):
    """A mesh of 8 devices, and where it puts 16 tasks if so many processes own the devices."""
    mesh = parallel.make_mesh(**sizes)
    owners = {device: index * processes // 8 for index, device in enumerate(jax.devices())}
    indices = parallel.task_sharding(mesh).devices_indices_map((16,))
    places = {_Device(owners[device]): index for device, index in indices.items()}
    return mesh, SimpleNamespace(devices_indices_map=lambda shape: places)


class _Device:
    def __init__(self, process_index):
        self.process_index = process_index


@pytest.mark.parametrize(
    ("processes", "sizes", "blocks"),
    [
        (2, {"task": 8}, [(0, 2), (1, 2)]),
        (4, {"task": 2, "fsdp": 4}, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (4, {"task": 2, "model": 4}, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # two processes hold the same tasks
        (2, {"task": 1, "model": 8}, [(0, 1), (0, 1)]),
    ],
)
def test_each_process_brings_the_tasks_of_its_devices(monkeypatch, processes, sizes, blocks):
    mesh, sharding = _mesh_of(processes, **sizes)
    monkeypatch.setattr(_processes, "task_sharding", lambda mesh: sharding)
    found = []
    for process in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found.append(parallel.process_block(mesh, 16))
    assert found == blocks


def test_tasks_that_devices_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="the number of tasks must be a multiple of 8 groups of devices, got 12"):
        parallel.process_block(parallel.make_mesh(), 12)


def test_what_is_spread_comes_to_the_host_whole():
    mesh = parallel.make_mesh(task=1, fsdp=8)
    whole = np.arange(16.0).reshape(8, 2)
    spread = jax.device_put(whole, NamedSharding(mesh, PartitionSpec("fsdp")))
    found = parallel.to_host({"w": spread, "b": 3})
    assert type(found["w"]) is np.ndarray
    np.testing.assert_array_equal(found["w"], whole)
