"""Checkpoints: beside the training, in their order, on full disks, of several processes, and after kills."""

import errno
import os
import shutil
import socket
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import states
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import metajax
from metajax import training
from metajax.training import _checkpoint, manifest


@pytest.fixture
def gate(monkeypatch):
    """Holds the sealing back until it is set."""
    event, write = threading.Event(), manifest.write

    def held(folder, values):
        assert event.wait(30)
        write(folder, values)

    monkeypatch.setattr(manifest, "write", held)
    yield event
    event.set()


@pytest.mark.parametrize("devices", [1, 8])
def test_a_state_may_be_donated_as_soon_as_save_returns(checkpoints, devices):
    split = NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("device",)), PartitionSpec("device"))
    big = jax.device_put(jnp.arange(2**21, dtype=jnp.float32), split)
    overwrite = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 - 1, state), donate_argnums=0)
    state = (big, jnp.full(7, 3.0))
    overwrite(jax.tree.map(jnp.copy, state))  # compiled: what follows is quick
    checkpoints.save(1, metajax.MetaState(state, (), (), jnp.array(1), jax.random.key(0)), {})
    for _ in range(5):
        state = overwrite(state)
    jax.block_until_ready(state)
    restored, _ = checkpoints.restore(metajax.MetaState(state, (), (), jnp.array(1), jax.random.key(0)))
    np.testing.assert_array_equal(restored.params[0], np.arange(2**21, dtype=np.float32))
    np.testing.assert_array_equal(restored.params[1], np.full(7, 3.0))
    assert restored.params[0].sharding.is_equivalent_to(split, 1)


def test_save_returns_before_themanifest_and_the_next_one_waits_for_it(tmp_path, checkpoints, gate):
    checkpoints.save(1, states.small(1), {})
    assert not (tmp_path / "last" / "1" / "seal.json").exists()
    second = threading.Thread(target=checkpoints.save, args=(2, states.small(2), {}))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    gate.set()
    second.join(30)
    assert (tmp_path / "last" / "1" / "seal.json").exists()
    assert checkpoints.latest() == 2


def test_the_newest_stay_and_the_best_one_until_its_successor_ismanifested(tmp_path, monkeypatch):
    checkpoints = training.Checkpoints(tmp_path, keep=3)
    for step in range(1, 6):
        checkpoints.save(step, states.small(step), {})
    checkpoints.save(2, states.small(2), {}, kind="best")
    checkpoints.wait()
    assert sorted(os.listdir(tmp_path / "last")) == ["3", "4", "5"]
    write = manifest.write

    def watched(folder, values):
        assert (tmp_path / "best" / "2" / "seal.json").exists()
        write(folder, values)
        seen.append(sorted(os.listdir(folder.parent)))

    seen = []
    monkeypatch.setattr(manifest, "write", watched)
    checkpoints.save(4, states.small(4), {}, kind="best")
    checkpoints.close()
    assert seen == [["2", "4"]]
    assert os.listdir(tmp_path / "best") == ["4"]


def test_a_sound_step_is_left_and_a_damaged_one_replaced(tmp_path, checkpoints):
    seal = tmp_path / "last" / "1" / "seal.json"
    checkpoints.save(1, states.small(1), {"first": True})
    checkpoints.wait()
    before = seal.stat().st_mtime_ns
    checkpoints.save(1, states.small(7), {"first": True})
    assert checkpoints.latest() == 1
    assert seal.stat().st_mtime_ns == before
    seal.unlink()
    again = training.Checkpoints(tmp_path)
    again.save(1, states.small(7), {"first": False})
    restored, extra = again.restore(states.small(0))
    again.close()
    assert extra == {"first": False}
    states.assert_same(restored, states.small(7))


def test_bad_arguments_are_refused(tmp_path, checkpoints):
    with pytest.raises(ValueError, match="keep must be an integer of at least 1, got 0"):
        training.Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="step must be an integer of at least 0, got -1"):
        checkpoints.save(-1, states.small(1), {})
    for call in (
        lambda: checkpoints.save(1, states.small(1), {}, kind="../other"),
        lambda: checkpoints.latest("worst"),
        lambda: checkpoints.restore(states.small(1), kind="worst"),
        lambda: _checkpoint.restore_params(tmp_path, kind="worst"),
        lambda: training.warm_start(tmp_path, {}, kind="worst"),
    ):
        with pytest.raises(ValueError, match="kind must be one of 'last', 'best', got "):
            call()
    with pytest.raises(ValueError, match=r"extra must hold JSON values, got .'array': "):
        checkpoints.save(1, states.small(1), {"array": np.ones(2)})
    twice = states.small(1)._replace(params={"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}})
    with pytest.raises(ValueError, match="state must have one leaf for each path, got two for params/a/b"):
        checkpoints.save(1, twice, {})
    assert checkpoints.latest() is None


def _fill(tmp_path):
    """States of 1 MB in a file system of 3."""
    state = lambda step: states.small(step)._replace(params={"w": jnp.full(2**18, step, jnp.float32)})  # noqa: E731
    checkpoints = training.Checkpoints(tmp_path)
    checkpoints.save(1, state(1), {"step": 1})
    checkpoints.save(2, state(2), {"step": 2})
    checkpoints.wait()
    checkpoints.save(3, state(3), {"step": 3})
    with pytest.raises(training.CheckpointError, match=r"checkpoint .*/last/3 \(\d+ bytes are free.*No space left"):
        checkpoints.wait()
    assert sorted(os.listdir(tmp_path / "last")) == ["1", "2"]
    restored, extra = checkpoints.restore(state(0))
    states.assert_same(restored, state(2))
    assert (extra, checkpoints.damaged) == ({"step": 2}, [])
    subprocess.run(["mount", "-o", "remount,size=8m", tmp_path], check=True)
    checkpoints.save(3, state(3), {})
    assert checkpoints.latest() == 3
    checkpoints.close()


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path):
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"may not mount a small file system: {done.stderr.strip()}")
    try:
        _fill(tmp_path)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def _no_space(*arguments, **keywords):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("how", ["write", "seal", "start"])
def test_what_cannot_be_written_is_told_once_and_leaves_nothing(tmp_path, checkpoints, monkeypatch, how):
    checkpoints.save(1, states.small(1), {})
    checkpoints.wait()
    place = {"write": (checkpoints._writer.handler, "finalize"), "seal": (manifest.os, "replace")}
    with monkeypatch.context() as patched:
        patched.setattr(*place.get(how, (checkpoints._writer, "save")), _no_space)
        if how != "start":  # in the background: told by the next save
            checkpoints.save(2, states.small(2), {})
        with pytest.raises(training.CheckpointError, match="No space left on device"):
            checkpoints.save(2, states.small(2), {})
    checkpoints.wait()
    restored, _ = checkpoints.restore(states.small(0))
    states.assert_same(restored, states.small(1))
    checkpoints.save(2, states.small(2), {})
    assert checkpoints.latest() == 2
    assert sorted(os.listdir(tmp_path / "last")) == ["1", "2"]


def test_close_tells_what_was_not_written(tmp_path, monkeypatch):
    checkpoints = training.Checkpoints(tmp_path)
    monkeypatch.setattr(manifest, "write", _no_space)
    checkpoints.save(1, states.small(1), {})
    with pytest.raises(training.CheckpointError, match="last/1"):
        checkpoints.close()


def test_a_loop_that_donates_saves_each_step_as_it_was(tmp_path):
    def update(state, batch):
        params = jax.tree.map(lambda leaf: leaf + 1, state.params)
        return state._replace(params=params, step=state.step + 1), {"loss": batch}

    start = states.small(0)._replace(params={"w": jnp.zeros(2**18)})
    checkpoints = training.Checkpoints(tmp_path, keep=20)
    saving = training.Saving(checkpoints, every=1, steps=12, extra=dict)
    training.fit(update, start, [jnp.ones([])] * 12, steps=12, callbacks=[saving])
    assert len(list(tmp_path.glob("last/*/seal.json"))) == 12  # the end of fit waited
    checkpoints.close()
    for step in range(12, 0, -1):
        params, found = _checkpoint.restore_params(tmp_path)
        assert found == step
        np.testing.assert_array_equal(params["w"], np.full(2**18, step, np.float32))
        shutil.rmtree(tmp_path / "last" / str(step))


def test_save_nowmanifests_before_it_returns_whatever_the_interval(tmp_path, checkpoints):
    saving = training.Saving(checkpoints, every=100, steps=1000, extra=lambda: {"position": 7})
    saving(3, states.small(3), {"loss": 1.0})
    assert not (tmp_path / "last").exists()
    saving.save_now(3, states.small(3))
    assert (tmp_path / "last" / "3" / "seal.json").exists()
    assert checkpoints.restore(states.small(0))[1] == {"position": 7}
    broken = states.small(4)._replace(params={"w": jnp.full(6, jnp.nan)})
    with pytest.raises(training.NonFiniteError, match="after step 4"):
        saving.save_now(4, broken)


@pytest.mark.parametrize("kind", ["Saving", "Validation"])
def test_callbacks_wait_when_they_close(tmp_path, checkpoints, gate, kind):
    if kind == "Saving":
        callback = training.Saving(checkpoints, every=1, steps=1, extra=dict)
    else:
        recorder = training.Recorder(tmp_path, every=1, tensorboard=False)
        score = lambda params: {"score": 1.0}  # noqa: E731
        callback = training.Validation(score, recorder, every=1, checkpoints=checkpoints, better=("score", 1))
    callback(1, states.small(1), {"loss": 1.0})
    assert not list(tmp_path.glob("*/1/seal.json"))
    threading.Timer(0.2, gate.set).start()
    callback.close()
    assert len(list(tmp_path.glob("*/1/seal.json"))) == 1


_TOGETHER = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
index, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(coordinator_address=f"localhost:{port}", num_processes=2, process_id=index)
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from metajax import MetaState, training

mesh = jax.sharding.Mesh(np.array(jax.devices()), ("task",))
split, whole = NamedSharding(mesh, PartitionSpec("task")), NamedSharding(mesh, PartitionSpec())
places = MetaState({"split": split, "whole": whole}, (), (), whole, whole)
make = jax.jit(lambda step: MetaState({"split": jnp.arange(8.0) * step, "whole": jnp.ones(3) * step}, (), (), step,
                                      jax.random.key(step)), out_shardings=places)
zero = jax.jit(lambda state: state._replace(params=jax.tree.map(jnp.zeros_like, state.params)), donate_argnums=0)
checkpoints = training.Checkpoints(folder)
for step in (1, 2, 3):
    state = make(step)
    checkpoints.save(step, state, {"step": step})
    zero(state)
    checkpoints.save(step, make(step), {}, kind="best")
assert checkpoints.latest() == 3
if index == 0:
    (checkpoints._root / "last" / "3" / "_METADATA").unlink()
restored, extra = checkpoints.restore(make(0))  # all look through the eyes of process 0
assert extra == {"step": 2} and checkpoints.damaged == ["last/3/_METADATA is missing"]
for shard in restored.params["split"].addressable_shards:
    np.testing.assert_array_equal(shard.data, np.arange(8.0)[shard.index] * 2)
checkpoints.save(3, make(3), {"step": 3})
checkpoints.close()
"""


def _free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return str(found.getsockname()[1])


@pytest.mark.slow
def test_two_processes_save_what_one_restores(tmp_path):
    port, environment = _free_port(), {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _TOGETHER, str(index), port, tmp_path],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in (0, 1)
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=90)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], told
    like = metajax.MetaState(
        {"split": jnp.zeros(8), "whole": jnp.zeros(3)}, (), (), jnp.array(0, jnp.int32), jax.random.key(0)
    )
    checkpoints = training.Checkpoints(tmp_path)
    for kind in ("last", "best"):
        restored, _ = checkpoints.restore(like, kind=kind)
        expected = {"split": jnp.arange(8.0) * 3, "whole": jnp.ones(3) * 3}
        states.assert_same(restored, metajax.MetaState(expected, (), (), jnp.array(3, jnp.int32), jax.random.key(3)))
    checkpoints.close()
    assert checkpoints.damaged == []


_KILLED = """
import os, random, signal, sys, time
import numpy as np
import jax, jax.numpy as jnp
from metajax import MetaState, training

folder, kills = sys.argv[1], int(sys.argv[2])

def made(step):
    return MetaState({"w": np.random.default_rng(step).normal(size=50_000).astype(np.float32)}, (), (),
                     np.int32(step), np.zeros(2, np.uint32))

def child(report):
    checkpoints = training.Checkpoints(folder)
    step = checkpoints.latest() or 0
    if step:
        restored, extra = checkpoints.restore(jax.tree.map(np.asarray, made(0)))
        assert extra == {"step": step}
        for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(made(step)), strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    os.write(report, f"restored {step}\\n".encode())
    while True:
        step += 1
        checkpoints.save(step, jax.tree.map(jnp.asarray, made(step)), {"step": step})
        checkpoints.wait()
        os.write(report, f"sealed {step}\\n".encode())

delays = random.Random(0)
for _ in range(kills):
    reading, writing = os.pipe()
    process = os.fork()  # before JAX has a thread: its backend starts with the first array
    if not process:
        try:
            child(writing)
        except BaseException as error:
            os.write(writing, f"failed {error!r}\\n".encode())
        os._exit(1)
    os.close(writing)
    told = b""
    while told.count(b"sealed") < 1 and b"failed" not in told:  # the delay starts when it is under way
        told += os.read(reading, 100)
    time.sleep(delays.uniform(0.0, 0.3))
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    while more := os.read(reading, 1000):
        told += more
    os.close(reading)
    print(told.decode().replace("\\n", ";"), flush=True)
"""


def test_a_run_that_is_killed_finds_the_lastmanifested_checkpoint(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, tmp_path, "6"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    lives = [line.rstrip(";").split(";") for line in done.stdout.splitlines()]
    assert len(lives) == 6
    sealed = 0
    for life in lives:
        first, *rest = life
        assert first.startswith("restored "), life
        # the next one may have been sealed, and its line not yet written, when the kill came
        assert int(first.split()[1]) in (sealed, sealed + 1)
        assert all(line.startswith("sealed ") for line in rest), life
        sealed = int(rest[-1].split()[1])
    params, step = _checkpoint.restore_params(tmp_path)
    assert step in (sealed, sealed + 1)
    np.testing.assert_array_equal(params["w"], np.random.default_rng(step).normal(size=50_000).astype(np.float32))
