"""Devices that a run can be planned for: their peaks, and how a name such as v5p-256 counts them."""

from __future__ import annotations

import re
import statistics
import time
from typing import Any, NamedTuple

_CLOUD_TPU, _NVIDIA = "Google Cloud TPU documentation, system architecture", "NVIDIA data sheet"


class Chip(NamedTuple):
    """One device.

    Attributes:
      flops: floating-point operations a second in bfloat16, dense.
      memory: bytes.
      bandwidth: bytes a second between memory and units.
      link: bytes a second to other devices, one way, over all links of a device together.
      reached: the part of these peaks that a program is taken to reach.
      source: where the numbers are from.
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
_CORES = ("v5p",)  # whose names count cores, two in a device
_GPUS = ("a100", "h100", "h200")
_NODE, _NETWORK = 8, 50e9  # GPUs that NVLink joins; bytes a second of each one's network card (400 Gb/s) beyond


def parse(topology: str) -> tuple[str, int]:
    """The kind of device that a name such as v5p-256, h200-8 or cpu-8 stands for, and how many there are.

    Raises:
      ValueError: an unknown device, or a number that it does not come in.

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
    """The peaks of one of so many devices. Those of the CPU are measured, and shared by the devices."""
    if kind == "cpu":
        return _this_cpu(count)
    if kind in _GPUS and count > _NODE:
        alone = CHIPS[kind]
        return alone._replace(link=_NETWORK, source=f"{alone.source}; 400 Gb/s a device between machines")
    return CHIPS[kind]


def _this_cpu(count: int) -> Chip:
    """What each of so many simulated devices gets of this machine, measured now."""
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
