"""The meta step: averages the hypergradients of a batch of tasks and applies an optax transform."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from metajax import tasks
from metajax.core import _chunks, _losses, _tree, _validate
from metajax.core._objective import outer_objective
from metajax.core._types import (
    Aux,
    Collected,
    Episode,
    Hypergrad,
    Learner,
    MetaState,
    OuterUpdate,
    Params,
    PartialSums,
    PerTask,
    TaskType,
)

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

    `update` composes with `jit`, `vmap`, `pmap`, `shard_map` and `scan`. The hypergradient is the mean over the tasks
    that count. A task counts if its objective has a term that is not padding, in the query set or among the inner
    losses. If no task counts, the gradient of the parameters is zero and nothing else changes.

    There are three kinds of meta-parameters: trained ones; untrained ones in the state, which are constant or written
    by `learner.update_state`; and a frozen base, which is not part of the state:

        params, frozen = metajax.core.split(params, "lora")
        state = outer.init(key, episode, params, frozen=frozen)
        state, metrics = outer.update(state, episodes, frozen)

    Args:
      learner: the learner.
      optimizer: any optax transform of the averaged hypergradient. A transform that takes a `value` gets the loss. Use
        optax for gradient clipping and for steps that are not finite: `optax.chain(optax.clip_by_global_norm(10.0),
        ...)`, `optax.apply_if_finite(...)`.
      hypergrad: the hypergradient estimator.
      trainable: path regex or predicate that selects the trained meta-parameters of the state. The others get no
        gradient and no optimizer state, may hold integers, and are never copied per task. None uses
        `learner.trainable`.
      task_batching: how the tasks of one call are run: "vmap", "scan" (one after the other), a chunk size (a scan
        over chunks under vmap), or "auto" (see `choose_task_batching`). All give the same result up to rounding.
      axis_name: name of the `pmap` or `shard_map` axis over which tasks are spread; gradients and metrics are
        reduced over it. Every device must hold the same number of tasks.
      before: whether to also compute the metrics before adaptation, with one more forward pass. They do not exist
        without an inner problem or for objectives of inner losses only.

    Returns:
      An `OuterUpdate`. Compile it with `jit`, or spread it over a mesh with `metajax.parallel.shard`.
      `update` returns metrics, each a scalar mean over tasks: `loss` and, if the learner returns outputs, the metric of
      the task type (`accuracy`, `mse`), on the query set after adaptation; both also with `_before`; `inner_loss`
      `[num_steps]`, where each value is a mean over the tasks in which the step counts; the other values of
      `Aux.metrics`; and `grad_norm` of the averaged hypergradient.

    Raises:
      ValueError: an argument has another type, the learner lacks a part, `task_batching` is unknown, a chunk size does
        not divide the tasks, `trainable` selects nothing, the episode in `init` has a task axis, the leaves of
        episodes in `update` have different leading axes (or none, or no task), a label is not a class of the task (in
        `init`), the frozen base does not match the state, a learner without `update_state` returns values for the
        state, or the number of tasks differs from the `num_tasks` for which `init` made the states of a persistent
        estimator.

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
    _validate.learner(learner, ("adapt", "outer_loss"))
    _validate.instance("optimizer", optimizer, optax.GradientTransformation)
    _validate.instance("hypergrad", hypergrad, Hypergrad)
    if isinstance(task_batching, str):
        _validate.one_of("task_batching", task_batching, ("auto", "vmap", "scan"))
    else:
        _validate.positive_int("task_batching", task_batching)
    optimizer = optax.with_extra_args_support(optimizer)
    axes = () if axis_name is None else (axis_name,)
    trainable = learner.trainable if trainable is None else trainable
    task_type = tasks.of(learner)
    before = before and learner.problem is not None and learner.objective != "prequential"

    def init(
        key: jax.Array, episode: Episode, params: Params = None, *, frozen: Params = None, num_tasks: int = 1
    ) -> MetaState:
        _check_one(episode, task_type.classes)
        params_key, state_key, key = jax.random.split(key, 3)
        if params is None:
            params = _first_params(learner, params_key, episode.support.inputs, frozen)
        _tree.merge(params, frozen)
        # copies the given parameters, because a jitted update may donate its state
        params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.result_type(leaf)), params)
        trained, untrained = _tree.split(params, trainable, name="trainable")
        one = hypergrad.init(learner, trained, episode, state_key, frozen=_shared(untrained, frozen))
        many = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_tasks, *jnp.shape(leaf))), one)
        return _tree.strong(MetaState(params, optimizer.init(trained), many, jnp.zeros([], jnp.int32), key))

    def one_task(
        trained: Params, shared: Params, state: Any, episode: Episode, key: jax.Array
    ) -> tuple[PartialSums, PerTask]:
        task_key, before_key = jax.random.split(key)
        (loss, aux), grads, state = hypergrad.value_and_grad(
            learner, trained, state, episode, key=task_key, frozen=shared
        )
        episode = episode if aux.episode is None else aux.episode
        metrics = _describe(loss, aux, episode, task_type)
        metrics |= {name: value for name, value in aux.metrics.items() if name != "inner_loss"}
        if before:
            full = jax.lax.stop_gradient(_tree.fill(trained, shared))
            value, found = outer_objective(learner, full, episode, key=before_key, num_steps=0)
            metrics |= {
                f"{name}_before": metric for name, metric in _describe(value, found, episode, task_type).items()
            }
        if learner.update_state is None and jax.tree.leaves((aux.state, aux.collected)):
            raise ValueError("learner.update_state must be given where outer_loss gives Aux.state or Aux.collected")
        counts = _counts(learner, episode, aux)
        inner: Any = ()
        if aux.inner_losses is not None:
            values, valid = aux.inner_losses
            inner = (jnp.where(valid, values, 0), valid.astype(values.dtype))
        averaged, exact = _tree.split_floats(aux.state)
        # `where` and not a product: a task of only padding may be NaN and must not count
        summed = jax.tree.map(
            lambda leaf: jnp.where(counts, leaf, jnp.zeros_like(leaf)), (grads, metrics, inner, averaged)
        )
        return PartialSums(counts.astype(jnp.float32), *summed), PerTask(state, aux.collected, exact, counts)

    def partial_sums(
        state: MetaState, episodes: Episode, frozen: Params = None, axes: tuple[str, ...] = ()
    ) -> tuple[PartialSums, PerTask]:
        num_tasks = _num_tasks(episodes)
        kept = {leaf.shape[0] for leaf in jax.tree.leaves(state.hypergrad_state)} - {num_tasks}
        if kept:
            raise ValueError(
                f"episodes must have as many tasks as the estimator keeps states, which init(num_tasks=) says: "
                f"got {num_tasks} tasks and {kept.pop()} states"
            )
        _check_complete(learner, _tree.merge(state.params, frozen), episodes)
        trained, untrained = _tree.split(state.params, trainable, name="trainable")
        local, shared = _tree.vary((trained, _shared(untrained, frozen)), axes)
        first = jax.lax.axis_index(axes) * num_tasks  # 0 without axes
        step_key = jax.random.fold_in(state.key, state.step)
        keys = jax.vmap(lambda task: jax.random.fold_in(step_key, task))(first + jnp.arange(num_tasks))
        size = _chunk_size(task_batching, num_tasks, episodes)
        return _chunks.sum_in_chunks(
            lambda task_state, episode, key: one_task(local, shared, task_state, episode, key),
            (state.hypergrad_state, episodes, keys), size, axes,
        )  # fmt: skip

    def apply_updates(
        state: MetaState, total: PartialSums, per_task: PerTask, frozen: Params = None
    ) -> tuple[MetaState, dict[str, Any]]:
        trained, untrained = _tree.split(state.params, trainable, name="trainable")
        weight = total.weight
        grads, metrics, averaged = jax.tree.map(
            lambda leaf: leaf / jnp.maximum(weight, 1).astype(leaf.dtype), (total.grads, total.metrics, total.state)
        )
        if total.inner:
            values, counts = total.inner
            metrics["inner_loss"] = values / jnp.maximum(counts, 1)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained, value=metrics["loss"])
        params = _tree.fill(optax.apply_updates(trained, updates), untrained)
        if learner.update_state is not None:
            averaged = _tree.fill(averaged, _agreed(per_task))
            full = _tree.merge(params, frozen)
            new = learner.update_state(full, averaged, Collected(per_task.collected, per_task.counts))
            params = _written(params, full, new, weight)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return MetaState(params, opt_state, per_task.hypergrad_state, state.step + 1, state.key), metrics

    def update(state: MetaState, episodes: Episode, frozen: Params = None) -> tuple[MetaState, dict[str, Any]]:
        total, per_task = partial_sums(state, episodes, frozen, axes)
        if axes:
            total = jax.lax.psum(total, axes)
            gathered = jax.tree.map(lambda leaf: _gather(leaf, axes), per_task._replace(hypergrad_state=()))
            per_task = gathered._replace(hypergrad_state=per_task.hypergrad_state)
        return apply_updates(state, total, per_task, frozen)

    return OuterUpdate(init, update, axis_name, partial_sums, apply_updates, task_type, learner.objective)


def _shared(untrained: Params, frozen: Params) -> Params:
    """Returns the meta-parameters that are not trained, including the frozen base."""
    return untrained if frozen is None else _tree.fill(untrained, frozen)


def _first_params(learner: Learner, key: jax.Array, inputs: Any, frozen: Params) -> Params:
    """Initializes the meta-parameters of a learner, except the leaves that are in the frozen base."""
    if frozen is None:
        return learner.init(key, inputs)
    places = jax.tree.map(lambda _: None, jax.eval_shape(learner.init, key, inputs))
    _tree.merge(places, frozen)  # raises for another structure
    return jax.jit(lambda key, inputs: _tree.without(learner.init(key, inputs), frozen))(key, inputs)


def _check_one(episode: Episode, classes: bool) -> None:
    """Raises a ValueError for a batch instead of one episode, and for labels that are not a class."""
    if jnp.ndim(episode.query.mask) != 1:  # the mask of a support set may be [steps, n]
        raise ValueError(
            "episode must be one task, without a task axis, whose query.mask is [n], got shape "
            f"{list(jnp.shape(episode.query.mask))}"
        )
    if classes:
        for part in episode:
            _losses.check_labels(part)


def _check_complete(learner: Learner, full: Params, episodes: Episode) -> None:
    """Raises a ValueError for gaps that are not in `learner.init`: a frozen base that was not passed."""
    gaps = _tree.gaps(full)
    if not gaps:
        return
    inputs = jax.tree.map(lambda leaf: leaf[0], episodes.support.inputs)
    known = _tree.gaps(jax.eval_shape(learner.init, jax.random.key(0), inputs))
    missing = [path for path in gaps if path not in known]
    if missing:
        raise ValueError(
            f"frozen must have a leaf where the state has none, got none for {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        )


def _counts(learner: Learner, episode: Episode, aux: Aux) -> jax.Array:
    """Returns whether the objective of a task has a term that is not padding."""
    counts = jnp.zeros([], bool)
    if learner.objective != "prequential":
        counts |= jnp.any(_losses.kept_examples(tasks.of(learner), episode.query))
    if learner.objective != "query" and aux.inner_losses is not None:
        counts |= jnp.any(aux.inner_losses.valid)
    return counts


def _agreed(per_task: PerTask) -> Any:
    """Returns the values that are not floating-point, from the first task that counts.

    Raises:
      ValueError: the values differ between tasks (not checked while tracing).
    """
    first = jnp.argmax(per_task.counts)

    def agree(leaf: Any) -> Any:
        value = leaf[first]
        if not isinstance(leaf, jax.core.Tracer):
            other = leaf[per_task.counts]
            if not bool(jnp.all(other == value)):
                raise ValueError(f"integers of Aux.state must be the same in all tasks, got {other}")
        return value

    return jax.tree.map(agree, per_task.state)


def _gather(leaf: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Concatenates the values of all devices along the leading axis, in the order of the tasks."""
    count, size = leaf.shape[0], jax.lax.axis_size(axes)
    numbers = leaf.astype(jnp.int8) if leaf.dtype == bool else leaf
    # a sum of zero-padded values, whose result JAX knows to be the same on all devices
    whole = jnp.zeros((size * count, *leaf.shape[1:]), numbers.dtype)
    placed = jax.lax.dynamic_update_slice_in_dim(_tree.vary(whole, axes), numbers, jax.lax.axis_index(axes) * count, 0)
    return jax.lax.psum(placed, axes).astype(leaf.dtype)


def _written(params: Params, full: Params, new: Params, weight: jax.Array) -> Params:
    """Returns the parameters of the state with the changes of `update_state`, or unchanged if no task counts."""
    structures = [str(jax.tree.structure(tree)) for tree in (new, full)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"update_state must return meta-parameters of the structure that it gets, got {structures[0]} for "
            f"{structures[1]}"
        )

    def write(path: str, old: Any, own: Any, value: Any) -> Any:
        if value is own:
            return old
        if old is None or jnp.shape(value) != jnp.shape(old):
            what = "is frozen" if old is None else f"has shape {jnp.shape(old)}, got {jnp.shape(value)}"
            raise ValueError(f"update_state must not change {path}, which {what}")
        return jnp.where(weight > 0, value, old).astype(old.dtype)

    return _tree.map_with_path(write, params, full, new)


def _describe(loss: jax.Array, aux: Aux, episode: Episode, task: TaskType) -> dict[str, jax.Array]:
    metrics = {"loss": loss}
    if aux.outputs is not None and task.metric.name != "loss":
        scores = task.metric.score(aux.outputs, _losses.clear_padding(episode.query.targets, episode.query.mask))
        kept = _losses.kept_examples(task, episode.query)
        _losses.check_loss(scores, len(kept), f"metric {task.metric.name!r}: score")
        metrics[task.metric.name] = _losses.mean_over(scores, kept).astype(loss.dtype)
    return metrics


def _num_tasks(episodes: Episode) -> int:
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(episodes)}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        found = ", ".join(sorted(map(str, sizes)))
        raise ValueError(f"episodes must carry one leading task axis on every leaf, got leading sizes {found}")
    if episodes.query.mask.ndim != 2:
        raise ValueError(
            "episodes must carry one leading task axis, so that query.mask is [tasks, n], got shape "
            f"{list(episodes.query.mask.shape)}"
        )
    (size,) = sizes
    return int(size)  # type: ignore[arg-type]


def choose_task_batching(backend: str, numbers_per_task: int) -> Literal["vmap", "scan"]:
    """Returns the task batching for "auto", as measured by `python -m experiments.benchmark batching`.

    Accelerators are fastest with all tasks at once. So is the CPU for tasks so small that the cost of starting an
    operation dominates. Larger tasks, such as images, run faster one at a time in the cache.

    Args:
      backend: `jax.default_backend()`.
      numbers_per_task: number of array elements in the inputs of one task, support and query together.

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
