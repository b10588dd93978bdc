"""Benchmarks for the figures in the README.

    python -m experiments.benchmark speed       # the Conv4 meta step and adaptation, beside peers (extra `bench`)
    python -m experiments.benchmark hypergrad   # memory and time of the estimators on a decoder, their bias on Conv4
    python -m experiments.benchmark streams     # memory and time where a decoder learns from a text as it reads it
    python -m experiments.benchmark base        # memory and checkpoints of adapters over a frozen base of 400 MB
    python -m experiments.benchmark adapters --model=MINILM    # memory of MAML over LoRA, seconds of fast_adapt_model
    python -m experiments.benchmark batching    # ways to batch tasks, and what "auto" would have chosen
    python -m experiments.benchmark data        # the input pipeline: episodes a second, starts, memory, training time
    python -m experiments.benchmark checkpoints # what a checkpoint every 50 steps adds to the default job
    python -m experiments.benchmark import      # seconds of `import metajax`
    python -m experiments.benchmark pixels      # nearest neighbour on the pixels of the default job's test episodes

The variants of a table take turns in one run, because machines are noisy, and medians are printed. `--json=PATH` writes
the figures to a file.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from absl import app, flags

from metajax import run

_JSON = flags.DEFINE_string("json", None, "Where to write the figures.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds; each runs every variant once.")
_TASKS = flags.DEFINE_integer("tasks", None, "Tasks in the meta step of `speed`; 16, or 32 on an accelerator.")
_MODEL = flags.DEFINE_string("model", None, "Folder of a pretrained encoder, for `adapters`.")
_LIMIT = flags.DEFINE_float("limit", 120.0, "Seconds after which a call of one variant of `speed` is given up.")


def main(arguments: list[str]) -> int:
    """Runs the benchmark named by the first argument."""
    tables = {
        "speed": _speed, "hypergrad": _hypergrad, "streams": _streams, "base": _base, "adapters": _adapters,
        "batching": _batching, "data": _data, "checkpoints": _checkpoints, "import": _import, "pixels": _pixels,
    }  # fmt: skip
    name = arguments[1] if len(arguments) > 1 else ""
    if name not in tables or len(arguments) > 2:
        raise app.UsageError(f"name one benchmark of {', '.join(tables)}, got {arguments[1:]}")
    figures = tables[name]()
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def _rounds(variants: dict[str, Callable[[], Any]], warm_up: int = 2) -> dict[str, float]:
    """Returns the median seconds of each variant. The variants take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(warm_up + _ROUNDS.value):
        for name, call in variants.items():
            begin = time.perf_counter()
            call()
            if round_ >= warm_up:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _random_episodes(tasks: int, ways: int, shots: int, queries: int, shape: tuple[int, ...]) -> Any:
    import numpy as np

    import metajax

    rng = np.random.default_rng(0)

    def examples(each: int) -> Any:
        size = ways * each
        return metajax.Examples(
            rng.random((tasks, size, *shape), np.float32), np.tile(np.repeat(np.arange(ways), each), (tasks, 1)),
            np.ones((tasks, size), bool), np.ones((tasks, ways), bool),
        )  # fmt: skip

    return metajax.Episode(examples(shots), examples(queries))


def _speed() -> dict[str, Any]:
    """Runs the benchmark of the Conv4 meta step and adaptation. JAX does not start in this process."""
    from experiments import _benchmark_speed

    return _benchmark_speed.run(_ROUNDS.value, _TASKS.value, _LIMIT.value)


def _checkpoints() -> dict[str, Any]:
    """Times 200 steps of the default job on one batch, with and without four checkpoints."""
    run.prepare()
    import itertools
    import tempfile

    import jax

    from experiments.configs import prototypical_glyphs
    from metajax import training

    job, steps = run.open_job(run.complete(prototypical_glyphs.get_config())), 200
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(job.stream(0)) as stream:
        batch, folders = next(stream), itertools.count()

        def fit(saves: bool) -> None:
            state = jax.block_until_ready(job.init()[0])
            begin = time.perf_counter()
            callbacks = []
            if saves:
                checkpoints = training.Checkpoints(f"{folder}/{next(folders)}")
                callbacks.append(training.Saving(checkpoints, every=50, steps=steps, extra=lambda: {"position": 0}))
            jax.block_until_ready(training.fit(job.outer, state, [batch] * steps, steps=steps, callbacks=callbacks))
            seconds[saves].append(time.perf_counter() - begin)

        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(1 + _ROUNDS.value):
            fit(False)
            fit(True)
    ratios = sorted(some / none for none, some in zip(seconds[False][1:], seconds[True][1:], strict=True))
    print(
        f"{steps} steps in {statistics.median(seconds[False][1:]):.2f} s; with a checkpoint every 50 steps, in pairs,"
    )
    print(f"{statistics.median(ratios):.3f} times as long in the median, from {ratios[0]:.3f} to {ratios[-1]:.3f}")
    return {"seconds": seconds[False][1:], "ratios": ratios}


def _batching() -> dict[str, Any]:
    """Compares ways to batch tasks on one device, for learners of different sizes."""
    run.prepare(host_devices=1)
    import jax
    import optax

    import metajax
    from experiments import _speed_jax

    conv = lambda outputs: metajax.models.conv4(outputs, pool=False)  # noqa: E731
    cases = {
        "MAML, MLP, sinusoids": (
            metajax.learners.maml(metajax.models.mlp(1), optax.sgd(0.01), loss=metajax.core.squared_error),
            _regression_episodes(24),
        ),
        "MAML, Conv4, 5-way": (
            metajax.learners.maml(conv(5), optax.sgd(0.4)), _random_episodes(8, 5, 1, 5, (28, 28, 1)),
        ),
        "MAML, 5 steps, Conv4 with max pool": (
            metajax.learners.maml(metajax.models.conv4(5), optax.sgd(0.4), 5),
            _random_episodes(4, 5, 1, 15, (28, 28, 1)),
        ),
        "prototypical, Conv4, 20-way": (
            metajax.learners.prototypical(conv(None)), _random_episodes(8, 20, 1, 5, (28, 28, 1)),
        ),
    }  # fmt: skip
    figures: dict[str, Any] = {}
    for case, (learner, episodes) in cases.items():
        tasks = jax.tree.leaves(episodes)[0].shape[0]
        variants = {}
        for batching in ("scan", 2, "vmap", "auto"):
            outer = metajax.outer_update(
                learner,
                optax.adam(1e-3),
                hypergrad=metajax.hypergrad.mixed_mode(),
                task_batching=batching,
                before=False,
            )
            state = outer.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], episodes))
            variants[str(batching)], _ = _speed_jax.stepper(outer, state, episodes)
        medians = _rounds(variants)
        best = min(seconds for name, seconds in medians.items() if name != "auto")
        told = "  ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in medians.items())
        print(f"{case:36s} {tasks} tasks  {told}  auto / best {medians['auto'] / best:.2f}", flush=True)
        figures[case] = {**medians, "auto_over_best": medians["auto"] / best}
    return figures


def _regression_episodes(tasks: int) -> Any:
    import metajax

    return metajax.data.episode_batch(
        metajax.data.sinusoids(), metajax.data.EpisodeSpec(1, 10, 10), seed=0, start=0, count=tasks
    )


def _hypergrad() -> dict[str, Any]:
    """Runs the benchmark of the hypergradient estimators."""
    run.prepare(host_devices=1)
    from experiments import _benchmark_hypergrad

    return _benchmark_hypergrad.run(_ROUNDS.value)


def _streams() -> dict[str, Any]:
    """Runs the benchmark of streams."""
    run.prepare()
    from experiments import _benchmark_streams

    return _benchmark_streams.streams(_ROUNDS.value)


def _base() -> dict[str, Any]:
    """Runs the benchmark of a frozen base."""
    from experiments import _benchmark_streams

    return _benchmark_streams.base()


def _adapters() -> dict[str, Any]:
    """Runs the benchmark of adapters."""
    run.prepare(host_devices=1)
    from experiments import _benchmark_adapters

    return _benchmark_adapters.run(_ROUNDS.value, _MODEL.value)


def _data() -> dict[str, Any]:
    """Runs the benchmark of the input pipeline and the device sampler."""
    run.prepare()
    from experiments import _benchmark_data

    return _benchmark_data.run(_ROUNDS.value)


def _import() -> dict[str, Any]:
    """Times `import metajax` in a new interpreter."""
    code = "import time; t = time.perf_counter(); import metajax; print(time.perf_counter() - t)"

    def once() -> float:
        return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    seconds = statistics.median(once() for _ in range(_ROUNDS.value))
    print(f"import metajax: {seconds:.2f} s (median of {_ROUNDS.value})")
    return {"seconds": seconds}


def _pixels() -> dict[str, Any]:
    """Evaluates a baseline without learning: the nearest class mean of the support images in pixel space."""
    run.prepare()
    import metajax

    pixels = metajax.Model(lambda key, inputs: (), lambda params, inputs: inputs.reshape(len(inputs), -1) / 255.0)
    learner = metajax.learners.prototypical(pixels)
    found = metajax.evaluation.evaluate(learner, (), metajax.data.glyphs("test"), metajax.data.EpisodeSpec())
    print(found)
    return {"accuracy_mean": found.mean, "accuracy_ci95": found.ci95}


if __name__ == "__main__":
    app.run(main)
