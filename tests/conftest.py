"""What all tests share: the CPU with 8 simulated devices, a cache of their own, and the folder of real data."""

from __future__ import annotations

import gc
import os
import pathlib
import sys
from collections.abc import Iterator

import pytest

# Before jax is imported anywhere. The suite compiles thousands of small programs and runs each a few times, so XLA is
# told to compile fast; processes that tests start inherit it, and a flag that the user has set stays.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = {
    "xla_force_host_platform_device_count": "8",
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "true",
    "xla_cpu_use_fusion_emitters": "false",  # they take half of the time of a compilation
    "xla_cpu_parallel_codegen_split_count": "1",
}
_given = os.environ.get("XLA_FLAGS", "")
_added = [f"--{flag}={value}" for flag, value in _FLAGS.items() if flag not in _given]
os.environ["XLA_FLAGS"] = " ".join([_given, *_added]).strip()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

_ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))  # for experiments
sys.path.append(str(_ROOT / "tests"))  # for the modules that tests share

collect_ignore = ["parity/record_torch_maml.py"]  # a script that needs torch


def pytest_configure(config: pytest.Config) -> None:
    """Deprecated calls made by the package are errors, and decoded data is kept in pytest's own cache."""
    for category in ("DeprecationWarning", "FutureWarning", "PendingDeprecationWarning"):
        config.addinivalue_line("filterwarnings", f"error::{category}:metajax")
    if getattr(config.option, "dist", "no") == "load":
        config.option.dist = "loadfile"  # tests of a file share what they compiled
        config.option.loadscopereorder = False  # files with few tests are not the quick ones: the doctests end the run
    if getattr(config, "cache", None) is not None:
        os.environ.setdefault("METAJAX_CACHE", str(config.cache.mkdir("metajax")))


def pytest_collection_finish() -> None:
    """What the imports left is kept out of every garbage collection, and these come less often (5 % of all time)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of public data sets (METAJAX_DATA, or shared/data beside the repository); skips without it."""
    named = os.environ.get("METAJAX_DATA")
    folder = pathlib.Path(named) if named else _ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs a folder of data sets: set METAJAX_DATA ({folder} is not there)")
    return folder


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for one test."""
    import jax

    with jax.enable_x64(True):
        yield
