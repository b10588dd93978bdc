"""What every launcher does before JAX starts, and how it ends."""

from __future__ import annotations

import ctypes
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, logging
from ml_collections import config_flags

# numbers of mallopt in glibc
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def prepare(*, host_devices: int | None = None) -> None:
    """Sets what has to be set before JAX starts. It never touches what the environment already says.

    Args:
      host_devices: devices to make of the CPU; None makes one for each core.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # announces itself, and only the input pipeline uses TensorFlow
    _keep_large_blocks()
    import jax

    from metajax.data import cache_folder

    flags, folder = os.environ.get("XLA_FLAGS", ""), cache_folder()
    if "JAX_NUM_CPU_DEVICES" not in os.environ and "xla_force_host_platform_device_count" not in flags:
        jax.config.update("jax_num_cpu_devices", host_devices or _cores())
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _keep_large_blocks() -> None:
    """Lets malloc keep large blocks: else every call of a compiled program pays page faults for its temporaries.

    Threads keep arenas of their own, though these take no block above 64 MB: in one arena for all, what compilation
    leaves behind makes the many small allocations of a convolution slow (a Conv4 meta step takes a quarter longer).
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # no glibc
        return
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
            sys.stdout.flush()
            sys.stderr.flush()
            # at once: XLA may still be compiling in other threads, and tearing them down crashes
            os._exit(130)

    logging.set_verbosity(logging.WARNING)
    app.run(guarded, flags_parser=_parse)


def _parse(arguments: list[str]) -> list[str]:
    """Parses flags; what is wrong with a config is told in one line, as everything else."""
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "--config" and not pathlib.Path(value.partition(":")[0]).is_file():
            print(f"error: --config must name a config file, got {value!r}", file=sys.stderr)
            sys.exit(2)
    try:
        return app.parse_flags_with_usage(arguments)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        _refuse(error, arguments)


def _refuse(error: Exception, arguments: list[str]) -> NoReturn:
    given = ", ".join(argument for argument in arguments if argument.startswith("--config."))
    while error.args and isinstance(error.args[0], Exception):  # ml_collections wraps a KeyError
        error = error.args[0]
    told = " ".join(str(error.args[0]).split())
    if isinstance(error, AttributeError | KeyError) and " " not in told:  # the bare name of what is not there
        told = f"the config has no field {told}; experiments/configs/_base.py lists them"
    print(f"error: {told} (given {given})", file=sys.stderr)
    sys.exit(2)


def define_config(default: pathlib.Path) -> Any:
    """Defines --config, a config file whose fields are flags; unknown ones are refused."""
    try:
        return config_flags.DEFINE_config_file("config", str(default), "What to train.", lock_config=True)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # it reads the command line already here
        _refuse(error, sys.argv)
