"""Kills real training processes, restarts them, and compares the results with those of an uninterrupted run.

    python -m experiments.faults                                  # 20 kills and all else; some 20 minutes on 2 cores
    python -m experiments.faults --kills=3 --only=kills,elastic

A small prototypical network trains on glyphs and saves every five steps. Each row of the table is one run:

    kills      one process, SIGKILL at random moments, also while a checkpoint is written
    processes  two processes, SIGKILL to one of them in turn; the other one ends by itself
    preempted  two processes, SIGTERM to one of them; both save and end with status 75
    elastic    four devices, then two, then one, each ended by SIGTERM
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments import _runs
from metajax import run

_OUT = flags.DEFINE_string("out", "runs/faults", "Folder of faults.json.")
_KILLS = flags.DEFINE_integer("kills", 20, "How often a process is killed in the rows kills and processes.")
_ONLY = flags.DEFINE_list("only", ["kills", "processes", "preempted", "elastic"], "Rows.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_CONFIG = {
    "model.width": 8, "model.depth": 2, "episode.ways": 3, "episode.queries": 2, "train_episode.ways": 3,
    "train_episode.queries": 2, "training.meta_batch": 4, "log.every": 5, "validation.every": 50, "checkpoint.every": 5,
    "validation.episodes": 8, "evaluation.episodes": 50, "watch.heartbeat": 0.05,
}  # fmt: skip
_TIMEOUT = 600.0  # maximum seconds of one start
_CLOCK = ("seconds", "step_seconds", "tasks_per_second")  # fields of metrics.jsonl that differ between runs


class Ended(NamedTuple):
    """The end of the processes of one start.

    Attributes:
      statuses: exit status of each process; negative if it was killed by a signal.
      seconds: seconds from the signal until all processes had ended.
      told: standard error of each process.
      writing: whether a checkpoint was being written at the signal.
    """

    statuses: list[int]
    seconds: float
    told: list[str]
    writing: bool


def main() -> int:
    """Runs the rows, and prints and writes the table."""
    rows = {"kills": _kills, "processes": _processes, "preempted": _preempted, "elastic": _elastic}
    for name in _ONLY.value:
        if name not in rows:
            raise ValueError(f"only must hold {', '.join(rows)}, got {name!r}")
    if _KILLS.value < 1:
        raise ValueError(f"kills must be at least 1, got {_KILLS.value}")
    out = pathlib.Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in _ONLY.value:
            found[name] = rows[name](pathlib.Path(folder), _KILLS.value, random.Random(_SEED.value))
            told = ", ".join(f"{key} {value}" for key, value in found[name].items())
            print(f"{name:10s} {told}", flush=True)
    _runs.write_json(out / "faults.json", found)
    return 0 if all(row["same"] for row in found.values()) else 1


def start(
    workdir: pathlib.Path,
    *,
    steps: int,
    processes: int = 1,
    devices: int = 1,
    silence: int = 60,
    last: Sequence[str] = (),
) -> list[subprocess.Popen[str]]:
    """Starts or resumes a run in `processes` processes with `devices` devices each.

    After `silence` seconds without a heartbeat, a process counts as dead. `last` holds additional flags of the last
    process.
    """
    command = [sys.executable, "-m", "experiments.train", f"--workdir={workdir}", "--resume"]
    command += [f"--config.{name}={value}" for name, value in {**_CONFIG, "training.steps": steps}.items()]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = []
    if processes > 1:
        together = [f"--coordinator={address}", f"--num_processes={processes}", f"--peer_timeout={silence}"]
    return [
        subprocess.Popen(
            [
                *command, *together, *([f"--process_id={index}"] if together else []),
                *(last if index == processes - 1 else []),
            ],
            cwd=_ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for index in range(processes)
    ]  # fmt: skip


def end(started: list[subprocess.Popen[str]], workdir: pathlib.Path, sent: int = 0, to: int = 0) -> Ended:
    """Sends a signal to one of the processes, or no signal, and waits for all processes."""
    if sent:
        started[to].send_signal(sent)
    begin, writing = time.monotonic(), any(_unsealed(workdir))
    told = [process.communicate(timeout=_TIMEOUT)[1] for process in started]
    return Ended([process.returncode for process in started], time.monotonic() - begin, told, writing)


def wait_for_step(started: list[subprocess.Popen[str]], workdir: pathlib.Path, step: int) -> bool:
    """Waits until a run has reached `step` in this start. Returns False if it ended before."""
    give_up = time.monotonic() + _TIMEOUT
    while time.monotonic() < give_up:
        beat = _heartbeat(workdir)
        if beat.get("pid") == started[0].pid and beat["step"] >= step:
            return True
        if any(process.poll() is not None for process in started):
            return False
        time.sleep(0.01)
    raise TimeoutError(f"step {step} of {workdir} did not come in {_TIMEOUT:g} s")


def results(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the results of a finished run: parameter hash, accuracy, and metrics without times."""
    ended = json.loads((workdir / "results.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    metrics = [{name: value for name, value in line.items() if name not in _CLOCK} for line in lines]
    return {"params": ended["params_sha256"], "accuracy": ended["accuracy_mean"], "metrics": metrics}


def _heartbeat(workdir: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads((workdir / "heartbeat.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _unsealed(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folders of checkpoints that are being written."""
    from metajax.training import manifest

    return [path for path in (workdir / "checkpoints" / "last").glob("*") if not (path / manifest.NAME).exists()]


def _whole(workdir: pathlib.Path, **options: Any) -> dict[str, Any]:
    """Runs without interruption and returns the results."""
    ended = end(start(workdir, **options), workdir)
    if any(ended.statuses):
        raise RuntimeError(f"a run ended with {ended.statuses}: {ended.told}")
    return results(workdir)


def _interrupted(
    workdir: pathlib.Path, signals: list[tuple[int, int]], moments: random.Random, **options: Any
) -> tuple[dict[str, Any], list[Ended]]:
    """Runs with one start for each signal, which is sent to one process at a random time. Returns results and stops."""
    stops = []
    for sent, to in signals:
        started = start(workdir, **options)
        before = _heartbeat(workdir).get("step", 0)
        if wait_for_step(started, workdir, 1):
            time.sleep(moments.uniform(0, 1))
        stops.append(end(started, workdir, sent, to))
        if stops[-1].statuses[to] == 0:
            raise RuntimeError(
                f"the run of {options['steps']} steps ended before signal {len(stops)} came, from {before}"
            )
    return _whole(workdir, **options), stops


def _row(whole: dict[str, Any], broken: dict[str, Any], stops: list[Ended]) -> dict[str, Any]:
    return {
        "signals": len(stops),
        "while writing": sum(stop.writing for stop in stops),
        "statuses": " ".join(sorted({"/".join(map(str, stop.statuses)) for stop in stops})),
        "median seconds to the end": round(statistics.median(stop.seconds for stop in stops), 1),
        "longest": round(max(stop.seconds for stop in stops), 1),
        "same": whole == broken,
    }


def _kills(folder: pathlib.Path, kills: int, moments: random.Random) -> dict[str, Any]:
    options = {"steps": 100 + 100 * kills}
    signals = [(int(signal.SIGKILL), 0)] * kills
    broken, stops = _interrupted(folder / "killed", signals, moments, **options)
    return _row(_whole(folder / "kills", **options), broken, stops)


def _processes(folder: pathlib.Path, kills: int, moments: random.Random) -> dict[str, Any]:
    options = {"steps": 100 + 50 * kills, "processes": 2}
    signals = [(int(signal.SIGKILL), turn % 2) for turn in range(kills)]
    broken, stops = _interrupted(folder / "one_killed", signals, moments, **options)
    return _row(_whole(folder / "processes", **options), broken, stops)


def _preempted(folder: pathlib.Path, kills: int, moments: random.Random) -> dict[str, Any]:
    options = {"steps": 300, "processes": 2}
    broken, stops = _interrupted(folder / "preempted", [(int(signal.SIGTERM), 1)], moments, **options)
    row = _row(_whole(folder / "not_preempted", **options), broken, stops)
    return {**row, "same": row["same"] and stops[0].statuses == [os.EX_TEMPFAIL] * 2}


def _elastic(folder: pathlib.Path, kills: int, moments: random.Random) -> dict[str, Any]:
    """Compares losses and not bits, because rounding depends on the number of devices."""
    workdir, steps, stops = folder / "elastic", 60, []
    for devices, step in (4, 20), (2, 40):
        started = start(workdir, steps=steps, devices=devices)
        wait_for_step(started, workdir, step)
        stops.append(end(started, workdir, signal.SIGTERM))
    broken, whole = _whole(workdir, steps=steps, devices=1), _whole(folder / "rigid", steps=steps, devices=4)
    pairs = [
        (one["loss"], other["loss"])
        for one, other in zip(broken["metrics"], whole["metrics"], strict=True)
        if "loss" in one
    ]
    difference = max(abs(one - other) / abs(other) for one, other in pairs)
    row = _row(whole, broken, stops)
    return {**row, "largest relative difference of a loss": float(f"{difference:.2g}"), "same": difference < 1e-3}


if __name__ == "__main__":
    run.launch(main)
