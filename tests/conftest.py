"""What all tests share: the CPU with 8 simulated devices, a cache of their own, and the folder of real data."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Iterator

import pytest

# Before jax is imported anywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
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
    if getattr(config, "cache", None) is not None:
        os.environ.setdefault("METAJAX_CACHE", str(config.cache.mkdir("metajax")))


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
