"""The meta step: hypergradients of a batch of tasks, averaged, and given to an optax transform."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from metajax.core import _chunks, _losses, _tree, _validate
from metajax.core._types import Episode, Hypergrad, Learner, MetaState, OuterUpdate, Params, Sums

TaskBatching = Literal["auto", "vmap", "scan"] | int


def outer_update(
    learner: Learner,
    optimizer: optax.GradientTransformation,
    *,
    hypergrad: Hypergrad,
    trainable: _tree.Where = None,
    task_batching: TaskBatching = "auto",
    axis_name: str | None = None,
    before: bool = True,
) -> OuterUpdate:
    """Makes the pure meta step of a learner, an optimizer and an estimator.

    `update` composes with `jit`, `vmap`, `pmap`, `shard_map` and `scan`. The hypergradient is the mean over
    tasks; a task whose query set is all padding weighs nothing, and if all are, parameters get a zero gradient.

    Args:
      learner: what adapts.
      optimizer: any optax transform of the averaged hypergradient; one that asks for a `value` gets
        the loss. Clipping and the handling of steps that are not finite are optax's:
        `optax.chain(optax.clip_by_global_norm(10.0), ...)`, `optax.apply_if_finite(...)`.
      hypergrad: the estimator.
      trainable: path regex or predicate of the meta-parameters that are trained. The rest gets no gradient and no
        optimizer state, may hold integers, and is never copied for a task. None trains all.
      task_batching: how the tasks of one call are run: "vmap", "scan" (one after the other), a chunk size (a scan
        over chunks under vmap), or "auto" (see `choose_task_batching`). All give the same result up to rounding.
      axis_name: name of the `pmap` or `shard_map` axis over which tasks are spread; gradients and metrics are
        reduced over it. Every device must hold the same number of tasks.
      before: also measure the query loss before adaptation, one more forward pass. Without an inner problem there
        is no before.

    Returns:
      An `OuterUpdate`, for `jit`, or for `metajax.parallel.shard` to spread over a mesh.
      `update` returns metrics, each a scalar mean over tasks: `loss` and, for class labels,
      `accuracy` of the query set after adaptation; `loss_before` and `accuracy_before`; `inner_loss`
      `[num_steps]`; `grad_norm` of the averaged hypergradient.

    Raises:
      ValueError: a part of another type, an unknown `task_batching`, a chunk size that does not divide the tasks,
        a `trainable` that picks nothing, leaves of episodes that disagree in their leading axis (or have none, or no
        task), or another number of tasks than `init(num_tasks=)` made the states of a persistent estimator for.

    >>> import jax, jax.numpy as jnp, optax, metajax
    >>> learner = metajax.learners.maml(metajax.models.mlp(outputs=2), inner=optax.sgd(0.1))
    >>> outer = metajax.outer_update(learner, optax.adam(1e-3), hypergrad=metajax.hypergrad.mixed_mode())
    >>> examples = metajax.Examples(jnp.eye(4), jnp.array([0, 0, 1, 1]), jnp.ones(4, bool))
    >>> episode = metajax.Episode(examples, examples)
    >>> state = outer.init(jax.random.key(0), episode)
    >>> episodes = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), episode)
    >>> state, metrics = jax.jit(outer.update)(state, episodes)
    >>> int(state.step), sorted(metrics)
    (1, ['accuracy', 'accuracy_before', 'grad_norm', 'inner_loss', 'loss', 'loss_before'])
    """
    _validate.instance("learner", learner, Learner)
    _validate.instance("optimizer", optimizer, optax.GradientTransformation)
    _validate.instance("hypergrad", hypergrad, Hypergrad)
    if isinstance(task_batching, str):
        _validate.one_of("task_batching", task_batching, ("auto", "vmap", "scan"))
    else:
        _validate.positive_int("task_batching", task_batching)
    optimizer = optax.with_extra_args_support(optimizer)
    axes = () if axis_name is None else (axis_name,)

    def init(key: jax.Array, episode: Episode, params: Params | None = None, num_tasks: int = 1) -> MetaState:
        params_key, state_key, key = jax.random.split(key, 3)
        if params is None:
            params = learner.init(params_key, episode.support.inputs)
        # a copy of what is given: a jitted update may donate its state
        params = jax.tree.map(jnp.array, params)
        trained, _ = _tree.split(params, trainable, name="trainable")
        one = hypergrad.init(learner, params, episode, state_key)
        many = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_tasks, *jnp.shape(leaf))), one)
        return MetaState(params, optimizer.init(trained), many, jnp.zeros([], jnp.int32), key)

    def one_task(trained: Params, frozen: Params, state: Any, episode: Episode, key: jax.Array) -> tuple[Sums, Any]:
        task_key, adapt_key, before_key = jax.random.split(key, 3)
        (loss, aux), grads, state = hypergrad.value_and_grad(
            learner, trained, state, episode, key=task_key, frozen=frozen
        )
        episode = aux.get("episode", episode)  # an estimator that carries inner loops has episodes of its own
        metrics = _describe(loss, aux, episode)
        metrics |= {name: aux[name] for name in ("inner_loss", "inner_grad_norm", "solver_residual") if name in aux}
        if before and learner.problem is not None:
            full = jax.lax.stop_gradient(_tree.merge(trained, frozen))
            adapted = learner.adapt(full, episode.support, num_steps=0, key=adapt_key)
            value, told = learner.outer_loss(adapted, full, episode.query, key=before_key)
            metrics |= {f"{name}_before": metric for name, metric in _describe(value, told, episode).items()}
        if "state" in aux:
            metrics["state"] = aux["state"]
        # where, not a product: an all-padding task may be NaN and must still not count
        counts = jnp.any(_losses.kept_examples(episode.query))
        grads, metrics = jax.tree.map(lambda leaf: jnp.where(counts, leaf, jnp.zeros_like(leaf)), (grads, metrics))
        return Sums(counts.astype(jnp.float32), grads, metrics), state

    def sums(state: MetaState, episodes: Episode, axes: tuple[str, ...] = ()) -> tuple[Sums, Any]:
        num_tasks = _num_tasks(episodes)
        kept = {leaf.shape[0] for leaf in jax.tree.leaves(state.hypergrad_state)} - {num_tasks}
        if kept:
            raise ValueError(
                f"episodes must have as many tasks as the estimator keeps states, which init(num_tasks=) says: "
                f"got {num_tasks} tasks and {kept.pop()} states"
            )
        local, shared = _tree.vary(_tree.split(state.params, trainable, name="trainable"), axes)
        first = jax.lax.axis_index(axes) * num_tasks  # 0 without axes
        step_key = jax.random.fold_in(state.key, state.step)
        keys = jax.vmap(lambda task: jax.random.fold_in(step_key, task))(first + jnp.arange(num_tasks))
        size = _chunk_size(task_batching, num_tasks, episodes)
        return _chunks.sum_in_chunks(
            lambda task_state, episode, key: one_task(local, shared, task_state, episode, key),
            (state.hypergrad_state, episodes, keys), size, axes,
        )  # fmt: skip

    def apply(state: MetaState, total: Sums, hypergrad_state: Any) -> tuple[MetaState, dict[str, Any]]:
        trained, frozen = _tree.split(state.params, trainable, name="trainable")
        weight = total.weight
        grads, metrics = jax.tree.map(
            lambda leaf: leaf / jnp.maximum(weight, 1).astype(leaf.dtype), (total.grads, total.metrics)
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, trained, value=metrics["loss"])
        params = _tree.merge(optax.apply_updates(trained, updates), frozen)
        if "state" in metrics:
            params = _write(params, metrics.pop("state"), weight)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return MetaState(params, opt_state, hypergrad_state, state.step + 1, state.key), metrics

    def update(state: MetaState, episodes: Episode) -> tuple[MetaState, dict[str, Any]]:
        total, hypergrad_state = sums(state, episodes, axes)
        return apply(state, jax.lax.psum(total, axes), hypergrad_state)

    return OuterUpdate(init, update, axis_name, sums, apply)


def _write(params: Params, new: Any, weight: jax.Array) -> Params:
    """Puts the task mean of new values where `new` has leaves; where no task counted, nothing changes."""

    def pick(old: Any, value: Any) -> Any:
        return old if value is None else jnp.where(weight > 0, value, old).astype(old.dtype)

    return jax.tree.map(pick, params, new, is_leaf=lambda leaf: leaf is None)


def _describe(loss: jax.Array, aux: dict[str, Any], episode: Episode) -> dict[str, jax.Array]:
    metrics = {"loss": loss}
    if _losses.is_integer(episode.query.targets):
        metrics["accuracy"] = _losses.accuracy(aux["outputs"], episode.query).astype(loss.dtype)
    return metrics


def _num_tasks(episodes: Episode) -> int:
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(episodes)}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        found = ", ".join(sorted(map(str, sizes)))
        raise ValueError(f"episodes must carry one leading task axis on every leaf, got leading sizes {found}")
    (size,) = sizes
    return int(size)  # type: ignore[arg-type]


def choose_task_batching(backend: str, numbers_per_task: int) -> Literal["vmap", "scan"]:
    """What "auto" means, from `python -m experiments.benchmark batching`.

    Accelerators want all tasks at once. The CPU does too while a task is so small that the cost of starting an
    operation outweighs it; a task of images runs faster alone, in the cache.

    Args:
      backend: `jax.default_backend()`.
      numbers_per_task: numbers in the inputs of one task, support and query together.

    >>> choose_task_batching("cpu", 80 * 28 * 28), choose_task_batching("cpu", 20), choose_task_batching("gpu", 62720)
    ('scan', 'vmap', 'vmap')
    """
    return "scan" if backend == "cpu" and numbers_per_task > _SMALL_TASK else "vmap"


_SMALL_TASK = 4096


def _chunk_size(task_batching: TaskBatching, num_tasks: int, episodes: Episode) -> int:
    if task_batching == "auto":
        inputs = jax.tree.leaves((episodes.support.inputs, episodes.query.inputs))
        task_batching = choose_task_batching(jax.default_backend(), sum(leaf.size for leaf in inputs) // num_tasks)
    sizes: dict[Any, int] = {"vmap": num_tasks, "scan": 1}
    size: int = sizes.get(task_batching, task_batching)  # type: ignore[arg-type]
    if num_tasks % size:
        raise ValueError(f"task_batching must divide the number of tasks {num_tasks}, got a chunk size of {size}")
    return size
