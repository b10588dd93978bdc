"""Benchmark of the Conv4 meta step and of adaptation against other libraries: `python -m experiments.benchmark speed`.

Each variant runs in its own process (`_speed_worker`). First all variants must agree in float64. Then they are timed in
turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments import _speed_job

_PEERS = ("PyTorch loop", "torch.func vmap", "higher", "torchopt")
JOBS = {
    "conv4_step": ("metajax mixed mode", "metajax unrolled", "jax by hand", *_PEERS),
    "adapt": ("metajax", "jax by hand", "PyTorch loop", "higher", "torchopt"),
}
_REFERENCE = {"conv4_step": "metajax unrolled", "adapt": "metajax"}  # reference for errors and FLOPs
_STEPS, _RATE, _CHECKED_RATE, _TOLERANCE = 5, 0.1, 0.01, 1e-6
_START = 300.0  # maximum seconds to import and compile
_PAUSE = 0.3  # seconds between calls, because PyTorch's threads spin for a while after a call
_LONG = 20.0  # seconds; variants with calls at least this long are called only once
_CALL = 0.2  # minimum seconds of a timed turn


class Failed(Exception):
    """Raised if a worker does not answer. The text is the reason."""


class Worker:
    """The process of one variant."""

    def __init__(self, folder: pathlib.Path, variant: str, job: str, inputs: pathlib.Path, dtype: str, rate: float):
        spec = {
            "variant": variant, "job": job, "inputs": str(inputs), "dtype": dtype, "steps": _STEPS, "rate": rate,
        }  # fmt: skip
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if dtype == "float64":
            environment["JAX_ENABLE_X64"] = "1"
        self._errors = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed with the worker
        self._process = subprocess.Popen(
            [sys.executable, "-m", "experiments._speed_worker", json.dumps(spec)],
            bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=environment,
            cwd=pathlib.Path(__file__).resolve().parents[1],
        )  # fmt: skip

    def ask(self, limit: float, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends a request and waits for the answer for at most `limit` seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the worker has died; the end of its output is handled below
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        if not select.select([self._process.stdout], [], [], limit)[0]:
            raise Failed(f"{do}: more than {limit:g} s")
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise Failed(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        status = self._process.wait(10)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {status}"

    def close(self) -> None:
        """Kills the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            assert pipe is not None
            pipe.close()


def run(rounds: int, tasks: int | None, limit: float) -> dict[str, Any]:
    """Checks, times and prints both jobs. If `tasks` is None, it is 16, or 32 on an accelerator."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        checks = {job: check(folder, job, _speed_job.draw(1), limit) for job in JOBS}
        told = [about for _, _, abouts in checks.values() for about in abouts.values()]
        tasks = tasks or (32 if any(about["accelerator"] for about in told) else 16)
        inputs = folder / "inputs.npz"
        _speed_job.write(inputs, _speed_job.draw(tasks))
        measured = {}
        for job, (errors, left_out, _) in checks.items():
            measured[job] = _timed(folder, job, inputs, errors, left_out, rounds, limit)
    peak = max((gflops for job in measured.values() for gflops in job.pop("matmul_gflops").values()), default=None)
    figures: dict[str, Any] = {}
    for job, found in measured.items():
        figures[job] = summary(job, found, checks[job][0], 1 if job == "adapt" else tasks, peak)
    figures |= {
        "tasks": tasks, "matmul_peak_gflops": peak,
        "least_seconds": {job: figures[job].pop("least_seconds") for job in JOBS},
        "versions": {name: version for about in told for name, version in sorted(about["versions"].items())},
        "device": ", ".join(sorted({about["device"] for about in told})),
    }  # fmt: skip
    print(report(figures))
    return figures


def check(
    folder: pathlib.Path, job: str, inputs: _speed_job.Inputs, limit: float, variants: tuple[str, ...] | None = None
) -> tuple[dict[str, float], dict[str, str], dict[str, Any]]:
    """Returns relative errors to the reference in float64 at a small rate, skipped variants with reasons, and facts."""
    path, results = folder / "checked.npz", {}
    _speed_job.write(path, inputs)
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    abouts: dict[str, Any] = {}
    for name in variants or JOBS[job]:
        out = folder / f"{job} {name}.npz"
        with contextlib.closing(Worker(folder, name, job, path, "float64", _CHECKED_RATE)) as worker:
            try:
                abouts[name] = worker.ask(_START + limit, "check", path=str(out))
            except Failed as reason:
                left_out[name] = str(reason)
                continue
        with np.load(out) as archive:
            results[name] = {key: archive[key] for key in archive.files}
    reference = results.get(_REFERENCE[job])
    if reference is None:
        raise SystemExit(f"{job}: the reference, {_REFERENCE[job]}, gave no result: {left_out[_REFERENCE[job]]}")
    for name, result in results.items():
        errors[name] = relative_error(result, reference)
        if not errors[name] <= _TOLERANCE:  # NaN too
            left_out[name] = f"disagrees: relative error {errors[name]:.1e}"
    print(f"{job}: relative error to {_REFERENCE[job]}, float64, rate {_CHECKED_RATE}")
    print("".join(f"  {name:20s} {error:.1e}\n" for name, error in errors.items()), end="", flush=True)
    return errors, left_out, abouts


def relative_error(found: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> float:
    """Returns the norm of the difference divided by the norm of the reference, over all arrays together."""
    squared = sum(float(np.sum((found[name] - value) ** 2)) for name, value in reference.items())
    return (squared / sum(float(np.sum(value**2)) for value in reference.values())) ** 0.5


def _timed(
    folder: pathlib.Path, job: str, inputs: pathlib.Path, errors: dict[str, float], left_out: dict[str, str],
    rounds: int, limit: float,
) -> dict[str, Any]:  # fmt: skip
    """Times the variants that agree, in turns. Each turn has an untimed and a timed call."""
    seconds: dict[str, list[float]] = {}
    facts: dict[str, dict[str, Any]] = {}
    gflops: dict[str, float] = {}
    left_out = dict(left_out)
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name in [name for name in errors if name not in left_out]:
            worker = workers[name] = Worker(folder, name, job, inputs, "float32", _RATE)
            stack.callback(worker.close)
            with _left_out(workers, left_out, name):
                facts[name] = worker.ask(_START, "compile")
        for turn in range(1 + rounds):  # the first turn is a warm-up, and each turn starts with an untimed call
            for name in [name for name in workers if min(seconds.get(name, [0.0])) < _LONG]:
                with _left_out(workers, left_out, name):
                    found = _turn(workers[name], limit)
                    print(f"{job}, turn {turn}, {name}: {found['seconds']:.4f} s", file=sys.stderr, flush=True)
                    if turn or found["seconds"] >= _LONG:
                        seconds.setdefault(name, []).append(found["seconds"])
                        facts[name]["peak_bytes"] = found["peak_bytes"]
        for name in list(workers):
            with _left_out({}, {}, name):  # after a failure the variant stays, without this figure
                time.sleep(_PAUSE)
                gflops[name] = workers[name].ask(_START, "matmul")["gflops"]
    medians = {name: statistics.median(times) for name, times in seconds.items() if name not in left_out}
    return {"seconds": medians, "facts": facts, "left_out": left_out, "matmul_gflops": gflops}


def _turn(worker: Worker, limit: float) -> dict[str, Any]:
    time.sleep(_PAUSE)
    first = worker.ask(limit, "call", seconds=0.0)
    return first if first["seconds"] >= _LONG else worker.ask(limit, "call", seconds=_CALL)


@contextlib.contextmanager
def _left_out(workers: dict[str, Worker], left_out: dict[str, str], name: str) -> Iterator[None]:
    """Removes a worker that fails from `workers`, closes it, and records the reason."""
    try:
        yield
    except Failed as reason:
        left_out[name] = str(reason)
        if name in workers:
            workers.pop(name).close()


def summary(
    job: str, found: dict[str, Any], errors: dict[str, float], tasks: int, peak: float | None
) -> dict[str, Any]:
    """Computes the figures of one job from the measurements. `peak` is in GFLOP/s."""
    seconds, facts = found["seconds"], found["facts"]
    fastest = min((seconds[name] for name in _PEERS if name in seconds), default=None)
    flops = facts.get(_REFERENCE[job], {}).get("flops")
    ratios = {} if fastest is None else {name: fastest / value for name, value in seconds.items()}
    of_peak = {} if not (flops and peak) else {name: flops / value / (1e9 * peak) for name, value in seconds.items()}
    return {
        "seconds": seconds,
        "ratio": ratios,
        "ratio_to_fastest_peer": max((r for name, r in ratios.items() if name.startswith("metajax")), default=None),
        "peak_memory_bytes": {name: facts[name]["peak_bytes"] for name in seconds},
        "temporary_bytes": {n: facts[n]["temporary_bytes"] for n in seconds if "temporary_bytes" in facts[n]},
        "tasks_per_second": {name: tasks / value for name, value in seconds.items()},
        "fraction_of_peak": of_peak,
        "flops": flops,
        "least_seconds": flops / (1e9 * peak) if flops and peak else None,
        "errors": errors,
        "left_out": found["left_out"],
    }


def report(figures: dict[str, Any]) -> str:
    """Formats the tables."""
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    lines = [f"device: {figures['device']}; {versions}"]
    if figures["matmul_peak_gflops"]:
        lines.append(f"matmul peak: {figures['matmul_peak_gflops']:.0f} GFLOP/s, the best of float32 2048^3")
    for job in JOBS:
        of = f"{figures['tasks']} tasks" if job == "conv4_step" else "one task"
        lines += [f"\n{job}, {of}, {_STEPS} inner steps", *_table(figures[job])]
        if figures["least_seconds"][job]:
            flops, least = figures[job]["flops"], figures["least_seconds"][job]
            lines.append(f"limit: {flops / 1e9:.1f} GFLOP over the peak take at least {least:.4f} s")
    return "\n".join(lines)


def _table(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{'variant':20s} {'seconds':>9s} {'ratio':>6s} {'peak MB':>8s} {'temp MB':>8s} {'tasks/s':>8s} {'of peak':>7s}"
    ]
    for name, seconds in sorted(found["seconds"].items(), key=lambda item: item[1]):
        cells = [
            _cell(found["ratio"].get(name), 6, ".2f"),
            _cell(found["peak_memory_bytes"][name] / 1e6, 8, ".0f"),
            _cell(found["temporary_bytes"].get(name), 8, ".0f", 1e-6),
            _cell(found["tasks_per_second"][name], 8, ".2f"),
            _cell(found["fraction_of_peak"].get(name), 7, ".2f"),
        ]
        lines.append(f"{name:20s} {seconds:9.4f} {' '.join(cells)}")
    return lines + [f"{name:20s} left out: {reason}" for name, reason in found["left_out"].items()]


def _cell(value: float | None, width: int, form: str, factor: float = 1.0) -> str:
    return f"{'-' if value is None else format(factor * value, form):>{width}s}"
