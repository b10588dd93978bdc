"""The loop around the meta step, with its episodes, as one program on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from metajax.core import _validate
from metajax.core._types import Episode, MetaState, OuterUpdate, Params, PyTree
from metajax.training import _loop

# the state of the same seed has small numbers folded into its key: by its split, and by steps
_PURPOSE = 2**32 - 2


def fit_on_device(
    outer: OuterUpdate | Callable[..., Any],
    state: MetaState,
    data: PyTree,
    sample: Callable[[PyTree, jax.Array], Episode],
    *,
    batch: int,
    steps: int,
    seed: int = 0,
    chunk: int = 100,
    frozen: Params = None,
    callbacks: Sequence[_loop.Callback] = (),
) -> MetaState:
    """Takes meta steps until `state.step` is `steps`, on episodes that are drawn where they are used.

    `chunk` steps at a time run as one compiled loop, without the host. The loop is compiled once, whatever the number
    of steps, and the episodes of a step depend on the seed and the step alone: neither `chunk` nor a new start changes
    them.

    Args:
      outer: an `OuterUpdate`, or an update function `(state, episodes) -> (state, metrics)`.
      state: where to start; consumed. `data` is brought to its devices, and each draws the tasks that it trains on.
      data: of `metajax.data.device_sampler`.
      sample: of `metajax.data.device_sampler`.
      batch: tasks in a step.
      steps: the number of steps in all, those that `state` has behind it included.
      seed: of the episodes.
      chunk: steps between two looks of the host. Chunks end at its multiples, and at `steps`.
      frozen: the base that stands beside the state, None for none; an argument of the program, never donated.
      callbacks: as for `fit`, with the metrics of each step as NumPy arrays; but the steps of a chunk are seen when it
        has ended, with the state that it ended with. So what looks at the state must do it at multiples of `chunk`.

    Returns:
      The state after `steps` steps.

    Raises:
      NonFiniteError: the loss of a step is not finite; the error names the first such step. Callbacks see the steps
        before it.
      ValueError: an argument is out of range, or `chunk` does not divide the interval `every` of a callback that has
        one (`Validation`, `Saving`).

    >>> import jax, optax, metajax
    >>> data, sample = metajax.data.device_sampler(metajax.data.sinusoids(), metajax.data.EpisodeSpec(1, 5, 5))
    >>> learner = metajax.learners.maml(metajax.models.mlp(1), optax.sgd(0.01), loss=metajax.core.squared_error)
    >>> outer = metajax.outer_update(learner, optax.adam(1e-2), hypergrad=metajax.hypergrad.mixed_mode())
    >>> state = outer.init(jax.random.key(0), sample(data, jax.random.key(0)))
    >>> losses = []
    >>> state = metajax.training.fit_on_device(outer, state, data, sample, batch=25, steps=200, callbacks=[
    ...     lambda step, state, metrics: losses.append(metrics["loss"])])
    >>> int(state.step), bool(sum(losses[-50:]) < sum(losses[:50]))
    (200, True)
    """
    for name, value in (("batch", batch), ("steps", steps), ("chunk", chunk)):
        _validate.positive_int(name, value)
    if _validate.int_at_least("seed", seed, 0) >= 2**64:
        raise ValueError(f"seed must lie below 2**64, got {seed}")
    for callback in callbacks:
        every = getattr(callback, "every", chunk)
        if every % chunk:
            raise ValueError(f"chunk must divide the interval of {type(callback).__name__}, {every}, got {chunk}")
    # committed, as the program leaves it, and the data beside it: nothing is compiled or moved again
    state = jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), jax.tree.map(jnp.asarray, state))
    data = jax.device_put(data, state.step.sharding)
    low, high = seed % 2**32, seed // 2**32  # a key takes 32 bits
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(low), _PURPOSE), high)
    run = _program(_loop.update_of(outer), sample, batch, chunk)
    taken = int(state.step)
    with _loop.closing(callbacks):
        while taken < steps:
            count = min(chunk - taken % chunk, steps - taken)
            state, kept = run(state, data, key, count, *_loop.given(frozen))
            kept = jax.device_get(kept)  # an interrupt is raised here, when the chunk has ended
            for place in range(count):
                taken += 1
                metrics = jax.tree.map(lambda lines, place=place: lines[place], kept)
                _loop.require_finite_loss(taken, metrics)
                for callback in callbacks:
                    callback(taken, state, metrics)
    return state


@functools.lru_cache(maxsize=4)  # another call goes on with the program of the last one
def _program(update: Callable[..., Any], sample: Callable[..., Episode], batch: int, chunk: int) -> Callable[..., Any]:
    """`(state, data, key, count, *frozen) -> (state, metrics)`, `count` steps; the metrics have `chunk` lines."""

    @jax.jit  # traced once for its shapes and the loop
    def step(state: MetaState, data: PyTree, key: jax.Array, *frozen: Params) -> tuple[MetaState, dict[str, Any]]:
        key = jax.random.fold_in(key, state.step)
        keys = jax.vmap(lambda task: jax.random.fold_in(key, task))(jnp.arange(batch))
        return update(state, jax.vmap(sample, in_axes=(None, 0))(data, keys), *frozen)

    def several(
        state: MetaState, data: PyTree, key: jax.Array, count: int, *frozen: Params
    ) -> tuple[MetaState, dict[str, Any]]:
        shapes = jax.eval_shape(step, state, data, key, *frozen)[1]
        kept = jax.tree.map(lambda leaf: jnp.zeros((chunk, *leaf.shape), leaf.dtype), shapes)

        def one(place: jax.Array, carry: tuple[MetaState, dict[str, Any]]) -> tuple[MetaState, dict[str, Any]]:
            state, kept = carry
            state, metrics = step(state, data, key, *frozen)
            return state, jax.tree.map(lambda lines, line: lines.at[place].set(line), kept, metrics)

        # not a scan: with the number of steps as an argument, chunks of every length share one program
        return jax.lax.fori_loop(0, count, one, (state, kept))

    return jax.jit(several, donate_argnums=0)
