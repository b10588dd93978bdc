"""What every launcher does before JAX starts, and how it ends."""

from __future__ import annotations

import ctypes
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from absl import app, logging

# numbers of mallopt in glibc
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def prepare(*, host_devices: int | None = None) -> None:
    """Sets what has to be set before JAX starts. It never touches what the environment already says.

    Args:
      host_devices: devices to make of the CPU; None makes one for each core.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    _keep_large_blocks()
    import jax

    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", host_devices or len(os.sched_getaffinity(0)))
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def cache_folder() -> pathlib.Path:
    """Where compiled programs and decoded data are kept: METAJAX_CACHE, or `~/.cache/metajax`."""
    return pathlib.Path(os.environ.get("METAJAX_CACHE") or pathlib.Path.home() / ".cache" / "metajax")


def _keep_large_blocks() -> None:
    """Lets malloc keep large blocks: else every call of a compiled program pays page faults for its temporaries."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # no glibc
        return
    libc.mallopt(_M_ARENA_MAX, 1)  # the arenas of other threads are too small for such blocks
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TOP_PAD, 64 * 2**20)


def run(main: Callable[[], Any]) -> None:
    """Runs `main()` under absl. A ValueError becomes one line on standard error and exit status 2."""

    def guarded(arguments: list[str]) -> int:
        if len(arguments) > 1:
            raise app.UsageError(f"unknown argument {arguments[1]!r}: every option is a --flag")
        try:
            return main() or 0
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("\ninterrupted; the same command with --resume and this --workdir continues", file=sys.stderr)
            return 130

    logging.set_verbosity(logging.WARNING)
    app.run(guarded)
