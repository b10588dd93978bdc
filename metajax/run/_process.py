"""Setup of a launcher process before JAX starts, and its error handling and exit."""

from __future__ import annotations

import ctypes
import functools
import importlib
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

from metajax.core import _validate
from metajax.run import _config

LOST_PEER = 70  # exit status if another process of the job died or hangs (EX_SOFTWARE)
# how XLA reports a failed collective, in errors of several types
_OF_XLA = re.compile(r"(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN): ")
# parameters of mallopt in glibc
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def prepare(*, host_devices: int | None = None) -> None:
    """Sets the options that must be set before JAX starts. Options in the environment are not changed.

    Args:
      host_devices: number of CPU devices to create. None creates one for each core.

    >>> prepare.__name__  # sets options of this process
    'prepare'
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # prints a notice; only the input pipeline uses TensorFlow
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
    """Joins this process to a job of several processes. Must be called before any other use of JAX.

    Args:
      coordinator: HOST:PORT on which process 0 listens. If this and the next two arguments are None, JAX detects the
        processes on TPUs, under Slurm or MPI, or in GKE.
      process_id: index of this process.
      num_processes: number of processes.
      timeout: seconds without a heartbeat after which a process counts as dead and the others end.

    Raises:
      ValueError: an argument is out of range, or the other processes cannot be detected.
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
    except RuntimeError as error:  # a restart may succeed
        print(f"error: process 0 cannot be reached: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(LOST_PEER)


def _cores() -> int:
    """Returns the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _keep_large_blocks() -> None:
    """Makes malloc keep large blocks. Otherwise every call of a compiled program has page faults for its temporaries.

    Each thread keeps its own arena, although these cannot hold blocks above 64 MB. With one shared arena, leftovers of
    compilation slow down the many small allocations of a convolution (a Conv4 meta step takes a quarter longer).
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # no glibc
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TOP_PAD, 64 * 2**20)


def launch(main: Callable[[], Any], own: flags.FlagValues | None = None) -> None:
    """Runs `main()` under absl. A ValueError is printed as one line on standard error, with exit status 2.

    >>> launch.__name__  # ends the process
    'launch'
    """

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
            # exit immediately: XLA may still be compiling in other threads, and stopping them crashes
            os._exit(130)

    logging.set_verbosity(logging.WARNING)
    app.run(guarded, flags_parser=functools.partial(_parse, own))


def _leave_job(error: Exception) -> NoReturn:
    """Ends this process immediately, because a regular exit would wait for processes that wait for this one."""
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
        time.sleep(2)  # the others exit first, because JAX aborts processes that lose process 0
    os._exit(status)


def _parse(own: flags.FlagValues | None, arguments: list[str]) -> list[str]:
    """Parses flags. Errors are printed as one line, like all others."""
    try:
        left = flags.FLAGS(arguments)
        if own is not None:
            own.mark_as_parsed()
            own.validate_all_flags()
        return left
    except flags.Error as error:
        print(f"error: {error}; --help lists the flags", file=sys.stderr)
        sys.exit(2)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        _refuse(error, arguments)


def _refuse(error: Exception, arguments: list[str]) -> NoReturn:
    """Prints what is wrong with a config flag and ends the process."""
    given = ", ".join(argument for argument in arguments if argument.startswith("--config"))
    while error.args and isinstance(error.args[0], Exception):  # ml_collections wraps a KeyError
        error = error.args[0]
    told = " ".join(str(error.args[0]).split())
    if isinstance(error, AttributeError | KeyError) and " " not in told:  # only the name of the missing field
        told = f"the config has no field {told}, in the section or its factory that is named"
    print(f"error: {told} (given {given})", file=sys.stderr)
    sys.exit(2)


class _LiteralOrText(flags.ArgumentParser):
    """Parses fields of several types, as a Python literal or else as a string."""

    syntactic_help = "a Python literal, or a text"

    def parse(self, argument: Any) -> Any:
        return _config.value_of(argument)


@functools.cache  # a program may hold several launchers
def define_config() -> Any:
    """Defines a flag for each field of the config file in --config, or of the default config file.

    Flags of unknown fields are errors.

    Returns:
      The flag, whose value is the config, and the path of the config file.
    """
    given = [argument.partition("=")[2] for argument in sys.argv[1:] if argument.startswith("--config=")]
    file = given[-1] if given else default_config
    try:
        if file is None:
            raise ValueError("config must be given: --config=FILE.py")
        path, _, select = str(file).partition(":")
        config_flags.register_flag_parser_for_type(object, _LiteralOrText())
        config = _config.load(path, select)
        sys.argv[:] = [argument for argument in sys.argv if not argument.startswith("--config=")]
        defined = config_flags.DEFINE_config_dict("config", config, "What to train.", lock_config=True)
        return defined, pathlib.Path(path).resolve()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        _refuse(error, sys.argv)


default_config: str | pathlib.Path | None = None  # default config file of the launcher, if it has one


def main(command: str, *, default: str | pathlib.Path | None = None) -> None:
    """Runs a launcher in this process: "train", "evaluate", "adapt" or "plan".

    Args:
      command: name of the launcher.
      default: the config file of `train` and `plan` if no flag names one.

    Raises:
      ValueError: `command` is not a launcher.

    >>> main("trian")
    Traceback (most recent call last):
    ValueError: command must be one of 'train', 'evaluate', 'adapt', 'plan', got 'trian'
    """
    global default_config
    _validate.one_of("command", command, ("train", "evaluate", "adapt", "plan"))
    default_config = default
    if command in ("train", "plan"):
        define_config()
    module = importlib.import_module(f"metajax.run._{command}")
    flags.FLAGS.append_flag_values(module.FLAGS)
    launch(module.main, module.FLAGS)
