"""Recurrent replay: stretches of sequences with the recurrent state before each step, and burn-in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metajax.core import _validate
from metajax.core._types import Params, PyTree
from metajax.replay import _memory


def sequences(
    capacity: int,
    length: int,
    *,
    rows: int = 1,
    period: int = 1,
    exponent: float = 0.9,
    correction: float = 0.6,
    floor: float = 1e-6,
    max_bytes: int | None = None,
) -> _memory.Memory:
    """Returns a memory of the newest time steps of sequences that draws stretches of `length` steps.

    flashbax's trajectory buffer stores the steps. Store the recurrent state before each step among the leaves of the
    step, and pass the state of the first step of a stretch to `burn_in`. A stretch consists of consecutive steps of one
    row and may cross from one sequence into the next. To detect this, store a flag for the first step of each sequence.

    `init` takes one step, leaves `[...]`; `add` takes the steps that follow, leaves `[rows, steps, ...]`, the same
    number of steps for all rows; `sample` gives leaves `[count, length, ...]`. Priorities, weights and `floor` are
    those of `prioritised`.

    Args:
      capacity: number of steps in each row, at least `length` and a multiple of `period`. In a full row, stretches that
        the newest step cuts are not drawn.
      length: number of steps in a stretch, burn-in included.
      rows: number of sequences that are recorded side by side.
      period: number of steps between the beginnings of two stretches; half the length in the paper.
      exponent: in [0, 1]; 0 draws uniformly.
      correction: in [0, 1].
      floor: above 0.
      max_bytes: as for `reservoir`.

    Raises:
      ValueError: an argument is out of its range.
      ImportError: flashbax is not installed.

    Source: Kapturowski et al. 2019, Recurrent Experience Replay in Distributed Reinforcement Learning (ICLR).

    >>> import jax, jax.numpy as jnp
    >>> memory = sequences(capacity=8, length=3)
    >>> state = memory.init({"input": jnp.float32(0)})
    >>> state = memory.add(state, {"input": jnp.arange(5.0)[None]})
    >>> int(memory.size(state)), memory.sample(state, 1, key=jax.random.key(0)).items["input"].shape
    (3, (1, 3))
    """
    for name, value in (("capacity", capacity), ("length", length), ("rows", rows), ("period", period)):
        _validate.positive_int(name, value)
    if capacity < length or capacity % period:
        raise ValueError(
            f"capacity must be at least the length {length} and a multiple of the period {period}, got {capacity}"
        )
    if period > length:
        raise ValueError(f"period must be at most the length {length}, or steps are never drawn, got {period}")
    inner = _memory.ring(
        capacity, length=length, rows=rows, period=period, exponent=exponent, correction=correction, floor=floor,
        max_bytes=max_bytes,
    )  # fmt: skip

    def add(state: Any, steps: PyTree, *, key: Any = None, keep: Any = True) -> Any:
        steps = jax.tree.map(jnp.asarray, steps)
        sizes = {leaf.shape[:2] for leaf in jax.tree.leaves(steps)}
        size = next(iter(sizes))
        if len(sizes) > 1 or len(size) < 2 or size[0] != rows or not 1 <= size[1] <= capacity:
            raise ValueError(
                f"steps must have {rows} rows of one number of steps from 1 to {capacity}, got leading axes "
                f"{sorted(sizes)}"
            )
        _memory.require_fit(state.experience, jax.tree.map(lambda leaf: leaf[0, 0], steps), 2)
        return inner.add(state, steps, key=key, keep=keep)

    return inner._replace(add=add)


def burn_in(
    apply: Callable[..., tuple[Any, Any]], params: Params, state: PyTree, sequence: PyTree, steps: int
) -> tuple[PyTree, PyTree]:
    """Runs a recurrent network over the first steps of a stretch to compute its state.

    A stored state was computed with earlier parameters. Running the current parameters from this state brings it closer
    to the state that they would have reached themselves, as far as the network forgets.

    Args:
      apply: `(params, state, step) -> (state, outputs)`, one step of the network; `step` is a slice of `sequence`.
      params: the parameters of the network.
      state: the state before the first step.
      sequence: leaves `[length, ...]`.
      steps: number of steps, from 0 to `length - 1`.

    Returns:
      The state after these steps, without a gradient, and the rest of the sequence, leaves `[length - steps, ...]`.

    Raises:
      ValueError: `steps` leaves nothing of the sequence, or is negative.

    Source: Kapturowski et al. 2019, section 3.

    >>> import jax.numpy as jnp
    >>> add = lambda rate, total, number: (rate * total + number, total)
    >>> state, rest = burn_in(add, 0.5, jnp.float32(8), jnp.array([1.0, 2.0, 3.0]), steps=2)
    >>> float(state), rest.tolist()
    (4.5, [3.0])
    """
    length = jax.tree.leaves(sequence)[0].shape[0]
    if _validate.int_at_least("steps", steps, 0) >= length:
        raise ValueError(f"steps must be below the length of the sequence, {length}, got {steps}")
    first = jax.tree.map(lambda leaf: leaf[:steps], sequence)
    rest = jax.tree.map(lambda leaf: leaf[steps:], sequence)
    state, _ = jax.lax.scan(lambda state, step: (apply(params, state, step)[0], None), state, first)
    return jax.lax.stop_gradient(state), rest


def sequence_priority(errors: jax.Array, *, mix: float = 0.9) -> jax.Array:
    """Computes the priority of a stretch: `mix` times the largest error of its steps plus `1 - mix` times their mean.

    Args:
      errors: `[..., length]`, at least 0.
      mix: in [0, 1].

    Returns:
      `[...]`.

    Raises:
      ValueError: `mix` is out of its range.

    Source: Kapturowski et al. 2019, section 2.3.

    >>> import jax.numpy as jnp
    >>> round(float(sequence_priority(jnp.array([1.0, 3.0]))), 4)
    2.9
    """
    _validate.fraction("mix", mix)
    return mix * jnp.max(errors, axis=-1) + (1 - mix) * jnp.mean(errors, axis=-1)
