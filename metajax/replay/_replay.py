"""Experience replay: reuses earlier data in meta-training and in adaptation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from metajax.core import _tree, _validate
from metajax.core._types import Episode, Examples, MetaState, OuterUpdate, Params, PyTree
from metajax.replay._memory import Memory, Sample, remember, require_fit

# the meta step folds its step into the same key; no step is this large, and no other purpose uses this number
_PURPOSE = 2**32 - 3


class Experience(NamedTuple):
    """One example, as a memory of examples stores it.

    Attributes:
      inputs: pytree, leaves `[...]`.
      targets: pytree, leaves `[...]`.

    >>> Experience._fields
    ('inputs', 'targets')
    """

    inputs: PyTree
    targets: PyTree


class ReplayState(NamedTuple):
    """The state of `replayed`, stored in `MetaState.hypergrad_state` and so in every checkpoint.

    Attributes:
      estimator: the state of the estimator.
      memory: the state of the memory.

    >>> ReplayState._fields
    ('estimator', 'memory')
    """

    estimator: Any
    memory: Any


def with_experience(support: Examples, drawn: Sample, *, key: jax.Array | None = None) -> Examples:
    """Joins a support set with remembered examples; any learner can adapt to the result.

    Class labels must have the same meaning in both: use this for tasks that share their classes, or add new ones.

    Args:
      support: the support set of one task.
      drawn: a sample from a memory of `Experience`.
      key: PRNG key; an example of weight w in (0, 1) counts with probability w, so that its loss is weighted in
        expectation. None counts all examples with a weight above 0.

    Returns:
      `[n + count]` examples. If the memory had no item to draw, the row is padding. A class mask has the classes of
      both; an example of a class beyond the length of the mask is padding too.

    Raises:
      ValueError: the drawn items are not `Experience`s.

    >>> import jax, jax.numpy as jnp, metajax
    >>> memory = metajax.replay.reservoir(2)
    >>> state = memory.init(Experience(jnp.zeros(3), jnp.int32(0)))
    >>> state = memory.add(state, Experience(jnp.ones(3), jnp.int32(1)), key=jax.random.key(0))
    >>> new = metajax.Examples(jnp.zeros([1, 3]), jnp.array([0]), jnp.ones(1, bool), jnp.array([True, False]))
    >>> joined = with_experience(new, memory.sample(state, 2, key=jax.random.key(1)))
    >>> joined.targets.tolist(), joined.mask.tolist(), joined.class_mask.tolist()
    ([0, 1, 0], [True, True, False], [True, True])
    """
    old, present = _validate.instance("drawn.items", drawn.items, Experience), support.class_mask
    counts = _counting(drawn.weights, key)
    if present is not None:  # targets are labels of classes
        ways = present.shape[0]
        axes = tuple(range(1, old.targets.ndim))
        counts &= jnp.all(old.targets < ways, axis=axes)
        known = jnp.expand_dims(counts, axes) & (old.targets >= 0)
        present = jnp.asarray(present).at[jnp.where(known, old.targets, ways)].set(True, mode="drop")
    inputs, targets = _joined((support.inputs, support.targets), (old.inputs, old.targets))
    return Examples(inputs, targets, jnp.concatenate([support.mask, counts]), present)


def replayed(
    outer: OuterUpdate,
    memory: Memory,
    count: int,
    *,
    what: Literal["tasks", "examples"] = "tasks",
    priority: Callable[[Params, Any], jax.Array] | None = None,
) -> OuterUpdate:
    """Returns a meta step on new episodes and on earlier data from a memory, which then stores the new episodes.

    - "tasks": the memory holds episodes, and `count` of them are additional tasks of the meta step.
    - "examples": the memory holds support examples (`Experience`), and `count` of them join the support set of each
      episode, as in `with_experience`. With `reptile(model, inner, batch_size=)`, the estimator `displacement()`, the
      outer `optax.sgd(rate)` and a `reservoir`, this is Meta-Experience Replay: SGD runs over new and remembered
      examples together, and the start moves towards its end.

    The draw depends only on the key and the step of the state. While the memory is empty, the step uses only the new
    episodes. An episode or example with a weight below 1 counts with that probability. Padding examples are not stored,
    and neither are tasks that have only padding in the parts that the objective judges.

    Args:
      outer: a meta step without an axis name. To spread tasks over devices, wrap the result of
        `metajax.parallel.shard`, with a `count` that is divisible by the number of devices.
      memory: a memory of episodes without a task axis, or of `Experience`s. Its state is stored beside the state of the
        estimator in `MetaState.hypergrad_state`, as a `ReplayState`.
      count: number of items that are drawn, at most the capacity.
      what: "tasks" or "examples".
      priority: `(params, items) -> [n]`, new priorities of the drawn items, leaves `[n, ...]`, such as their losses.
        `params` are the parameters after the step (merged with a frozen base). Required if the memory has priorities.

    Returns:
      An `OuterUpdate` with the same signature and one more metric, `replayed`, the number of items from the memory.

    Raises:
      ValueError: an argument does not have this form; or (when traced) `count` exceeds the capacity, or episodes do not
        have the shapes of the episode that `init` received.

    Source: Riemer et al. 2019, Learning to Learn without Forgetting by Maximizing Transfer and Minimizing
      Interference, arXiv:1810.11910.

    >>> import jax, jax.numpy as jnp, optax, metajax
    >>> learner = metajax.learners.reptile(metajax.models.mlp(outputs=2), optax.sgd(0.1), batch_size=2)
    >>> outer = metajax.outer_update(learner, optax.sgd(0.5), hypergrad=metajax.hypergrad.displacement())
    >>> outer = replayed(outer, metajax.replay.reservoir(100), 4, what="examples")
    >>> examples = metajax.Examples(jnp.eye(4), jnp.array([0, 0, 1, 1]), jnp.ones(4, bool))
    >>> episode = metajax.Episode(examples, examples)
    >>> state = outer.init(jax.random.key(0), episode)
    >>> told = []
    >>> for _ in range(2):
    ...     state, metrics = jax.jit(outer.update)(state, jax.tree.map(lambda leaf: leaf[None], episode))
    ...     told.append(int(metrics["replayed"]))
    >>> told
    [0, 4]
    """
    _validate.instance("outer", outer, OuterUpdate)
    _validate.instance("memory", memory, Memory)
    _validate.one_of("what", what, ("tasks", "examples"))
    if _validate.positive_int("count", count) > memory.capacity:
        raise ValueError(f"count must be at most the capacity of the memory, {memory.capacity}, got {count}")
    if outer.axis_name is not None:
        raise ValueError(f"outer must have no axis_name, since all devices share the memory, got {outer.axis_name!r}")
    if (priority is None) != (memory.update is None):
        wanted = "None for a memory without priorities" if memory.update is None else "given for a memory that has them"
        raise ValueError(f"priority must be {wanted}, got {priority!r}")

    @jax.jit  # also if the step is not: an empty memory then gives weights of 0
    def draw(held: Any, key: jax.Array) -> Sample:
        return memory.sample(held, count, key=key)

    @jax.jit
    def judge(held: Any, drawn: Sample, params: Params) -> Any:
        assert memory.update is not None
        assert priority is not None
        return memory.update(held, drawn.indices, priority(params, drawn.items))

    def init(
        key: jax.Array, episode: Episode, params: Params = None, *, frozen: Params = None, num_tasks: int = 1
    ) -> MetaState:
        if what == "tasks":
            held = memory.init(episode)
            state = outer.init(key, episode, params, frozen=frozen, num_tasks=num_tasks + count)
        else:
            held = memory.init(jax.tree.map(lambda leaf: leaf[0], Experience(*episode.support[:2])))
            # the state of an estimator may depend on the size of the joined support set
            support = with_experience(episode.support, draw(held, jax.random.key(0)))
            state = outer.init(key, episode._replace(support=support), params, frozen=frozen, num_tasks=num_tasks)
        # the memory is on all devices of the state, also after restoring
        if not isinstance(state.step, jax.core.Tracer) and len(state.step.sharding.device_set) > 1:
            held = jax.device_put(held, state.step.sharding)
        return state._replace(hypergrad_state=ReplayState(state.hypergrad_state, held))

    def update(state: MetaState, episodes: Episode, frozen: Params = None) -> tuple[MetaState, dict[str, Any]]:
        estimator, held = state.hypergrad_state
        draw_key, weigh_key, keep_key = jax.random.split(
            jax.random.fold_in(jax.random.fold_in(state.key, _PURPOSE), state.step), 3
        )
        if what == "tasks":
            drawn = draw(held, draw_key)
            require_fit(drawn.items, jax.tree.map(lambda leaf: leaf[0], episodes), 1)
            counts = _counting(drawn.weights, weigh_key)
            joined = _joined(episodes, Episode(*(_kept(part, counts) for part in drawn.items)))
            new_items, keep = episodes, _judged(episodes, outer.objective)
            replays = jnp.sum(counts)
        else:
            tasks, size = episodes.support.mask.shape
            drawn = jax.vmap(draw, in_axes=(None, 0))(held, jax.random.split(draw_key, tasks))
            support = jax.vmap(lambda one, drawn, key: with_experience(one, drawn, key=key))(
                episodes.support, drawn, jax.random.split(weigh_key, tasks)
            )
            joined = episodes._replace(support=support)
            keep = jnp.asarray(episodes.support.mask)
            new_items, keep, drawn = _flat((Experience(*episodes.support[:2]), keep, drawn))
            replays = jnp.sum(support.mask[:, size:])
        new, metrics = outer.update(state._replace(hypergrad_state=estimator), joined, *_tree.given(frozen))
        if priority is not None:
            held = judge(held, drawn, _tree.merge(new.params, frozen))
        held = remember(memory, held, new_items, key=keep_key, keep=keep)
        new = new._replace(hypergrad_state=ReplayState(new.hypergrad_state, held))
        return new, {**metrics, "replayed": replays.astype(jnp.float32)}

    return outer.wrapped(init, update)


def _kept(examples: Examples, counts: jax.Array) -> Examples:
    """Returns examples `[tasks, ...]` that are all padding in the tasks that do not count."""
    mask = jnp.asarray(examples.mask)
    return examples._replace(mask=mask & jnp.expand_dims(counts, tuple(range(1, mask.ndim))))


def _judged(episodes: Episode, objective: str) -> jax.Array:
    """Returns which tasks may count: those with an example in the parts that the objective judges."""
    parts = {"query": (episodes.query,), "prequential": (episodes.support,)}.get(objective, episodes)
    return jnp.any(jnp.stack([jnp.any(part.mask, axis=tuple(range(1, part.mask.ndim))) for part in parts]), axis=0)


def _counting(weights: jax.Array, key: jax.Array | None) -> jax.Array:
    """Returns which drawn items count, each with the probability of its weight."""
    return weights > 0 if key is None else jax.random.uniform(key, weights.shape) < weights


def _joined(one: PyTree, other: PyTree) -> PyTree:
    return jax.tree.map(lambda new, old: jnp.concatenate([new, old]), one, other)


def _flat(tree: PyTree) -> PyTree:
    """Joins the two leading axes of every leaf."""
    return jax.tree.map(lambda leaf: jnp.reshape(leaf, (-1, *leaf.shape[2:])), tree)
