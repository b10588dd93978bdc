"""The figures of adapters: `python -m experiments.benchmark adapters`."""

from __future__ import annotations

import statistics
import time
from typing import Any

_MINILM: dict[str, Any] = {
    "vocab": 30522,
    "width": 384,
    "depth": 6,
    "heads": 12,
    "hidden": 1536,
    "positions": 512,
    "types": 2,
}
_TASKS, _STEPS, _LENGTH, _WAYS, _RANK = 8, 5, 64, 5, 8
_WORDS = 12  # of a text that `fast_adapt_model` reads


def run(rounds: int, model: str | None) -> dict[str, Any]:
    """Memory of MAML over adapters of an encoder of MiniLM's sizes; seconds to adapt the encoder in folder `model`."""
    figures = {"memory": _memory(min(rounds, 3))}
    if model is None:
        print("fast_adapt_model: left out, --model names no folder of weights")
        return figures
    return {**figures, "fast_adapt": _fast_adapt(rounds, model)}


def _memory(rounds: int) -> dict[str, Any]:
    """Bytes as the compiler counts them, and seconds of a step where blocks are recomputed in two ways."""
    import jax
    import numpy as np
    import optax

    import metajax

    rng = np.random.default_rng(0)

    def examples() -> Any:
        shape = (_TASKS, _WAYS)
        texts = {
            "tokens": rng.integers(1, _MINILM["vocab"], (*shape, _LENGTH), np.int32),
            "mask": np.ones((*shape, _LENGTH), bool),
        }
        targets = np.broadcast_to(np.arange(_WAYS, dtype=np.int32), shape)
        return metajax.Examples(texts, targets, np.ones(shape, bool), np.ones(shape, bool))

    batch = metajax.Episode(examples(), examples())
    figures: dict[str, Any] = {}
    print(f"{_TASKS} tasks of {_WAYS} support and {_WAYS} query texts of {_LENGTH} tokens, {_STEPS} inner steps over ")
    print(f"rank-{_RANK} LoRA and a head, tasks under vmap, blocks of the encoder recomputed (remat)")
    programs, seconds = {}, {}
    variants: list[tuple[str, Any]] = [("unrolled", True), ("mixed_mode", True), ("mixed_mode", "example")]
    for name, remat in variants:
        model = metajax.adapters.lora(metajax.models.encoder(outputs=_WAYS, remat=remat, **_MINILM), rank=_RANK)
        learner = metajax.learners.maml(model, optax.sgd(0.01), _STEPS, adapts="lora|head")
        outer = metajax.outer_update(
            learner, optax.adam(1e-3), hypergrad=getattr(metajax.hypergrad, name)(), trainable="lora|head",
            task_batching="vmap",
        )  # fmt: skip
        state = outer.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], batch))
        program = jax.jit(outer.update).lower(state, batch).compile()
        found: Any = program.memory_analysis()
        weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params))
        title = f"{name}, remat={remat!r}"
        figures[title] = {
            "temporaries": found.temp_size_in_bytes, "arguments": found.argument_size_in_bytes, "weights": weights
        }  # fmt: skip
        ratio = next(iter(figures.values()))["temporaries"] / found.temp_size_in_bytes
        print(
            f"  {title:28s} temporaries {found.temp_size_in_bytes / 1e6:7.0f} MB, 1/{ratio:.1f}; arguments "
            f"{found.argument_size_in_bytes / 1e6:.0f} MB, of which the weights {weights / 1e6:.0f} MB"
        )
        if name == "mixed_mode":
            programs[title], seconds[title] = (program, state), list[float]()
    for _ in range(1 + rounds):
        for title, (program, state) in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(state, batch))
            seconds[title].append(time.perf_counter() - begin)
    for title, times in seconds.items():
        figures[title]["seconds"] = statistics.median(times[1:])
        print(f"  {title:28s} {figures[title]['seconds']:.1f} s a step")
    return figures


def _fast_adapt(rounds: int, path: str) -> dict[str, Any]:
    """Seconds of `fast_adapt_model`, 5-way 5-shot, 10 steps, each time on a task of other texts and labels."""
    import numpy as np

    import metajax

    seconds: dict[str, list[float]] = {}
    for remat in (True, False):
        model = metajax.load_pretrained_model(path, remat=remat)
        name = f"remat={remat}"
        for turn in range(1 + rounds):
            rng = np.random.default_rng(turn)
            words = ["when", "does", "my", "card", "train", "leave", "pay", "weather", "in", "book", "table", "music"]
            texts = [" ".join(rng.choice(words, _WORDS)) for _ in range(25)]
            begin = time.perf_counter()
            fast = metajax.fast_adapt_model(model, (texts, [f"{turn}{row // 5}" for row in range(25)]), steps=10)
            seconds.setdefault(name, []).append(time.perf_counter() - begin)
            assert len(fast.classes_) == 5
    figures = {name: {"first": times[0], "warm": statistics.median(times[1:])} for name, times in seconds.items()}
    for name, times in figures.items():
        print(f"fast_adapt_model, {name}: {times['warm']:.2f} s, the first time {times['first']:.1f} s")
    return figures
