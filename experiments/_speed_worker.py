"""Runs one variant of the `speed` benchmark in its own process.

    python -m experiments._speed_worker '{"variant": "higher", "job": "adapt", "inputs": PATH.npz, ...}'

Requests and answers are lines of JSON on standard input and output. Between requests the process blocks. Each framework
therefore has its own threads, allocator and peak memory.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from experiments import _speed_job

_MATMUL = 2048
_MODULES = {
    "metajax": "_speed_jax", "metajax mixed mode": "_speed_jax", "metajax unrolled": "_speed_jax",
    "jax by hand": "_speed_jax", "PyTorch loop": "_torch_peers", "torch.func vmap": "_torch_peers",
    "higher": "_torch_peers", "torchopt": "_torch_peers",
}  # fmt: skip


class _Server:
    """Handles requests, with one method for each."""

    def __init__(self, variant: _speed_job.Variant):
        self.variant = variant
        self.timed: Callable[[], None] = lambda: None

    def compile(self) -> dict[str, Any]:
        self.timed, facts = self.variant.compile()
        return {**facts, **self.variant.about}

    def call(self, seconds: float) -> dict[str, Any]:
        """Returns the median time of calls until `seconds` are spent: one call of a slow job, several of a fast one."""
        taken = [_seconds(self.timed)]
        while sum(taken) < seconds:
            taken.append(_seconds(self.timed))
        peak = self.variant.device_memory()
        return {"seconds": statistics.median(taken), "peak_bytes": _resident() if peak is None else peak}

    def check(self, path: str) -> dict[str, Any]:
        import numpy as np

        np.savez(path, **self.variant.checked())
        return self.variant.about

    def matmul(self, size: int = _MATMUL, times: int = 5) -> dict[str, Any]:
        product = self.variant.matmul(size)
        product(times)
        best = min(_seconds(lambda: product(times)) for _ in range(5))
        return {"gflops": 2e-9 * times * size**3 / best}


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _resident() -> int:
    """Returns the peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _answers() -> TextIO:
    """Returns standard output for answers only, and redirects other output of libraries to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def main(arguments: list[str]) -> None:
    """Answers requests until standard input ends."""
    answers, spec = _answers(), json.loads(arguments[1])
    job = _speed_job.Job(**{**spec, "inputs": _speed_job.read(spec["inputs"], spec["dtype"])})
    module = importlib.import_module(f"experiments.{_MODULES[job.variant]}")
    server = _Server(module.variant(job))
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(server, request.pop("do"))(**request)), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv)
