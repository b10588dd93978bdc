"""Benchmarks of streams and a frozen base: `python -m experiments.benchmark streams` and `... benchmark base`."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from typing import Any

_CHUNKS, _LENGTH, _VOCAB = 16, 64, 512
_RANK, _TOKENS = 4, 32  # rank of the adapters on the base, and tokens per text


def streams(rounds: int) -> dict[str, Any]:
    """Measures memory and time of exact and first-order estimators on a decoder that learns from a text as it reads it.

    Each of the 16 inner steps takes the next 64 tokens of a text, is scored on them, and then learns from them. The
    objective is the mean of the scores (dynamic evaluation, test-time training).
    """
    import jax
    import numpy as np

    from metajax import hypergrad

    estimators = {
        "unrolled": (False, hypergrad.unrolled()),  # what a user would write: jax.grad through lax.scan
        "unrolled, remat": (True, hypergrad.unrolled(remat=True)),
        "mixed mode": (True, hypergrad.mixed_mode()),
        "first order": (True, hypergrad.first_order()),
    }
    programs: dict[str, Any] = {}
    sizes, seconds = {}, {name: list[float]() for name in estimators}
    for name, (remat, estimator) in estimators.items():
        learner, params, episode = _reader(remat=remat)
        lowered = jax.jit(hypergrad.value_and_grad(learner, estimator)).lower(params, episode)
        programs[name] = lowered.compile()
        sizes[name] = programs[name].memory_analysis().temp_size_in_bytes
    flat: dict[str, Any] = {}
    for turn in range(1 + max(3, rounds // 2)):
        for name, program in programs.items():
            begin = time.perf_counter()
            (_, aux), grads = jax.block_until_ready(program(params, episode))
            if turn:
                seconds[name].append(time.perf_counter() - begin)
            flat[name] = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])
    medians, plain = {name: statistics.median(times) for name, times in seconds.items()}, "unrolled"
    print(f"decoder of {len(flat[plain]) / 1e6:.1f} M parameters, {_CHUNKS} chunks of {_LENGTH} tokens, Adam inside")
    print(f"inner losses before the first and after the last chunk: {aux.inner_losses.values[np.array([0, -1])]}")
    for name in estimators:
        error = np.linalg.norm(flat[name] - flat[plain]) / np.linalg.norm(flat[plain])
        print(
            f"  {name:16s} {sizes[name] / 1e6:7.0f} MB, 1/{sizes[plain] / sizes[name]:4.1f}   "
            f"{medians[name]:6.2f} s, {medians[name] / medians[plain]:.2f}   relative difference {error:.0e}"
        )
    return {"bytes": sizes, "seconds": medians, "bytes_ratio": sizes[plain] / sizes["mixed mode"]}


def _reader(*, remat: bool) -> tuple[Any, Any, Any]:
    """Returns the learner, its parameters and one text."""
    import jax
    import jax.numpy as jnp
    import optax

    import metajax

    model = metajax.models.decoder(_VOCAB, width=192, depth=4, heads=6, remat=remat)

    def loss(params: Any, meta_params: Any, support: Any, step: Any, key: Any, *, data: Any) -> jax.Array:
        del meta_params, support, step, key
        return jnp.mean(metajax.core.cross_entropy(model.apply(params, data["tokens"]), data["next"]))

    problem = metajax.InnerProblem(
        init=lambda meta, support, key: meta, loss=loss, optimizer=lambda meta: optax.adam(1e-3, eps_root=1e-8),
        num_steps=_CHUNKS, finalize=lambda params, meta, support, key: params,
        stream=lambda meta, support, key: support.inputs,
    )  # fmt: skip
    learner = metajax.learners.bilevel(problem, init=model.init, objective="prequential")
    text = jax.random.randint(jax.random.key(0), [_CHUNKS * _LENGTH + 1], 0, _VOCAB)
    chunks = {"tokens": text[:-1].reshape(_CHUNKS, 1, _LENGTH), "next": text[1:].reshape(_CHUNKS, 1, _LENGTH)}
    support = metajax.Examples(chunks, None, jnp.ones(_CHUNKS, bool))
    query = metajax.Examples(jnp.zeros([1, 1]), jnp.zeros(1), jnp.ones(1, bool))
    params = jax.jit(model.init)(jax.random.key(1), chunks["tokens"][0])
    return learner, params, metajax.Episode(support, query)


def base() -> dict[str, Any]:
    """Measures the cost of a frozen base of 400 MB in addition to its own size, in separate processes."""
    found = {}
    for millions in (1, 100):
        command = [sys.executable, "-m", "experiments._benchmark_streams", str(millions)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[millions] = json.loads(done.stdout.splitlines()[-1])
    large, small = found[100], found[1]
    size = large["base"]
    print(f"a base of {size / 1e6:.0f} MB, and {large['state'] / 1e3:.0f} kB of adapters and their moments")
    print(
        f"  a checkpoint          {large['checkpoint'] / 1e3:.0f} kB, {large['checkpoint'] / large['state']:.3f} of it"
    )
    held = (large["live"] + large["outputs"]) / size
    print(f"  live arrays, outputs  {held:.3f} of the base")
    resident = (large["resident"] - small["resident"]) / (size - small["base"])
    print(f"  resident memory       {resident:.3f} of the base more than over one of {small['base'] / 1e6:.0f} MB")
    return {"large": large, "small": small, "held_ratio": held, "resident_ratio": resident}


def _measure(millions: int) -> dict[str, int]:
    """Returns the bytes of a meta step with a base of `millions` million parameters, after a warm-up step.

    Memory that malloc keeps from the compilation, which does not grow with the base, is released before that step.
    """
    import ctypes
    import gc
    import pathlib
    import tempfile

    import jax
    import jax.numpy as jnp
    import optax

    import metajax
    from metajax import core, training

    depth, width = (1, 256) if millions == 1 else (25, 576)  # layers of SmolLM2-135M, and a small one
    model = metajax.models.decoder(512, width=width, depth=depth, heads=width // 64, tied=True)
    model = metajax.adapters.lora(model, rank=_RANK)
    learner = metajax.learners.maml(model, optax.sgd(0.1), 1, adapts="lora", task=metajax.tasks.next_token_prediction)
    outer = metajax.outer_update(learner, optax.adam(1e-3), hypergrad=metajax.hypergrad.first_order(), before=False)
    tokens = jnp.ones([1, _TOKENS], jnp.int32)
    examples = metajax.Examples(tokens, tokens, jnp.ones(1, bool))
    episode = metajax.Episode(examples, examples)
    trained, frozen = core.split(jax.jit(model.init)(jax.random.key(0), tokens), "lora")
    state = outer.init(jax.random.key(0), episode, trained, frozen=frozen)
    episodes = jax.tree.map(lambda leaf: leaf[None], episode)
    program: Any = jax.jit(outer.update, donate_argnums=0).lower(state, episodes, frozen).compile()
    del trained
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    state, _ = jax.block_until_ready(program(state, episodes, frozen))
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    status = pathlib.Path("/proc/self/status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0]) * 1024
    live = sum(array.nbytes for array in jax.live_arrays())
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = training.Checkpoints(folder, base=training.params_sha256(frozen))
        checkpoints.save(1, state, {})
        checkpoints.close()
        files = pathlib.Path(folder, "last", "1").rglob("*")
        checkpoint = sum(file.stat().st_size for file in files if file.is_file())
    return {
        "base": size(frozen), "trained": size(state.params), "state": size((state.params, state.opt_state)),
        "checkpoint": checkpoint, "live": live, "outputs": program.memory_analysis().output_size_in_bytes,
        "temporaries": program.memory_analysis().temp_size_in_bytes, "resident": resident,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(_measure(int(sys.argv[1]))))
