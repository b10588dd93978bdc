"""What every launcher does before JAX starts, and how it ends."""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
import re
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

LOST_PEER = 70  # exit status where another process of the job died or hangs (EX_SOFTWARE)
# how XLA tells of a collective that has failed, in errors of several types
_OF_XLA = re.compile(r"(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN): ")
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


def join(coordinator: str | None, process_id: int | None, num_processes: int | None, *, timeout: int) -> None:
    """Makes this process one of a job; before anything else of JAX.

    Args:
      coordinator: HOST:PORT, where process 0 listens. None, as the other two: JAX finds the processes where they run on
        TPUs, under Slurm or MPI, or in GKE.
      process_id: which process this is.
      num_processes: how many there are.
      timeout: seconds of silence after which a process counts as dead, which ends the others.

    Raises:
      ValueError: an argument is out of range, or nothing tells of the other processes.
    """
    given = {"coordinator": coordinator, "process_id": process_id, "num_processes": num_processes}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise ValueError(f"coordinator, process_id and num_processes must be given together, got no {missing[0]}")
    if coordinator is not None and not re.fullmatch(r"\S+:[0-9]{1,5}", coordinator):
        raise ValueError(f"coordinator must be HOST:PORT, got {coordinator!r}")
    if num_processes is not None and (num_processes < 1 or not 0 <= (process_id or 0) < num_processes):
        raise ValueError(f"process_id must be from 0 to num_processes - 1, got {process_id} of {num_processes}")
    if timeout < 1:
        raise ValueError(f"peer_timeout must be at least 1 second, got {timeout}")
    import jax

    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, heartbeat_timeout_seconds=timeout,
            cluster_detection_method="deactivate" if coordinator else None,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"distributed found no job to join: {' '.join(str(error).split())}") from error
    except RuntimeError as error:  # another start may find the others
        print(f"error: process 0 cannot be reached: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(LOST_PEER)


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
        except Exception as error:
            jax = sys.modules.get("jax")
            if jax is not None and jax.distributed.is_initialized():
                _leave_job(error)
            if not isinstance(error, ValueError):
                raise
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


def _leave_job(error: Exception) -> NoReturn:
    """Ends this process at once: an orderly end would wait for processes that wait for this one."""
    import jax

    if _OF_XLA.search(str(error)):
        print(f"error: another process of the job died or hangs; the job ends here: {error}", file=sys.stderr)
        status = LOST_PEER
    elif isinstance(error, ValueError):
        print(f"error: {error}", file=sys.stderr)
        status = 2
    else:
        traceback.print_exception(error)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(2)  # the others leave first: JAX aborts those that find process 0 gone
    os._exit(status)


def _parse(arguments: list[str]) -> list[str]:
    """Parses flags; what is wrong with a config is told in one line, as everything else."""
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "--config" and not pathlib.Path(value.partition(":")[0]).is_file():
            print(f"error: --config must name a config file, got {value!r}", file=sys.stderr)
            sys.exit(2)
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        print(f"error: {error}; --help lists the flags", file=sys.stderr)
        sys.exit(2)
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


@functools.cache  # a program may hold several launchers
def define_config(default: pathlib.Path) -> Any:
    """Defines --config, a config file whose fields are flags; unknown ones are refused."""
    try:
        return config_flags.DEFINE_config_file("config", str(default), "What to train.", lock_config=True)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # it reads the command line already here
        _refuse(error, sys.argv)
