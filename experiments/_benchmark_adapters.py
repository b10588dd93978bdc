"""Benchmark of adapters: `python -m experiments.benchmark adapters`."""

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
_SMOLLM2: dict[str, Any] = {
    "vocab": 49152,
    "width": 576,
    "depth": 30,
    "heads": 9,
    "kv_heads": 3,
    "hidden": 1536,
    "tied": True,
}
_TASKS, _STEPS, _LENGTH, _WAYS, _RANK = 8, 5, 64, 5, 8
_QUESTIONS, _CHOICES, _CHOICE_STEPS = 8, 4, 3
_WORDS = 12  # words per text for `fast_adapt_model`


def run(rounds: int, model: str | None) -> dict[str, Any]:
    """Measures the memory of MAML over adapters and the time to adapt the encoder in folder `model`.

    The memory is that of an encoder with the sizes of MiniLM, and of a decoder with the sizes of SmolLM2-135M that
    answers multiple-choice questions.
    """
    figures = {"memory": _memory(min(rounds, 3)), "choices": _choices(min(rounds, 3))}
    if model is None:
        print("fast_adapt_model: left out, --model names no folder of weights")
        return figures
    return {**figures, "fast_adapt": _fast_adapt(rounds, model)}


def _memory(rounds: int) -> dict[str, Any]:
    """Compares MAML with two ways to recompute blocks."""
    import metajax

    print(f"{_TASKS} tasks of {_WAYS} support and {_WAYS} query texts of {_LENGTH} tokens, {_STEPS} inner steps over ")
    print(f"rank-{_RANK} LoRA and a head, tasks under vmap, blocks of the encoder recomputed (remat)")
    variants: list[tuple[str, Any]] = [("unrolled", True), ("mixed_mode", True), ("mixed_mode", "example")]
    programs = {
        f"{name}, remat={remat!r}": _outer(
            metajax.models.encoder(outputs=_WAYS, remat=remat, **_MINILM), name, _STEPS, "lora|head"
        )
        for name, remat in variants
    }
    batch = metajax.Episode(*(_examples(seed, _WAYS, (), _MINILM["vocab"]) for seed in range(2)))
    return _compare(programs, batch, rounds, timed=list(programs)[1:])


def _choices(rounds: int) -> dict[str, Any]:
    """Compares first-order MAML of a decoder on multiple-choice questions, with and without `remat`.

    The logits are those of all tokens, or those of one question at a time.
    """
    import metajax

    print(f"a task of {_QUESTIONS} support and {_QUESTIONS} query questions, {_CHOICES} choices of {_LENGTH} tokens,")
    print(f"{_CHOICE_STEPS} inner steps over rank-{_RANK} LoRA of a decoder of {_SMOLLM2['vocab']} words")
    decoder = metajax.models.decoder(**_SMOLLM2)
    programs = {
        f"score_choices(remat={remat})": _outer(
            metajax.models.score_choices(decoder, remat=remat), "first_order", _CHOICE_STEPS, "lora"
        )
        for remat in (False, True)
    }
    halves = (_examples(seed, _QUESTIONS, (_CHOICES,), _SMOLLM2["vocab"], tasks=1) for seed in range(2))
    batch = metajax.Episode(*halves)
    return _compare(programs, batch, rounds, timed=list(programs))


def _outer(model: Any, estimator: str, steps: int, where: str) -> Any:
    import optax

    import metajax

    learner = metajax.learners.maml(metajax.adapters.lora(model, rank=_RANK), optax.sgd(0.01), steps, adapts=where)
    return metajax.outer_update(
        learner, optax.adam(1e-3), hypergrad=getattr(metajax.hypergrad, estimator)(), trainable=where,
        task_batching="vmap",
    )  # fmt: skip


def _examples(seed: int, count: int, choices: tuple[int, ...], vocab: int, *, tasks: int = _TASKS) -> Any:
    """Returns texts of `_LENGTH` tokens, or questions whose choices are the second half of these tokens."""
    import numpy as np

    import metajax

    shape = (tasks, count, *choices, _LENGTH)
    inputs = {
        "tokens": np.random.default_rng(seed).integers(1, vocab, shape, np.int32),
        "mask": np.ones(shape, bool),
    }
    if choices:
        inputs["choice"] = np.broadcast_to(np.arange(_LENGTH) >= _LENGTH // 2, shape)
    ways = choices[0] if choices else count
    targets = np.broadcast_to(np.arange(count, dtype=np.int32) % ways, shape[:2])
    return metajax.Examples(inputs, targets, np.ones(shape[:2], bool), np.ones((tasks, ways), bool))


def _compare(outers: dict[str, Any], batch: Any, rounds: int, *, timed: list[str]) -> dict[str, Any]:
    """Compares bytes reported by the compiler, relative to the first program, and median seconds of a `timed` step."""
    import jax

    figures: dict[str, Any] = {}
    programs, seconds = {}, {title: list[float]() for title in timed}
    for title, outer in outers.items():
        state = outer.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], batch))
        programs[title] = (jax.jit(outer.update).lower(state, batch).compile(), state)
        found: Any = programs[title][0].memory_analysis()
        weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params))
        figures[title] = {
            "temporaries": found.temp_size_in_bytes, "arguments": found.argument_size_in_bytes, "weights": weights
        }  # fmt: skip
        ratio = next(iter(figures.values()))["temporaries"] / found.temp_size_in_bytes
        print(
            f"  {title:28s} temporaries {found.temp_size_in_bytes / 1e6:7.0f} MB, 1/{ratio:.1f}; arguments "
            f"{found.argument_size_in_bytes / 1e6:.0f} MB, of which the weights {weights / 1e6:.0f} MB"
        )
    for _ in range(1 + rounds):
        for title in timed:
            program, state = programs[title]
            begin = time.perf_counter()
            jax.block_until_ready(program(state, batch))
            seconds[title].append(time.perf_counter() - begin)
    for title, times in seconds.items():
        figures[title]["seconds"] = statistics.median(times[1:])
        print(f"  {title:28s} {figures[title]['seconds']:.1f} s a step")
    return figures


def _fast_adapt(rounds: int, path: str) -> dict[str, Any]:
    """Times `fast_adapt_model`, 5-way 5-shot, 10 steps, each time on a task with other texts and labels."""
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
