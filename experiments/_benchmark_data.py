"""Benchmark of the input pipeline: `python -m experiments.benchmark data`."""

from __future__ import annotations

import functools
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

_SECONDS = 3.0  # seconds of one throughput measurement
_STEPS, _PAIRS = 60, 10  # meta steps of one measurement, and number of turns of each variant
_T = 2.262  # 97.5 % quantile of Student's distribution with 9 degrees of freedom


def run(rounds: int) -> dict[str, Any]:
    """Measures throughput, startup time, memory, and training time relative to constant data."""
    figures = {"throughput": _throughput(), "start": _start(rounds), "memory": _memory(), "training": _training()}
    print(flush=True)
    return figures


def _omniglot() -> Any:
    """Returns arrays of the size of Omniglot's training set with rotations: 4112 classes of 20 images, 64 MB."""
    import metajax

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, [4112 * 20, 28, 28, 1], np.uint8)
    return metajax.data.arrays(images, np.repeat(np.arange(4112), 20))


def _throughput(batch: int = 32) -> dict[str, float]:
    """Measures episodes per second, 5-way 1-shot 15-query, in batches."""
    import metajax

    source, spec = _omniglot(), metajax.data.EpisodeSpec()
    variants: dict[str, Callable[[], Iterator[Any]]] = {
        "metajax": lambda: metajax.data.episodes(source, spec, batch=batch, seed=0),
        "NumPy, task by task": lambda: _numpy_batches(source, batch),
    }
    try:
        for workers in sorted({0, 1, os.cpu_count() or 1}):
            loader = functools.partial(_loader_batches, source, batch, workers)
            next(loader())
            variants[f"DataLoader, {workers} workers"] = loader
    except ImportError:
        print("PyTorch is not installed: pip install -e '.[bench]' brings the peer")
        variants = {name: make for name, make in variants.items() if "DataLoader" not in name}
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(5):
        for name, make in variants.items():
            stream = make()
            next(stream)  # excludes the startup time
            count, begin = 0, time.perf_counter()
            while time.perf_counter() - begin < _SECONDS:
                next(stream)
                count += batch
            rates[name].append(count / (time.perf_counter() - begin))
            getattr(stream, "close", lambda: None)()
    medians = {name: statistics.median(found) for name, found in rates.items()}
    print("episodes a second, 5-way 1-shot 15-query, 28x28, batches of 32, medians of 5 turns")
    for name, rate in medians.items():
        print(f"  {name:24s} {rate:9,.0f}   metajax / this {medians['metajax'] / rate:6.2f}")
    return medians


def _numpy_batches(source: Any, batch: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields batches of the shortest correct sampler: a loop over tasks and their classes."""
    rng, members, images = np.random.default_rng(0), source.members, source.inputs
    while True:
        rows = np.empty([batch, 5, 16], np.int64)
        for task in rows:
            for way, label in enumerate(rng.choice(len(members), 5, replace=False)):
                task[way] = rng.permutation(members[label])[:16]  # faster than choice here
        yield images[rows[:, :, :1]], images[rows[:, :, 1:]]


def _loader_batches(source: Any, batch: int, workers: int) -> Iterator[Any]:
    """Yields batches of a PyTorch DataLoader with an N-way K-shot batch sampler, as in PyTorch few-shot libraries."""
    import torch

    labels = torch.from_numpy(source.labels.astype(np.int64))
    by_class = [torch.from_numpy(rows) for rows in source.members]

    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, row: int) -> Any:
            return source.inputs[row], labels[row]

    class Tasks(torch.utils.data.Sampler):
        def __iter__(self) -> Iterator[list[int]]:
            while True:
                chosen = torch.randperm(len(by_class))[:5]
                rows = [by_class[label][torch.randperm(len(by_class[label]))[:16]] for label in chosen]
                yield torch.cat(rows).tolist()

    loader = torch.utils.data.DataLoader(Images(), batch_sampler=Tasks(), num_workers=workers)
    tasks = iter(loader)
    while True:
        yield [next(tasks) for _ in range(batch)]


def _start(rounds: int) -> dict[str, float]:
    """Measures the seconds to create a stream and take its first batch, from the beginning and from a far position."""
    import metajax

    source, seconds = metajax.data.glyphs(), {0: [], 10_000_000: []}  # type: ignore[var-annotated]
    for _ in range(rounds + 2):
        for start, found in seconds.items():
            begin = time.perf_counter()
            stream = metajax.data.episodes(source, metajax.data.EpisodeSpec(), batch=32, seed=0, start=start)
            next(stream)
            found.append(time.perf_counter() - begin)
            stream.close()
    near, far = (statistics.median(found[2:]) for found in seconds.values())
    print(
        f"first batch: {1e3 * near:.0f} ms from episode 0, {1e3 * far:.0f} ms from 10,000,000, ratio {far / near:.2f}"
    )
    return {"start_0": near, "start_10000000": far}


_STREAM = """
import json, resource, sys
from metajax import data
source = data.image_folder(sys.argv[1], splits={"train": 1.0}, cache_bytes=int(sys.argv[2]))
stream = data.episodes(source, data.EpisodeSpec(5, 1, 5), batch=4, seed=0)
next(stream)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before, most = resident(), 0
for _ in range(250):
    next(stream)
    most = max(most, resident())
print(json.dumps({"set": source.inputs.nbytes, "kept": source.inputs.kept_bytes, "grown": most - before}))
"""


def _memory() -> dict[str, int]:
    """Measures resident memory in another process that streams a folder three times as large as the cache."""
    from PIL import Image

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for label, k in itertools.product(range(20), range(100)):
            path = pathlib.Path(folder) / f"class{label}" / f"{k}.png"
            path.parent.mkdir(exist_ok=True)
            tile = Image.fromarray(rng.integers(0, 256, [8, 8, 3], np.uint8))
            tile.resize((224, 224), Image.Resampling.BICUBIC).save(path, compress_level=1)
        size = 2000 * 224 * 224 * 3
        code = [sys.executable, "-c", _STREAM, folder, str(size // 3)]
        found = json.loads(subprocess.run(code, capture_output=True, text=True, check=True).stdout)
    told = {name: f"{value / 2**20:.0f} MiB" for name, value in found.items()}
    print(f"a folder of {told['set']} decoded, {told['kept']} kept: resident memory grows by {told['grown']} at most")
    return found


def _training() -> dict[str, dict[str, float]]:
    """Times the default job with the pipeline and with the device sampler, relative to one constant batch."""
    import jax

    import metajax
    from experiments.configs import prototypical_glyphs
    from metajax import run

    job = run.open_job(run.complete(prototypical_glyphs.get_config()))
    stream, outer = job.stream(0), job.outer
    batch = next(stream)
    data, sample = metajax.data.device_sampler(job.train, job.experiment.train_spec)
    fresh = jax.jit(lambda key: outer.init(key, job.example))
    fit = metajax.training.fit
    variants: dict[str, Callable[[Any], Any]] = {
        "constant batch": lambda state: fit(outer, state, itertools.repeat(batch), steps=_STEPS),
        "pipeline": lambda state: fit(outer, state, stream, steps=_STEPS),
        "device sampler": lambda state: metajax.training.fit_on_device(
            outer, state, data, sample, batch=job.config.training.meta_batch, steps=_STEPS, chunk=20
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(_PAIRS + 1):
        for name, call in variants.items():
            state = jax.block_until_ready(fresh(jax.random.key(0)))
            begin = time.perf_counter()
            jax.block_until_ready(call(state).params)
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    figures = {}
    print(f"training, default job, {_STEPS} steps, {_PAIRS} alternated pairs: ratio to one constant batch")
    for name in ("pipeline", "device sampler"):
        logs = np.log(np.array(seconds[name]) / np.array(seconds["constant batch"]))
        wide = _T * logs.std(ddof=1) / np.sqrt(_PAIRS)
        low, mean, high = np.exp([logs.mean() - wide, logs.mean(), logs.mean() + wide])
        print(f"  {name:16s} {mean:.3f}, 95 % interval {low:.3f} to {high:.3f}")
        figures[name] = {"ratio": float(mean), "low": float(low), "high": float(high)}
    return figures
