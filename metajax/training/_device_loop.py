"""A training loop that samples episodes and runs meta steps in one program on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from metajax.core import _tree, _validate
from metajax.core._types import Episode, MetaState, OuterUpdate, Params, PyTree
from metajax.training import _loop

# a state with the same seed folds small numbers into its key, in its split and for its steps
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
    """Takes meta steps until `state.step` is `steps`, on episodes that are sampled on the device.

    `chunk` steps at a time run as one compiled loop, without the host. The loop is compiled once for any number of
    steps. The episodes of a step depend only on the seed and the step: they do not change with `chunk` or when a run
    resumes.

    Args:
      outer: an `OuterUpdate`, or an update function `(state, episodes) -> (state, metrics)`.
      state: the initial state, which is consumed. `data` is copied to its devices, and each device samples the tasks
        that it trains on.
      data: the data of `metajax.data.device_sampler`.
      sample: the sampling function of `metajax.data.device_sampler`.
      batch: tasks per step.
      steps: the total number of steps, including those that `state` has already taken.
      seed: seed of the episodes.
      chunk: steps that run before the host sees their metrics. Chunks end at multiples of `chunk` and at `steps`.
      frozen: the frozen base, or None. It is an argument of the program and never donated.
      callbacks: as for `fit`, with the metrics of each step as NumPy arrays. The callbacks for the steps of a chunk run
        after the chunk has ended, with its final state. A callback that reads the state must therefore do so at
        multiples of `chunk`.

    Returns:
      The state after `steps` steps.

    Raises:
      NonFiniteError: the loss of a step is not finite. The error names the first such step. Callbacks are called for
        the steps before it.
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
    # Commit the state to its devices, as the program returns it, and copy the data there. Otherwise the second call
    # would compile or copy again.
    state = jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), jax.tree.map(jnp.asarray, state))
    data = jax.device_put(data, state.step.sharding)
    low, high = seed % 2**32, seed // 2**32  # jax.random.key takes 32 bits
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(low), _PURPOSE), high)
    run = _program(_loop.update_of(outer), sample, batch, chunk)
    taken = int(state.step)
    with _loop.closing(callbacks):
        while taken < steps:
            count = min(chunk - taken % chunk, steps - taken)
            state, kept = run(state, data, key, count, *_tree.given(frozen))
            kept = jax.device_get(kept)  # an interrupt is raised here, after the chunk has ended
            for place in range(count):
                taken += 1
                metrics = jax.tree.map(lambda lines, place=place: lines[place], kept)
                _loop.require_finite_loss(taken, metrics)
                for callback in callbacks:
                    callback(taken, state, metrics)
    return state


@functools.lru_cache(maxsize=4)  # later calls reuse the program
def _program(update: Callable[..., Any], sample: Callable[..., Episode], batch: int, chunk: int) -> Callable[..., Any]:
    """Returns `(state, data, key, count, *frozen) -> (state, metrics)`, which takes `count` steps.

    The metrics have a leading axis of size `chunk`.
    """

    @jax.jit  # traced once for both `eval_shape` and the loop
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

        # fori_loop and not scan: the number of steps is an argument, so chunks of all lengths share one program
        return jax.lax.fori_loop(0, count, one, (state, kept))

    return jax.jit(several, donate_argnums=0)
