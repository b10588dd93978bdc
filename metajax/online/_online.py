"""Learning from a stream of examples: an interface, and strategies for tasks that change without notice."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metajax.core import _validate
from metajax.core._objective import outer_objective
from metajax.core._types import Episode, Examples, Learner, MetaState, OuterUpdate, Params


class Online(NamedTuple):
    """A strategy on a stream of items: pure functions of a pytree state that run under `jit` and `scan`.

    Attributes:
      init: `(key, item, params=None) -> state`; an item gives the shapes, `params` are the initial meta-parameters.
      adapt: `(state) -> adapted`, for `learner.predict`; or `(state, support) -> adapted` if the state does not
        remember the current task.
      loss: `(state, item) -> scalar`, the loss of the item before anything is learned from it.
      observe: `(state, item) -> state`, stores the item.
      update: `(state) -> (state, metrics)`, trains the meta-parameters; returns `(state, {})` if they are not trained.

    >>> Online._fields
    ('init', 'adapt', 'loss', 'observe', 'update')
    """

    init: Callable[..., Any]
    adapt: Callable[..., Any]
    loss: Callable[..., jax.Array]
    observe: Callable[..., Any]
    update: Callable[..., tuple[Any, dict[str, Any]]]


def run_online(online: Online, state: Any, stream: Iterable[Any], *, steps: int) -> tuple[Any, np.ndarray]:
    """Runs a strategy on a stream: for each item, computes its loss, observes it, and updates the strategy.

    Each strategy is compiled once for each shape of items.

    Args:
      online: the strategy.
      state: the initial state.
      stream: items of one shape; `Episode` or `Examples`, depending on the strategy.
      steps: number of items to use.

    Returns:
      The state after the last item, and the losses `[steps]`, for `cumulative_regret`.

    Raises:
      ValueError: `steps` is below 1, an argument has another type, or the stream ends early.

    >>> import optax, metajax
    >>> learner = metajax.learners.maml(metajax.models.mlp(1), optax.sgd(0.01), loss=metajax.core.squared_error)
    >>> online = recent(learner, window=4)
    >>> item = metajax.Examples(jnp.ones([1, 1]), jnp.ones([1, 1]), jnp.ones(1, bool))
    >>> state, losses = run_online(online, online.init(jax.random.key(0), item), [item] * 3, steps=3)
    >>> bool(losses[2] < losses[0])
    True
    """
    _validate.instance("online", online, Online)
    _validate.positive_int("steps", steps)
    losses = []
    for _, item in zip(range(steps), stream, strict=False):
        state, loss = _step(state, item, online=online)
        losses.append(loss)
    if len(losses) < steps:
        raise ValueError(f"stream must last for {steps} steps, got {len(losses)}")
    return state, np.asarray(jnp.stack(losses))


# static: the functions of `online` are the key to look up the compiled step
@functools.partial(jax.jit, static_argnames="online")
def _step(state: Any, item: Any, *, online: Online) -> tuple[Any, jax.Array]:
    loss = online.loss(state, item)
    return online.update(online.observe(state, item))[0], loss


class LeaderState(NamedTuple):
    """The state of `follow_the_meta_leader`.

    Attributes:
      meta: the state of the meta step.
      tasks: the buffer, leaves `[capacity, ...]`; empty rows are padding.
      seen: int32 scalar, number of tasks observed so far.
      key: PRNG key of the buffer.

    >>> LeaderState._fields
    ('meta', 'tasks', 'seen', 'key')
    """

    meta: MetaState
    tasks: Episode
    seen: jax.Array
    key: jax.Array


def follow_the_meta_leader(
    learner: Learner,
    outer: OuterUpdate,
    *,
    capacity: int,
    meta_batch: int = 8,
    meta_steps: int = 1,
    keep: Literal["sample", "latest"] = "sample",
) -> Online:
    """Performs online meta-learning (Finn et al. 2019): after each task, takes meta steps on all tasks so far.

    The leader is the meta-parameters with which adaptation performs best over all tasks seen. After each task, a few
    steps of `outer.update` on tasks drawn from a buffer follow the leader. The buffer has a bounded size and is on the
    device. It holds a uniform sample of all tasks, or the latest tasks, which are better if the tasks drift.

    Items are `Episode`s: tasks with a support set to adapt to and a query set to evaluate. Later meta steps train on
    both.

    Args:
      learner: the learner that adapts to a task.
      outer: the meta step of the learner, `metajax.outer_update(learner, ...)`.
      capacity: number of tasks that the buffer holds, at least 1.
      meta_batch: number of tasks in a meta step, drawn with replacement, at least 1.
      meta_steps: number of meta steps after each task, at least 1.
      keep: "sample" (reservoir sampling) or "latest".

    Returns:
      An `Online` whose `adapt` takes the support set of the current task. `update` returns the metrics of its last meta
      step. Before the first task the buffer is padding, and an update has a hypergradient of zero.

    Raises:
      ValueError: an argument has another type, a number is below 1, or `keep` is unknown.

    Source: Finn, Rajeswaran, Kakade and Levine 2019, Online Meta-Learning, arXiv:1902.08438; the sample: Vitter 1985,
    Random sampling with a reservoir.

    >>> import optax, metajax
    >>> learner = metajax.learners.maml(metajax.models.mlp(2), optax.sgd(0.1))
    >>> outer = metajax.outer_update(learner, optax.adam(1e-3), hypergrad=metajax.hypergrad.mixed_mode())
    >>> online = follow_the_meta_leader(learner, outer, capacity=100)
    >>> examples = metajax.Examples(jnp.eye(4), jnp.array([0, 0, 1, 1]), jnp.ones(4, bool))
    >>> task = metajax.Episode(examples, examples)
    >>> state, losses = run_online(online, online.init(jax.random.key(0), task), [task] * 3, steps=3)
    >>> int(state.seen), int(state.meta.step)
    (3, 3)
    """
    _validate.instance("learner", learner, Learner)
    _validate.instance("outer", outer, OuterUpdate)
    for name, value in (("capacity", capacity), ("meta_batch", meta_batch), ("meta_steps", meta_steps)):
        _validate.positive_int(name, value)
    _validate.one_of("keep", keep, ("sample", "latest"))

    def init(key: jax.Array, item: Episode, params: Params | None = None) -> LeaderState:
        meta_key, key = jax.random.split(key)
        empty = jax.tree.map(lambda leaf: jnp.zeros([capacity, *jnp.shape(leaf)], jnp.result_type(leaf)), item)
        return LeaderState(outer.init(meta_key, item, params), empty, jnp.zeros([], jnp.int32), key)

    def adapt(state: LeaderState, support: Examples) -> Any:
        return learner.adapt(state.meta.params, support)

    def loss(state: LeaderState, item: Episode) -> jax.Array:
        return outer_objective(learner, state.meta.params, item)[0]

    def observe(state: LeaderState, item: Episode) -> LeaderState:
        place = state.seen % capacity
        if keep == "sample":
            # task n is stored with probability capacity / n, in a random place
            key = jax.random.fold_in(jax.random.split(state.key)[0], state.seen)
            drawn = jax.random.randint(key, [], 0, state.seen + 1)
            place = jnp.where(state.seen < capacity, state.seen, drawn)
        tasks = jax.tree.map(lambda kept, new: kept.at[place].set(new, mode="drop"), state.tasks, item)
        return state._replace(tasks=tasks, seen=state.seen + 1)

    def update(state: LeaderState) -> tuple[LeaderState, dict[str, Any]]:
        filled, draw_key = jnp.clip(state.seen, 1, capacity), jax.random.split(state.key)[1]

        def step(meta: MetaState, _: None) -> tuple[MetaState, dict[str, Any]]:
            key = jax.random.fold_in(draw_key, meta.step)
            rows = jax.random.randint(key, [meta_batch], 0, filled)
            return outer.update(meta, jax.tree.map(lambda leaf: leaf[rows], state.tasks))

        meta, metrics = jax.lax.scan(step, state.meta, length=meta_steps)
        return state._replace(meta=meta), jax.tree.map(lambda leaf: leaf[-1], metrics)

    return Online(init, adapt, loss, observe, update)


class RecentState(NamedTuple):
    """The state of `recent`.

    Attributes:
      params: meta-parameters.
      support: the last steps in order of time, with padding in front if there were fewer.

    >>> RecentState._fields
    ('params', 'support')
    """

    params: Params
    support: Examples


def recent(learner: Learner, *, window: int) -> Online:
    """Adapts to the last steps at each step, from a meta-learned prior (Nagabandi et al. 2019).

    With `learners.maml` this is GrBAL (gradient steps), with `learners.recurrent` ReBAL (a hidden state). The prior
    is meta-trained on episodes whose support set is `window` consecutive steps and whose query set is the next ones.

    Items are `Examples` of one step, `[n, ...]`, without a class mask.

    Args:
      learner: the learner that adapts.
      window: number of steps that are remembered, M in the paper, at least 1.

    Returns:
      An `Online` whose `adapt` takes only the state, and whose meta-parameters do not change.

    Raises:
      ValueError: an argument has another type, or `window` is below 1.

    Source: Nagabandi et al. 2019, Learning to Adapt in Dynamic, Real-World Environments through Meta-Reinforcement
    Learning, arXiv:1803.11347.

    >>> import optax, metajax
    >>> learner = metajax.learners.maml(metajax.models.mlp(1), optax.sgd(0.1), loss=metajax.core.squared_error)
    >>> online = recent(learner, window=2)
    >>> item = metajax.Examples(jnp.ones([1, 1]), jnp.ones([1, 1]), jnp.ones(1, bool))
    >>> state = online.observe(online.init(jax.random.key(0), item), item)
    >>> state.support.mask.tolist()
    [False, True]
    """
    _validate.instance("learner", learner, Learner)
    _validate.positive_int("window", window)

    def init(key: jax.Array, item: Examples, params: Params | None = None) -> RecentState:
        return RecentState(learner.init(key, item.inputs) if params is None else params, no_steps(item, window))

    def adapt(state: RecentState) -> Any:
        return learner.adapt(state.params, state.support)

    def loss(state: RecentState, item: Examples) -> jax.Array:
        return outer_objective(learner, state.params, Episode(state.support, item))[0]

    def observe(state: RecentState, item: Examples) -> RecentState:
        return state._replace(support=push(state.support, item))

    return Online(init, adapt, loss, observe, lambda state: (state, {}))


def no_steps(item: Examples, window: int) -> Examples:
    """Returns a support set of `window` steps of padding."""
    if item.class_mask is not None:
        raise ValueError("class_mask must be None for items of a stream of steps: it is not theirs but the task's")
    return jax.tree.map(lambda leaf: jnp.zeros([window * leaf.shape[0], *leaf.shape[1:]], leaf.dtype), item)


def push(support: Examples, item: Examples) -> Examples:
    """Appends a step to the support set and removes the oldest one."""
    return jax.tree.map(lambda kept, new: jnp.concatenate([kept[new.shape[0] :], new]), support, item)
