"""The job of the `speed` benchmark, the interface of its variants, and the file of inputs that all frameworks read."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

_DEPTH = 4


class Inputs(NamedTuple):
    """Parameters and tasks.

    Attributes:
      params: Conv4 parameters, with the names and layouts of `metajax.models.conv4`: `block_0/kernel` `[3, 3, c_in,
        c_out]`, `block_0/norm/scale`, `block_0/norm/bias`, and so on, `head/kernel` `[width, ways]`, `head/bias`.
      support: images `[tasks, ways * shots, side, side, 1]` and labels `[tasks, ways * shots]`.
      query: the same for the query sets.
    """

    params: dict[str, np.ndarray]
    support: tuple[np.ndarray, np.ndarray]
    query: tuple[np.ndarray, np.ndarray]


class Job(NamedTuple):
    """The job that a variant computes.

    Attributes:
      variant: name of the variant.
      job: "conv4_step", a meta step over all tasks, or "adapt", the adaptation to the first task.
      inputs: parameters and tasks.
      dtype: "float32" or "float64".
      steps: number of inner SGD steps.
      rate: learning rate of the inner steps.
    """

    variant: str
    job: str
    inputs: Inputs
    dtype: str
    steps: int
    rate: float


class Variant(NamedTuple):
    """The implementation of a job in a framework.

    Attributes:
      compile: compiles the job and returns the timed call (which waits for its results) with facts about it.
      checked: returns arrays by name, in the layout of the inputs, in which all variants must agree: the hypergradient
        of the mean query loss, or the change of the parameters by adaptation.
      matmul: `size -> call`, where `call(n)` multiplies two float32 matrices `n` times and waits.
      about: versions, device, and whether the device is an accelerator.
      device_memory: returns the peak bytes on an accelerator, or None without one.
    """

    compile: Callable[[], tuple[Callable[[], None], dict[str, Any]]]
    checked: Callable[[], dict[str, Any]]
    matmul: Callable[[int], Callable[[int], None]]
    about: dict[str, Any]
    device_memory: Callable[[], int | None]


def draw(tasks: int, *, width: int = 64, side: int = 28, ways: int = 5, shots: int = 1, queries: int = 15) -> Inputs:
    """Draws random images, and kernels with Glorot variance. `side` must leave one pixel after the four poolings."""
    rng = np.random.default_rng(0)

    def kernel(*shape: int) -> np.ndarray:
        fan = np.prod(shape[:-2]) * (shape[-2] + shape[-1])
        return rng.uniform(-1, 1, shape).astype(np.float32) * np.float32((6 / fan) ** 0.5)

    params = {}
    for block in range(_DEPTH):
        params[f"block_{block}/kernel"] = kernel(3, 3, width if block else 1, width)
        params[f"block_{block}/norm/scale"] = np.ones(width, np.float32)
        params[f"block_{block}/norm/bias"] = np.zeros(width, np.float32)
    params |= {"head/kernel": kernel(width, ways), "head/bias": np.zeros(ways, np.float32)}

    def examples(each: int) -> tuple[np.ndarray, np.ndarray]:
        images = rng.random((tasks, ways * each, side, side, 1), np.float32)
        return images, np.tile(np.repeat(np.arange(ways, dtype=np.int32), each), (tasks, 1))

    return Inputs(params, examples(shots), examples(queries))


def write(path: pathlib.Path, inputs: Inputs) -> None:
    """Writes the arrays to a file that `read` reads."""
    images = {f"{part}/{index}": getattr(inputs, part)[index] for part in ("support", "query") for index in (0, 1)}
    np.savez(path, **images, **{f"params/{name}": value for name, value in inputs.params.items()})  # type: ignore[arg-type]


def read(path: str, dtype: str) -> Inputs:
    """Reads the arrays and casts float32 arrays to `dtype`."""

    def cast(value: np.ndarray) -> np.ndarray:
        return value.astype(dtype) if value.dtype == np.float32 else value

    with np.load(path) as archive:
        arrays: dict[str, Any] = {name: cast(archive[name]) for name in archive.files}
    params = {name.removeprefix("params/"): value for name, value in arrays.items() if name.startswith("params/")}
    support, query = ((arrays[f"{part}/0"], arrays[f"{part}/1"]) for part in ("support", "query"))
    return Inputs(params, support, query)
