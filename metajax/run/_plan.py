"""Plans a run for devices that need not be present: compiles its meta step for them and estimates its cost.

    python -m metajax.run plan --config=experiments/configs/maml_lora_decoder.py:large --topology=v5p-512
    python -m metajax.run plan --config=... --topology=h200-8 --config.mesh.fsdp=8 --config.mesh.task=1
    python -m metajax.run plan --config=... --topology=cpu-2 --measure    # and runs it, on the devices that are here

The program is compiled for as many simulated CPU devices as the topology has. Memory and communication are read from
the compiled program, operations are counted, and the time is a roofline estimate with the peaks of the device. The CPU
differs from other devices in two ways: it computes bfloat16 in float32, so it keeps float32 copies of bfloat16 arrays,
and it fuses less.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
import statistics
import time
from typing import Any, NamedTuple

from absl import flags

from metajax.run import _job, _placement, _process, _topologies

FLAGS = flags.FlagValues()  # of this launcher alone
_bool = functools.partial(flags.DEFINE_bool, flag_values=FLAGS)
_string = functools.partial(flags.DEFINE_string, flag_values=FLAGS)
_TOPOLOGY = _string("topology", None, "Devices: v5p-256 (cores), v5e-16, v6e-8, h200-8, cpu-8.", required=True)
_MEASURE = _bool("measure", False, "Also take steps, on the devices of this machine.")
_OUTPUT = _string("output", None, "File for the numbers, as JSON.")

_WEAK = (8, 64, 512, 4096)  # device counts of the weak scaling table
_STEPS = 7  # number of measured steps


class Plan(NamedTuple):
    """The cost of one step on each device.

    Attributes:
      devices: number of devices.
      mesh: sizes of the mesh axes.
      parameters: bytes of the meta-parameters that a device stores.
      optimizer: bytes of the optimizer state.
      estimator: bytes of the state of the hypergradient estimator.
      episodes: bytes of the part of a batch on the device.
      gathered: bytes of parameters stored on other devices that the device gathers during a step.
      activations: bytes of everything else during a step: activations, inner states, gradients.
      collectives: bytes that the device receives from each kind of collective.
      flops: floating-point operations.
      traffic: bytes transferred between memory and compute units.
      compile_seconds: seconds to compile the program on this machine.
    """

    devices: int
    mesh: dict[str, int]
    parameters: int
    optimizer: int
    estimator: int
    episodes: int
    gathered: int
    activations: int
    collectives: dict[str, int]
    flops: float
    traffic: float
    compile_seconds: float

    @property
    def total(self) -> int:
        """Total bytes on a device."""
        held = self.parameters + self.optimizer + self.estimator + self.episodes
        return held + self.gathered + self.activations


def main() -> int:
    """Plans the run given by the flags."""
    kind, count = _topologies.parse(_TOPOLOGY.value)
    import jax

    if not _MEASURE.value:
        jax.config.update("jax_platforms", "cpu")  # simulated devices, whatever this machine has
    _process.prepare(host_devices=count)

    if len(jax.devices()) < count:
        raise ValueError(f"topology must have at most {len(jax.devices())} devices here, got {_TOPOLOGY.value!r}")
    jax.config.update("jax_enable_compilation_cache", False)  # a cached program does not report its sizes
    chip = _topologies.chip(kind, count)
    job = _job.open_job(_process.define_config()[0].value, devices=jax.devices()[:count])
    plan, program = make(job)
    seconds = predict(plan, chip)
    _tell(job, plan, chip, seconds)
    measured = _measure(job, program) if _MEASURE.value else None
    if measured is not None:
        print(f"measured       {_time(measured)} a step; predicted / measured {sum(seconds.values()) / measured:.2f}")
    if _OUTPUT.value is not None:
        values = {**plan._asdict(), "predicted_seconds": seconds, "measured_seconds": measured}
        pathlib.Path(_OUTPUT.value).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return 0


def make(job: _job.Job) -> tuple[Plan, Any]:
    """Compiles the meta step of a job for its mesh, without creating arrays.

    Returns:
      The plan, and the compiled program.
    """
    import jax

    from metajax import parallel
    from metajax.core import _cost

    def placed(tree: Any, places: Any) -> Any:
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, places
        )

    mesh, rules = job.mesh, _placement.rules(job.config, job.mesh)
    state, frozen = job.shapes()
    state = placed(state, parallel.state_shardings(state, mesh, rules, frozen=frozen))
    base = () if frozen is None else (placed(frozen, parallel.frozen_shardings(frozen, mesh, rules)),)
    by_task = parallel.task_sharding(mesh)
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((job.tasks, *leaf.shape), leaf.dtype), job.example)
    batch = placed(batch, jax.tree.map(lambda _: by_task, batch))
    begin = time.perf_counter()
    program: Any = jax.jit(job.outer.update, donate_argnums=0).lower(state, batch, *base).compile()
    seconds = time.perf_counter() - begin
    parameters = _bytes((state.params, base))
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.params, base)))
    gathered = whole // mesh.shape["model"] - parameters if mesh.shape["fsdp"] > 1 else 0
    flops, traffic = (
        count(job.outer.update, state, batch, *base) / mesh.shape["model"] for count in (_cost.flops, _cost.traffic)
    )
    return Plan(
        mesh.size, dict(mesh.shape), parameters, _bytes(state.opt_state), _bytes(state.hypergrad_state), _bytes(batch),
        gathered, max(program.memory_analysis().temp_size_in_bytes - gathered, 0),
        parallel.collective_bytes(program.as_text()), flops, traffic, seconds,
    ), program  # fmt: skip


def _bytes(tree: Any) -> int:
    """Returns the bytes of a tree on one device."""
    import jax

    leaves = jax.tree.leaves(tree)
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)


def predict(plan: Plan, chip: _topologies.Chip, devices: int | None = None) -> dict[str, float]:
    """Predicts the seconds of a step with a roofline model, without overlap of computation and communication.

    The time of computation is the maximum over operations and memory traffic. A ring of n devices sends (n - 1) / n of
    the bytes that it gathers, and twice as much of the bytes that it reduces (Patarasuk & Yuan 2009).

    Args:
      plan: the plan for one number of devices.
      chip: the device.
      devices: another number of devices, each with the same work, or None for that of the plan.
    """
    count = devices or plan.devices
    sent = sum((2 if kind == "all-reduce" else 1) * size for kind, size in plan.collectives.items())
    return {
        "computation": max(plan.flops / chip.flops, plan.traffic / chip.bandwidth) / chip.reached,
        "communication": sent * (count - 1) / count / (chip.link * chip.reached),
    }


def _tell(job: _job.Job, plan: Plan, chip: _topologies.Chip, seconds: dict[str, float]) -> None:
    axes = ", ".join(f"{name} {size}" for name, size in plan.mesh.items())
    print(f"plan           {job.config.learner.name} on {job.train.name}, {job.tasks} tasks a step")
    print(f"devices        {plan.devices} of {_TOPOLOGY.value}: {axes}")
    print(
        f"a device       {chip.flops / 1e12:.3g} TFLOP/s, {chip.memory / 1e9:.3g} GB at {chip.bandwidth / 1e9:.4g} GB/s"
        f" and {chip.link / 1e9:.3g} GB/s to others; {100 * chip.reached:.0f} % of it reached ({chip.source})"
    )
    for name in ("parameters", "optimizer", "estimator", "episodes", "gathered", "activations", "total"):
        print(f"{name:14s} {getattr(plan, name) / 1e6:,.1f} MB")
    print(f"fits           {'yes' if plan.total < chip.memory else 'no'}, in {chip.memory / 1e9:.4g} GB")
    told = ", ".join(f"{kind} {size / 1e6:,.1f} MB" for kind, size in plan.collectives.items()) or "nothing"
    print(f"communicates   {told} a step")
    print(f"operations     {plan.flops / 1e9:,.1f} GFLOP, {plan.traffic / 1e6:,.1f} MB of memory traffic")
    parts = ", ".join(f"{name} {_time(value)}" for name, value in seconds.items())
    total = sum(seconds.values())
    print(f"predicted      {_time(total)} a step ({parts}), {job.tasks / total:,.0f} tasks/s")
    print("weak scaling   the same tasks on each device, on paper: " + ", ".join(_weak(plan, chip)))
    print(f"compiled in    {plan.compile_seconds:.1f} s")


def _weak(plan: Plan, chip: _topologies.Chip) -> list[str]:
    times = [predict(plan, chip, devices) for devices in _WEAK]
    return [
        f"{devices} devices {100 * found['computation'] / sum(found.values()):.1f} %"
        for devices, found in zip(_WEAK, times, strict=True)
    ]


def _measure(job: _job.Job, program: Any) -> float:
    """Returns the median time of a step in seconds."""
    import jax
    import numpy as np

    from metajax import parallel

    place = parallel.task_sharding(job.mesh)
    batch = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (job.tasks, *leaf.shape)), job.example)
    (state, frozen), batch = job.init(), jax.device_put(batch, place)
    base = () if frozen is None else (frozen,)
    found = []
    for _ in range(_STEPS + 1):
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(program(state, batch, *base))
        found.append(time.perf_counter() - begin)
    return statistics.median(found[1:])


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
