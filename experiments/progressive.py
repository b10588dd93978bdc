"""Progressive training compared with a fixed schedule: the same accuracy from less compute.

    python -m experiments.progressive --out=runs/progressive

Evaluates a prototypical network on characters of scripts that were not used in training. The fixed schedule trains the
whole network for all steps. The curriculum first trains a network of half the width, whose steps cost a quarter, and
grows it for the last steps (Net2Net: function and moments are preserved). The control is the fixed schedule cut to the
compute of the curriculum. Compute is counted in the program of the meta step, with 2 operations for a multiply-add.
Seconds are processor seconds over all cores. Prints the table and draws `progressive.png`.
"""

from __future__ import annotations

import functools
import pathlib
import time
from typing import Any, NamedTuple

from absl import flags

from metajax import run

_OUT = flags.DEFINE_string("out", "runs/progressive", "Folder of the figure and the table.")
_STEPS = flags.DEFINE_integer("steps", 300, "Meta steps of the fixed schedule.")
_SEEDS = flags.DEFINE_integer("seeds", 10, "Runs of each schedule: weights and training episodes differ.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the first run.")
_WIDTH = flags.DEFINE_integer("width", 32, "Channels of the whole network.")
_DATA = flags.DEFINE_string("data", "", "Folder of Omniglot; by default the embedded characters.")
_EPISODES = flags.DEFINE_integer("episodes", 600, "Test episodes of a run, 5-way 1-shot.")
_RATE, _META_BATCH, _QUERIES, _NOISE = 2e-3, 2, 5, 0.1


class Phase(NamedTuple):
    """A phase of a schedule: steps as a fraction of the fixed schedule, ways of the episodes, fraction of the width."""

    steps: float
    ways: int
    width: float = 1.0


_CURRICULUM = (Phase(1.4, 20, 0.5), Phase(0.3, 20))


def main() -> int:
    """Trains several times with each schedule, compares and draws the results."""
    run.prepare(host_devices=1)
    import numpy as np

    import metajax
    from experiments import _runs

    out = _runs.out_folder(_OUT.value)
    _runs.require_seeds(_SEEDS.value, "steps", _STEPS.value, 10)
    if _WIDTH.value < 2 or _WIDTH.value % 2:
        raise ValueError(f"width must be an even number of at least 2, got {_WIDTH.value}")
    sources = {split: _source(split) for split in ("train", "test")}
    prices: dict[Any, float] = {}
    fixed = (Phase(1.0, 20),)
    share = sum(_compute(phase, sources["train"], prices) for phase in _CURRICULUM) / _compute(
        fixed[0], sources["train"], prices
    )
    schedules = {"fixed": fixed, "curriculum": _CURRICULUM, "fixed, cut": (Phase(share, 20),)}
    rows: dict[str, dict[str, list[float]]] = {name: {"accuracy": [], "seconds": []} for name in schedules}
    for seed in range(_SEED.value, _SEED.value + _SEEDS.value):
        for name, phases in schedules.items():  # in turns, because the load of the machine may vary
            accuracy, seconds = _run(phases, sources, seed)
            rows[name]["accuracy"].append(100 * accuracy)
            rows[name]["seconds"].append(seconds)
            print(f"seed {seed}  {name:12s}{100 * accuracy:8.2f} %{seconds:8.1f} s", flush=True)

    def told(values: Any) -> str:
        mean, ci95 = metajax.evaluation.mean_and_interval(values)
        return f"{mean:7.2f} +- {ci95:.2f}"

    print(
        f"\n5-way 1-shot test accuracy in %, {_SEEDS.value} runs of {_EPISODES.value} episodes: mean and 95 % interval"
    )
    print(f"{'schedule':14s}{'accuracy':>16s}{'over fixed':>17s}{'GFLOP':>9s}{'share':>7s}{'CPU s':>9s}")
    table = {}
    for name, phases in schedules.items():
        compute = sum(_compute(phase, sources["train"], prices) for phase in phases)
        gain = np.subtract(rows[name]["accuracy"], rows["fixed"]["accuracy"])
        seconds = float(np.median(rows[name]["seconds"]))
        part = compute / _compute(fixed[0], sources["train"], prices)
        table[name] = {**rows[name], "gflop": compute / 1e9, "share": part}
        over = "" if name == "fixed" else told(gain)
        print(f"{name:14s}{told(rows[name]['accuracy']):>16s}{over:>17s}{compute / 1e9:9.0f}{part:7.2f}{seconds:9.1f}")
    out.mkdir(parents=True, exist_ok=True)
    settings = {"steps": _STEPS.value, "seed": _SEED.value, "seeds": _SEEDS.value, "width": _WIDTH.value}
    _runs.write_json(out / "progressive.json", {**settings, "schedules": table})
    _draw(out / "progressive.png", table)
    print(f"figure: {out / 'progressive.png'}")
    return 0


def _source(split: str) -> Any:
    import metajax

    return metajax.data.omniglot(_DATA.value, split=split) if _DATA.value else metajax.data.glyphs(split)


def _steps_of(phase: Phase) -> int:
    return max(1, round(phase.steps * _STEPS.value))


def _parts(phase: Phase, rule: Any) -> tuple[Any, Any]:
    """Returns the learner and the meta step of a phase."""
    import metajax

    model = metajax.models.conv4(width=round(phase.width * _WIDTH.value), pool=False)
    learner = metajax.learners.prototypical(model)
    return learner, metajax.outer_update(learner, rule, hypergrad=metajax.hypergrad.unrolled(), before=False)


def _compute(phase: Phase, source: Any, prices: dict[Any, float]) -> float:
    """Returns the operations of all steps of a phase, counted in the program of one step."""
    import jax
    import optax

    import metajax
    from metajax.core import _cost

    kind = phase.ways, phase.width
    if kind not in prices:
        spec = metajax.data.EpisodeSpec(phase.ways, 1, _QUERIES)
        batch = metajax.data.episode_batch(source, spec, seed=0, start=0, count=_META_BATCH)
        _, outer = _parts(phase, optax.adam(_RATE))
        state = outer.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], batch))
        prices[kind] = _cost.flops(outer.update, state, batch)
    return _steps_of(phase) * prices[kind]


@functools.cache  # the runs of a schedule share their programs
def _parts_of(phases: tuple[Phase, ...]) -> list[tuple[Any, Any]]:
    import optax

    hold = sum(_steps_of(phase) for phase in phases[:-1])  # the rate decays in the last phase
    falls = optax.cosine_decay_schedule(_RATE, _steps_of(phases[-1]))
    rate = optax.join_schedules([optax.constant_schedule(_RATE), falls], [hold])
    rule = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate))
    return [_parts(phase, rule) for phase in phases]


def _run(phases: tuple[Phase, ...], sources: dict[str, Any], seed: int) -> tuple[float, float]:
    """Returns the test accuracy after training with a schedule, and the processor seconds of training on all cores."""
    import jax

    import metajax
    from metajax.models import widen
    from metajax.training import Stage, curriculum

    stages, parts = [], _parts_of(phases)
    for index, (phase, (_, outer)) in enumerate(zip(phases, parts, strict=True)):
        grows = index > 0 and phase.width > phases[index - 1].width
        width, key = round(phase.width * _WIDTH.value), jax.random.fold_in(jax.random.key(seed), index)
        grow = (lambda params, width=width, key=key: widen(params, width, noise=_NOISE, key=key)) if grows else None
        spec = metajax.data.EpisodeSpec(phase.ways, 1, _QUERIES)
        stages.append(Stage(spec, _steps_of(phase), grow=grow, outer=outer))
    example = metajax.data.episode(sources["train"], stages[0].spec, seed=seed, index=0)
    state = parts[0][1].init(jax.random.key(seed), example)
    begun = time.process_time()
    state, _ = curriculum(parts[0][1], state, sources["train"], stages, batch=_META_BATCH, seed=seed)
    jax.block_until_ready(state.params)
    seconds = time.process_time() - begun
    spec = metajax.data.EpisodeSpec(5, 1, 15)
    found = metajax.evaluation.evaluate(parts[-1][0], state.params, sources["test"], spec, episodes=_EPISODES.value)
    return found.mean, seconds


def _draw(path: pathlib.Path, table: dict[str, Any]) -> None:
    """Draws the accuracy of each run against the compute of its schedule."""
    import matplotlib.figure
    import numpy as np

    import metajax

    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for index, (name, row) in enumerate(table.items()):
        mean, ci95 = metajax.evaluation.mean_and_interval(row["accuracy"])
        axes.plot(np.full(len(row["accuracy"]), row["gflop"]), row["accuracy"], ".", color=f"C{index}", alpha=0.4)
        axes.errorbar(row["gflop"], mean, ci95, fmt="o", capsize=4, color=f"C{index}", label=name)
    axes.set(xlabel="compute of training, GFLOP", ylabel="5-way 1-shot test accuracy, %", xlim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run.launch(main)
