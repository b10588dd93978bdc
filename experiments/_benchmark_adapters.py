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
    figures = {"memory": _memory()}
    if model is None:
        print("fast_adapt_model: left out, --model names no folder of weights")
        return figures
    return {**figures, "fast_adapt": _fast_adapt(rounds, model)}


def _memory() -> dict[str, Any]:
    """Bytes as the compiler counts them; nothing is computed, so the weights are shapes only."""
    import jax
    import jax.numpy as jnp
    import optax

    import metajax

    base = metajax.models.encoder(outputs=_WAYS, **_MINILM)
    model = metajax.adapters.lora(base, rank=_RANK)
    learner = metajax.learners.maml(model, optax.sgd(0.01), _STEPS, adapts="lora|head")
    key = jax.eval_shape(lambda: jax.random.key(0))

    def examples(n: int, *leading: int) -> Any:
        def leaf(dtype: Any, *shape: int) -> Any:
            return jax.ShapeDtypeStruct((*leading, *shape), dtype)

        texts = {"tokens": leaf(jnp.int32, n, _LENGTH), "mask": leaf(bool, n, _LENGTH)}
        return metajax.Examples(texts, leaf(jnp.int32, n), leaf(bool, n), leaf(bool, _WAYS))

    figures: dict[str, Any] = {}
    print(f"{_TASKS} tasks of {_WAYS} support and {_WAYS} query texts of {_LENGTH} tokens, {_STEPS} inner steps over ")
    print(f"rank-{_RANK} LoRA and a head, tasks under vmap, blocks of the encoder recomputed")
    for name in ("unrolled", "mixed_mode"):
        estimator = getattr(metajax.hypergrad, name)()
        outer = metajax.outer_update(
            learner, optax.adam(1e-3), hypergrad=estimator, trainable="lora|head", task_batching="vmap"
        )
        state = jax.eval_shape(outer.init, key, metajax.Episode(examples(_WAYS), examples(_WAYS)))
        batch = metajax.Episode(examples(_WAYS, _TASKS), examples(_WAYS, _TASKS))
        found: Any = jax.jit(outer.update).lower(state, batch).compile().memory_analysis()
        weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params))
        figures[name] = {
            "temporaries": found.temp_size_in_bytes, "arguments": found.argument_size_in_bytes, "weights": weights
        }  # fmt: skip
        ratio = figures["unrolled"]["temporaries"] / found.temp_size_in_bytes
        print(
            f"  {name:12s} temporaries {found.temp_size_in_bytes / 1e6:7.0f} MB, 1/{ratio:.1f}; arguments "
            f"{found.argument_size_in_bytes / 1e6:.0f} MB, of which the weights {weights / 1e6:.0f} MB"
        )
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
