"""Benchmark of the hypergradient estimators: `python -m experiments.benchmark hypergrad`."""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

_LONG = 64  # inner steps for the check that compilation time does not grow


class _Sizes(NamedTuple):
    """Sizes of the decoder. With `narrow` (on an accelerator) it computes in bfloat16 with float32 parameters."""

    width: int
    depth: int
    heads: int
    length: int
    narrow: bool
    batch: int = 4
    vocab: int = 512


_CPU, _ACCELERATOR = _Sizes(256, 6, 8, 256, False), _Sizes(1024, 12, 16, 1024, True)


def run(rounds: int) -> dict[str, Any]:
    """Measures memory and time of the exact estimators on a decoder, and the bias of all estimators on Conv4."""
    return {"decoder": _decoder(rounds), "conv4": _conv4()}


def _decoder_task(steps: int, *, remat: bool) -> tuple[Any, Any]:
    """Returns a decoder that adapts with Adam, and one task of 4 texts; 5 million parameters, 256 tokens on the CPU."""
    import jax
    import optax

    import metajax

    sizes = _CPU if jax.default_backend() == "cpu" else _ACCELERATOR
    model = metajax.models.decoder(sizes.vocab, width=sizes.width, depth=sizes.depth, heads=sizes.heads, remat=remat)
    if sizes.narrow:
        model = metajax.models.mixed_precision(model)
    learner = metajax.learners.maml(model, optax.adam(1e-3, eps_root=1e-8), steps)
    tokens = jax.random.randint(jax.random.key(0), (2, sizes.batch, sizes.length + 1), 0, sizes.vocab)
    parts = [metajax.Examples(text[:, :-1], text[:, 1:], jax.numpy.ones(sizes.batch, bool)) for text in tokens]
    return learner, metajax.Episode(*parts)


def _variants() -> dict[str, tuple[bool, Any]]:
    """Returns, for each variant, whether the blocks of the model are recomputed, and the estimator."""
    from metajax import hypergrad

    return {
        "unrolled": (False, hypergrad.unrolled()),  # what a user would write: jax.grad through lax.scan
        "unrolled, remat": (True, hypergrad.unrolled(remat=True)),
        "mixed mode, states kept": (True, hypergrad.mixed_mode(every=1)),
        "mixed mode": (True, hypergrad.mixed_mode()),
    }


def _compiled(steps: int, name: str) -> tuple[Any, Any, Any, float]:
    import jax

    from metajax import hypergrad

    remat, estimator = _variants()[name]
    learner, episode = _decoder_task(steps, remat=remat)
    params = jax.jit(learner.init)(jax.random.key(0), episode.support.inputs)
    lowered = jax.jit(hypergrad.value_and_grad(learner, estimator)).lower(params, episode)
    begin = time.perf_counter()
    program = lowered.compile()
    return program, params, episode, time.perf_counter() - begin


def _decoder(rounds: int) -> dict[str, Any]:
    import jax
    import numpy as np

    jax.config.update("jax_enable_compilation_cache", False)  # compilation time is measured here
    figures: dict[str, Any] = {}
    one_copy = 0
    for steps in (4, 8):
        programs = {name: _compiled(steps, name) for name in _variants()}
        sizes = {name: entry[0].memory_analysis().temp_size_in_bytes for name, entry in programs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        grads: dict[str, Any] = {}
        for turn in range(1 + (max(3, rounds // 2) if steps == 4 else 1)):
            for name, (program, params, episode, _) in programs.items():
                begin = time.perf_counter()
                _, found = jax.block_until_ready(program(params, episode))
                if turn:
                    seconds[name].append(time.perf_counter() - begin)
                grads[name] = found
        one_copy = sum(leaf.nbytes for leaf in jax.tree.leaves(grads["mixed mode"]))
        flat = {name: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(g)]) for name, g in grads.items()}
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        plain = "unrolled"
        print(f"decoder of {one_copy / 4e6:.1f} M parameters, {steps} inner Adam steps")
        for name in programs:
            error = np.linalg.norm(flat[name] - flat[plain]) / np.linalg.norm(flat[plain])
            print(
                f"  {name:24s} {sizes[name] / 1e6:7.0f} MB, 1/{sizes[plain] / sizes[name]:4.1f}   "
                f"{medians[name]:6.2f} s, {medians[name] / medians[plain]:.2f}   relative difference {error:.0e}"
            )
        best = "mixed mode"
        figures[f"T{steps}"] = {
            "bytes": sizes, "seconds": medians, "bytes_ratio": sizes[plain] / sizes[best],
            "time_ratio": medians[best] / medians[plain], "compile_seconds": programs[best][3],
        }  # fmt: skip
        del programs
    program, _, _, compile_seconds = _compiled(_LONG, "mixed mode")
    size = program.memory_analysis().temp_size_in_bytes
    each = (size - figures["T4"]["bytes"]["mixed mode"]) / (_LONG - 4) / one_copy
    ratio = compile_seconds / figures["T4"]["compile_seconds"]
    print(f"mixed mode at {_LONG} steps: {size / 1e6:.0f} MB, {each:.2f} copies of the fast weights a step more;")
    print(f"  compilation takes {compile_seconds:.1f} s, {ratio:.2f} times that at 4 steps")
    figures[f"T{_LONG}"] = {"bytes": size, "copies_per_step": each, "compile_ratio": ratio}
    return figures


def _conv4() -> dict[str, Any]:
    """Measures bias and cost of every estimator on Conv4, 5-way 1-shot, 5 inner steps."""
    import optax

    import metajax

    learner = metajax.learners.maml(metajax.models.conv4(5, pool=False), optax.sgd(0.1), 5, proximal=0.5)
    source, spec = metajax.data.glyphs(), metajax.data.EpisodeSpec()
    episodes = metajax.data.episode_batch(source, spec, seed=0, start=0, count=1)
    print("Conv4, 5-way 1-shot, 5 inner steps, proximal term 0.5, one task of the default job")
    found = metajax.hypergrad.compare(learner, episodes)
    print(found)
    return {row.name: row._asdict() for row in found.rows}
