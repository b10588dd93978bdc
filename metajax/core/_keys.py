"""The PRNG keys of a task: one layout that the inner loop, all estimators and evaluation share.

A key of None means deterministic. In JAX `split(key)[i]` equals `fold_in(key, i)`, so a key is either split or folded,
never both: keys that a task uses once are split off, and keys of many steps are folded from one of these.

    state.key    folded with the meta step, then with the task       -> a task of a meta step
    task         split into adapt, outer                             (`of_task`)
    adapt        split into init, context, stream, carry, step, end  (`of_adaptation`)
    step         folded with the inner step
    end, outer   folded with the number of inner steps taken
"""

from __future__ import annotations

from typing import NamedTuple

import jax

Key = jax.Array | None


class TaskKeys(NamedTuple):
    """Keys of a task.

    Attributes:
      adapt: key of the adaptation.
      outer: key of the outer loss, or of the prediction.
    """

    adapt: Key
    outer: Key


class AdaptationKeys(NamedTuple):
    """Keys of an adaptation by an inner loop, named after the fields of the inner problem.

    Attributes:
      init: key of the initial fast weights.
      context: key of the context.
      stream: key of the stream.
      carry: key of the initial carry.
      step: folded with the step, key of the inner loss.
      end: folded with the number of steps, key of `finalize`.
    """

    init: Key
    context: Key
    stream: Key
    carry: Key
    step: Key
    end: Key


def of_task(key: Key) -> TaskKeys:
    """Returns the keys of a task.

    >>> of_task(None)
    TaskKeys(adapt=None, outer=None)
    """
    return TaskKeys(*split(key, len(TaskKeys._fields)))


def of_adaptation(key: Key) -> AdaptationKeys:
    """Returns the keys of an adaptation.

    >>> of_adaptation(None).step is None
    True
    """
    return AdaptationKeys(*split(key, len(AdaptationKeys._fields)))


def fold(key: Key, data: jax.Array | int) -> Key:
    """Folds an integer into the key; returns None for None.

    >>> fold(None, 3) is None
    True
    """
    return None if key is None else jax.random.fold_in(key, data)


def split(key: Key, num: int) -> list[Key]:
    """Splits a key into `num` keys; returns a list of Nones for None.

    >>> split(None, 2)
    [None, None]
    """
    return [None] * num if key is None else list(jax.random.split(key, num))
