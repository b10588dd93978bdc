"""Devices for which a run can be planned: their peak rates, and names of topologies such as v5p-256."""

from __future__ import annotations

import re
import statistics
import time
from typing import Any, NamedTuple

_CLOUD_TPU, _NVIDIA = "Google Cloud TPU documentation, system architecture", "NVIDIA data sheet"


class Chip(NamedTuple):
    """The peak rates of one device.

    Attributes:
      flops: dense bfloat16 floating-point operations per second.
      memory: bytes of memory.
      bandwidth: bytes per second between memory and compute units.
      link: bytes per second to other devices, one way, over all links of a device together.
      reached: fraction of these peaks that a program is assumed to reach.
      source: source of the numbers.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    reached: float
    source: str


CHIPS = {
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9, 0.5, _CLOUD_TPU),
    "v5e": Chip(197e12, 16e9, 819e9, 200e9, 0.5, _CLOUD_TPU),
    "v6e": Chip(918e12, 32e9, 1638e9, 400e9, 0.5, _CLOUD_TPU),
    "a100": Chip(312e12, 80e9, 2039e9, 300e9, 0.5, _NVIDIA + " (A100 80GB SXM)"),
    "h100": Chip(989e12, 80e9, 3350e9, 450e9, 0.5, _NVIDIA + " (H100 SXM)"),
    "h200": Chip(989e12, 141e9, 4800e9, 450e9, 0.5, _NVIDIA + " (H200 SXM)"),
}
_CORES = ("v5p",)  # topology names that count cores, two per device
_GPUS = ("a100", "h100", "h200")
_NODE, _NETWORK = 8, 50e9  # GPUs connected by NVLink; bytes/s of each GPU's network card (400 Gb/s) between nodes


def parse(topology: str) -> tuple[str, int]:
    """Returns the kind and the number of devices of a topology such as v5p-256, h200-8 or cpu-8.

    Raises:
      ValueError: the device is unknown, or it does not come in this number.

    >>> parse("v5p-256"), parse("h200-8")
    (('v5p', 128), ('h200', 8))
    """
    found = re.fullmatch(r"([a-z0-9]+)-([0-9]{1,5})", topology)
    kind, count = (found[1], int(found[2])) if found else ("", 0)
    if count < 1 or kind not in (*CHIPS, "cpu"):
        known = ", ".join(f"{name}-N" for name in (*CHIPS, "cpu"))
        raise ValueError(f"topology must be one of {known}, got {topology!r}")
    if kind in _CORES:
        if count % 2:
            raise ValueError(f"topology must count the cores of {kind}, two in a device, got {topology!r}")
        count //= 2
    if kind in _GPUS and count > _NODE and count % _NODE:
        raise ValueError(f"topology must be whole machines of {_NODE} devices, got {topology!r}")
    return kind, count


def chip(kind: str, count: int) -> Chip:
    """Returns the peak rates of one of `count` devices. CPU rates are measured and divided between the devices."""
    if kind == "cpu":
        return _this_cpu(count)
    if kind in _GPUS and count > _NODE:
        alone = CHIPS[kind]
        return alone._replace(link=_NETWORK, source=f"{alone.source}; 400 Gb/s a device between machines")
    return CHIPS[kind]


def _this_cpu(count: int) -> Chip:
    """Measures this machine and returns the share of each of `count` simulated devices."""
    import jax
    import numpy as np

    size = 768
    matrix = np.random.default_rng(0).standard_normal((size, size), np.float32)
    product = jax.jit(lambda x: x @ x)
    flops = 2 * size**3 / _seconds(lambda: jax.block_until_ready(product(matrix)))
    source, target = np.ones(2**24, np.float32), np.empty(2**24, np.float32)
    bandwidth = 2 * source.nbytes / _seconds(lambda: np.copyto(target, source))
    with open("/proc/meminfo", encoding="ascii") as file:
        memory = 1024 * int(file.readline().split()[1])
    part = Chip(flops, memory, bandwidth, bandwidth / 2, 0.75, "measured on this machine")
    return part._replace(**{name: getattr(part, name) / count for name in ("flops", "memory", "bandwidth", "link")})


def _seconds(call: Any) -> float:
    call()
    found = []
    for _ in range(9):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)
