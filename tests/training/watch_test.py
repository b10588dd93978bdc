"""The watchers of a run: what they write, when, and what a signal from outside does."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

import metajax
from metajax import data, training
from metajax.training import _watch

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def _state(step=0):
    return metajax.MetaState(jnp.zeros([]), (), (), jnp.array(step, jnp.int32), jax.random.key(0))


def _update(state, batch):
    return state._replace(params=state.params + 1, step=state.step + 1), {"loss": state.params + jnp.mean(batch) * 0}


def _fit(steps, callbacks):
    return training.fit(_update, _state(), [jnp.zeros(1)] * steps, steps=steps, callbacks=callbacks)


def _fit_on_device(steps, chunk, callbacks):
    sampler = data.device_sampler(data.sinusoids(), data.EpisodeSpec(1, 1, 1))
    update = lambda state, episodes: _update(state, episodes.query.inputs)  # noqa: E731
    return training.fit_on_device(update, _state(), *sampler, batch=1, steps=steps, chunk=chunk, callbacks=callbacks)


@pytest.fixture
def clock(monkeypatch):
    """The clock of the watchers; it stands still until its first element is changed."""
    now = [1000.0]
    monkeypatch.setattr(_watch.time, "monotonic", lambda: now[0])
    return now


def test_a_heartbeat_is_written_at_intervals_and_in_the_end(tmp_path, clock):
    path, seen = tmp_path / "run" / "heartbeat.json", []
    heartbeat = training.Heartbeat(path, every=10.0)
    heartbeat.close()
    assert not path.exists()  # no step, no sign of life
    for step in range(1, 8):
        heartbeat(step, None, {"loss": None})  # it looks at nothing
        seen.append(json.loads(path.read_text()))
        clock[0] += 4.0
    assert [beat["step"] for beat in seen] == [1, 1, 1, 4, 4, 4, 7]
    assert [beat["steps_per_second"] for beat in seen] == [0.0] * 3 + [0.25] * 4
    last = seen[-1]
    assert (last["pid"], last["host"], last["process"]) == (os.getpid(), socket.gethostname(), 0)
    assert abs(last["time"] - time.time()) < 60
    heartbeat(8, None, {})
    assert json.loads(path.read_text())["step"] == 7
    heartbeat.close()
    assert json.loads(path.read_text())["step"] == 8
    assert [name.name for name in path.parent.iterdir()] == ["heartbeat.json"]


def test_who_reads_a_heartbeat_sees_a_whole_one_while_it_is_replaced(tmp_path):
    path = tmp_path / "heartbeat.json"
    heartbeat, over = training.Heartbeat(path, every=1e-9), threading.Event()
    heartbeat(1, None, {})

    def write():
        step = 1
        while not over.is_set():
            heartbeat(step := step + 1, None, {})

    writer = threading.Thread(target=write)
    writer.start()
    seen = [json.loads(path.read_text())["step"] for _ in range(500)]
    over.set()
    writer.join()
    assert seen == sorted(seen)
    assert seen[-1] > 1


def test_a_heartbeat_beats_in_both_loops(tmp_path):
    for name, run in (("fit", lambda call: _fit(4, [call])), ("device", lambda call: _fit_on_device(4, 2, [call]))):
        run(training.Heartbeat(tmp_path / name))
        assert json.loads((tmp_path / name).read_text())["step"] == 4


class _Device:
    def __init__(self, stats):
        self._stats = stats

    def memory_stats(self):
        return self._stats


def test_throughput_counts_steps_by_the_state(clock, monkeypatch):
    throughput = training.Throughput(8, start=100)
    clock[0] += 5.0
    assert throughput(_state(110)) == {"step_seconds": 0.5, "tasks_per_second": 16.0}
    # the steps of a chunk are seen when it is over: no new ones, no rate, and the time counts for the next ones
    clock[0] += 1.0
    assert throughput(_state(110)) == {}
    clock[0] += 1.0
    assert throughput(_state(114)) == {"step_seconds": 0.5, "tasks_per_second": 16.0}
    devices = [_Device({"bytes_in_use": 3, "peak_bytes_in_use": 9}), _Device({"bytes_in_use": 5}), _Device(None)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert throughput(_state(114)) == {"device_bytes_in_use": 5.0, "device_peak_bytes": 9.0}


@pytest.mark.parametrize("kind", ["fit", "fit_on_device"])
def test_a_recorder_that_knows_the_meta_batch_tells_the_speed(kind, tmp_path):
    begin = time.monotonic()  # before the recorder, whose clock starts when it is made
    recorder = training.Recorder(tmp_path, every=4, tensorboard=False, meta_batch=8)
    if kind == "fit":
        _fit(9, [recorder])
    else:
        _fit_on_device(9, 4, [recorder])
    passed = time.monotonic() - begin
    lines = training.read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 4, 8, 9]
    timed = [line for line in lines if "step_seconds" in line]
    # on the device, the line of step 1 is of the whole chunk; the last one is written without a state
    assert [line["step"] for line in timed] == ([1, 4, 8] if kind == "fit" else [1, 8])
    for line in timed:
        assert line["tasks_per_second"] == pytest.approx(8 / line["step_seconds"])
    steps = [1, 3, 4] if kind == "fit" else [4, 4]
    total = sum(count * line["step_seconds"] for count, line in zip(steps, timed, strict=True))
    assert 0 < total < passed
    assert not any("device_bytes_in_use" in line for line in lines)  # the CPU does not tell


def test_a_recorder_that_does_not_know_the_meta_batch_does_not_look_at_the_state(tmp_path):
    recorder = training.Recorder(tmp_path, every=1, tensorboard=False)
    recorder(1, None, {"loss": 0.5})
    recorder.close()
    assert set(training.read_metrics(tmp_path)[0]) == {"step", "seconds", "loss"}


@pytest.mark.parametrize(
    "text", ["x", "5", "5:0", "-1:2", "0:2", "5:2:1", "5:", " 5:2", "5:2\n", "\u0665:2", "", 5, None]
)
def test_a_profile_of_another_form_is_refused(text, tmp_path):
    expected = f"profile must be STEP:COUNT, two integers of at least 1 such as '10:5', got {text!r}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        training.Profile(text, tmp_path)


def _traced(folder):
    """The number of steps in the one trace in `folder`."""
    (path,) = folder.rglob("*.xplane.pb")
    assert path.is_relative_to(folder / "plugins" / "profile")
    calls = sorted(
        (event.start_ns, event.start_ns + event.duration_ns)
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes for line in plane.lines
        for event in line.events if event.name == "PjitFunction(_update)"
    )  # fmt: skip
    # a call may stand there twice, one inside of the other
    return sum(i == 0 or start >= max(end for _, end in calls[:i]) for i, (start, _) in enumerate(calls))


@pytest.mark.parametrize(
    ("text", "count"), worlds.few_by_default([("3:2", 2), ("1:3", 3), ("6:5", 2)], lambda text, count: text == "6:5")
)  # of 7; step 1 is not traced
def test_a_trace_holds_the_steps_that_were_asked_for(text, count, tmp_path):
    _fit(7, [training.Profile(text, tmp_path)])
    assert _traced(tmp_path) == count


def test_a_run_that_goes_on_behind_the_first_step_is_traced(tmp_path):
    profile = training.Profile("2:2", tmp_path)
    training.fit(_update, _state(5), [jnp.zeros(1)] * 5, steps=10, callbacks=[profile])
    assert _traced(tmp_path) == 2


def test_a_run_that_ends_before_the_first_step_leaves_no_trace(tmp_path):
    _fit(3, [training.Profile("9:2", tmp_path)])
    assert not list(tmp_path.iterdir())


def test_on_the_device_a_trace_begins_and_ends_with_a_chunk(tmp_path, monkeypatch):
    calls, steps = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(("start", steps[-1])))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop", steps[-1])))
    _fit_on_device(20, 4, [lambda step, state, metrics: steps.append(step), training.Profile("6:5", tmp_path)])
    assert calls == [("start", 8), ("stop", 16)]


def _term():
    os.kill(os.getpid(), signal.SIGTERM)


def _at(wanted, action):
    return lambda step, state, metrics: action() if step == wanted else None


@pytest.mark.parametrize(("chunk", "saved"), [(None, 3), (4, 4)])
def test_sigterm_saves_the_step_and_ends_the_run(chunk, saved):
    found, before = [], signal.getsignal(signal.SIGTERM)
    save = lambda step, state: found.append((step, int(state.step), float(state.params)))  # noqa: E731
    with training.Preemption(save) as preemption:
        callbacks = [_at(3, _term), preemption]
        with pytest.raises(training.Preempted, match=f"preempted; step {saved} is saved") as caught:
            _fit(9, callbacks) if chunk is None else _fit_on_device(9, chunk, callbacks)
    assert caught.value.step == saved
    assert found == [(saved, saved, saved)]
    assert preemption.received
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_a_signal_nothing_is_saved_and_the_handler_goes():
    mine = lambda number, frame: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, mine)
    try:
        preemption = training.Preemption(lambda step, state: pytest.fail("saved"))
        assert signal.getsignal(signal.SIGTERM) is not mine
        assert int(_fit(3, [preemption]).step) == 3
        assert signal.getsignal(signal.SIGTERM) is mine
        other = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        preemption.close()  # a second time changes nothing
        assert other is mine
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_of_the_main_thread_it_does_nothing():
    before, found = signal.getsignal(signal.SIGTERM), []

    def run():
        with training.Preemption(lambda step, state: found.append("saved")) as preemption:
            found.append(signal.getsignal(signal.SIGTERM))
            _fit(3, [preemption])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]


# what a launcher does, in a process of its own: any number of steps, 10 ms each
_JOB = """
import os, pathlib, sys, time
import jax, jax.numpy as jnp
import numpy as np
rank, count, address, folder, service = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)
if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", service == "on")
    jax.distributed.initialize(address, count, rank)
import metajax

def save(step, state):
    pathlib.Path(folder, f"saved-{rank}").write_text(f"{step} {int(state.step)} {float(state.params)}")

mesh = jax.sharding.Mesh(np.array(jax.devices()), ("task",))
split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("task"))
same = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
put = lambda value, to: jax.make_array_from_callback(np.shape(value), to, lambda place: np.asarray(value)[place])
key = jax.jit(lambda: jax.random.key(0), out_shardings=same)()
state = metajax.MetaState(put(np.float32(0), same), (), (), put(np.int32(0), same), key)

def update(state, batch):  # the mean is a collective: no process can go on alone
    state = state._replace(params=state.params + jnp.mean(batch), step=state.step + 1)
    return state, {"loss": state.params}

def batches():
    while True:
        time.sleep(0.01)
        yield put(np.ones(count, np.float32), split)

def ready(step, state, metrics):
    if step == 5:
        pathlib.Path(folder, f"ready-{rank}").touch()

try:
    preemption = metajax.training.Preemption(save)
    metajax.training.fit(update, state, batches(), steps=10**6, callbacks=[ready, preemption])
except metajax.training.Preempted as end:
    pathlib.Path(folder, f"end-{rank}").write_text(str(end))
    if count > 1:
        jax.distributed.shutdown()
    sys.exit(75)
except ValueError as error:
    print(error, flush=True)
    os._exit(2)
"""


def _start(rank, count, address, folder, service="on"):
    flags = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.Popen(
        [sys.executable, "-c", _JOB, str(rank), str(count), address, str(folder), service], cwd=_ROOT, env=flags,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def _address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def _run(count, folder, signalled):
    """The exit status of each process of a job after the signal to one of them, and what they printed."""
    address = _address()
    jobs = [_start(rank, count, address, folder) for rank in range(count)]
    try:
        deadline = time.monotonic() + 120
        while len(list(folder.glob("ready-*"))) < count and time.monotonic() < deadline:
            assert all(job.poll() is None for job in jobs), [job.communicate()[0] for job in jobs if job.poll()]
            time.sleep(0.05)
        jobs[signalled].send_signal(signal.SIGTERM)
        told = [job.communicate(timeout=60)[0] for job in jobs]
        return [job.returncode for job in jobs], told
    finally:
        for job in jobs:
            job.kill()


def test_a_process_that_gets_sigterm_saves_and_ends(tmp_path):
    status, told = _run(1, tmp_path, 0)
    assert status == [75], told
    step, *saved = map(float, (tmp_path / "saved-0").read_text().split())
    assert step >= 5
    assert saved == [step, step]
    assert (tmp_path / "end-0").read_text() == f"preempted; step {step:.0f} is saved"


@pytest.mark.parametrize("signalled", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_if_one_of_two_processes_gets_sigterm_both_save_the_same_step_and_end(signalled, tmp_path):
    status, told = _run(2, tmp_path, signalled)
    assert status == [75, 75], told
    first, second = ((tmp_path / f"saved-{rank}").read_text() for rank in range(2))
    step, *saved = map(float, first.split())
    assert first == second
    assert step >= 5
    assert saved == [step, step]


@pytest.mark.slow
def test_several_processes_without_the_service_are_refused(tmp_path):
    address = _address()
    jobs = [_start(rank, 2, address, tmp_path, "off") for rank in range(2)]
    try:
        told = [job.communicate(timeout=120)[0] for job in jobs]
        assert all("jax_enable_preemption_service must be on before" in text for text in told), told
    finally:
        for job in jobs:
            job.kill()


def test_an_interval_that_is_no_interval_is_refused(tmp_path):
    with pytest.raises(ValueError, match="every must be a finite number above 0, got 0"):
        training.Heartbeat(tmp_path / "heartbeat.json", every=0)
    with pytest.raises(ValueError, match="meta_batch must be an integer of at least 1, got 0"):
        training.Throughput(0)
    assert np.isfinite(training.Throughput(1, start=3)(_state(4))["step_seconds"])


_STALLED = """
import time
from metajax import training
with training.Stall(0.5, status=70) as stall:
    for step in range(1, 8):
        stall(step, None, {})
        time.sleep(0.1)
print("went on", flush=True)
stall = training.Stall(0.5, status=70)
stall(8, None, {})
time.sleep(60)
"""


def test_a_process_without_steps_ends_itself_and_says_so():
    done = subprocess.run([sys.executable, "-c", _STALLED], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (70, "went on\n")
    assert done.stderr == "error: nothing came after step 8 for 0.5 s; this process ends\n"
