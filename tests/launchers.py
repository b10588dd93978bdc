"""Launchers as processes of their own, without the ten seconds of processor time that the imports of each would take.

A server imports the libraries once and forks for each launcher (`multiprocessing`'s forkserver: it never starts JAX).
A fork runs `experiments.NAME` as `python -m` does; the first run of `experiments/train_test.py` takes the real thing.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
# their imports start neither JAX nor a thread; launchers define flags and cannot be imported twice
_PRELOAD = ["metajax", "matplotlib.pyplot", "orbax.checkpoint", "tensorflow", "ml_collections.config_flags"]


def environment(**changes: str) -> dict[str, str]:
    """The environment of a launcher: one device, and what `conftest.py` says about fast compilation."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "host_platform_device_count" not in flag]
    return {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu", **changes}


class Forked:
    """A process of `python -m MODULE FLAGS`, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, command: Sequence[Any], *, env: Mapping[str, str] | None = None, **_: Any):
        self.args = list(map(str, command))
        python, dash, module, *flags = self.args
        assert (python, dash) == (sys.executable, "-m"), self.args
        with tempfile.NamedTemporaryFile(delete=False) as out, tempfile.NamedTemporaryFile(delete=False) as told:
            self._paths = pathlib.Path(out.name), pathlib.Path(told.name)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        arguments = (module, flags, dict(env or environment()), self._paths)
        self._process = context.Process(target=_run, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, sent: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sent)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Standard output and standard error, at the end of the process."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        texts = [path.read_text(encoding="utf-8") for path in self._paths]
        for path in self._paths:
            path.unlink()
        return texts[0], texts[1]


def run(command: Sequence[Any], *, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with captured text, in a fork."""
    process = Forked(command, **options)
    out, told = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, told)


def _run(module: str, flags: list[str], env: dict[str, str], paths: tuple[pathlib.Path, pathlib.Path]) -> None:
    """In the fork: what the interpreter does for `python -m`."""
    for number, path, name in ((1, paths[0], "stdout"), (2, paths[1], "stderr")):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), number)
        setattr(sys, name, open(number, "w", encoding="utf-8", buffering=1, closefd=False))  # noqa: SIM115 - for good
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.argv = ["", *flags]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import jax

    if "JAX_NUM_CPU_DEVICES" in env:  # which JAX read as it was imported
        jax.config.update("jax_num_cpu_devices", int(env["JAX_NUM_CPU_DEVICES"]))
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing ends without them


def small_config(pictures, changes):
    """The default config on folders of pictures of 8 pixels, with a network of one block, and what is changed of it."""
    from experiments.configs import prototypical_glyphs
    from metajax import run

    config = run.complete(
        {
            **prototypical_glyphs.get_config(),
            "data": {"name": "image_folder", "size": 8, "channels": 1, "path": str(pictures)},
            "model": {"width": 4, "depth": 1},
            "episode": {"ways": 3, "queries": 2},
            "train_episode": {},
        }
    )
    return run.changed(config, [f"{name}={value}" for name, value in changes.items()])
