"""The contract: every part of metajax is one of these NamedTuples of pure functions.

All functions are written for **one task, without a batch axis**. Batching over tasks, devices and hosts
is decided by `metajax.outer_update` and whatever wraps it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from metajax.core import _protocols

PyTree = Any
Array = jax.Array | np.ndarray
Params = Any
Loss = _protocols.Loss


class Examples(NamedTuple):
    """Labelled examples of one task.

    Attributes:
      inputs: pytree, leaves `[n, ...]`.
      targets: pytree, leaves `[n, ...]`; what they mean, and which of them count, is said by a `TaskType`.
      mask: `[n]` bool; False marks a padding example that must not influence any result.
      class_mask: `[max_ways]` bool or None; False marks a class that this task does not have. Its static
        length is the number of classes, which is how shapes stay known under `jit`.

    >>> import numpy as np
    >>> Examples(np.zeros([2, 3]), np.array([0, 1]), np.ones(2, bool)).inputs.shape
    (2, 3)
    """

    inputs: PyTree
    targets: PyTree
    mask: Array
    class_mask: Array | None = None


class Episode(NamedTuple):
    """A sampled task: the support set adapts the learner, the query set judges the result.

    A batch of episodes is the same structure with a leading task axis on every leaf.

    >>> import numpy as np
    >>> examples = Examples(np.zeros([2, 3]), np.array([0, 1]), np.ones(2, bool))
    >>> Episode(support=examples, query=examples).query.targets.tolist()
    [0, 1]
    """

    support: Examples
    query: Examples


class Model(NamedTuple):
    """A pure network; any library's module becomes one in a line (`metajax.models.from_nnx`).

    Attributes:
      init: `(key, inputs) -> params`.
      apply: `(params, inputs, **needed) -> outputs`, where `needed` are the keywords listed in `needs`.
      needs: which keywords `apply` takes, of `mask` (bool `[n]`, padding must not influence statistics),
        `key` (a PRNG key or None for deterministic), and `stats` (statistics of the support set or None
        to compute them from `inputs`; `apply` then returns `(outputs, stats)`).

    >>> import jax, jax.numpy as jnp
    >>> linear = Model(lambda key, x: jnp.zeros([x.shape[-1], 2]), lambda w, x: x @ w)
    >>> linear.apply(linear.init(jax.random.key(0), jnp.ones([4, 3])), jnp.ones([4, 3])).shape
    (4, 2)
    """

    init: _protocols.ModelInit
    apply: _protocols.ModelApply
    needs: tuple[str, ...] = ()


class Metric(NamedTuple):
    """How well outputs meet targets.

    Attributes:
      name: such as "accuracy".
      score: `(outputs, targets) -> [n]`, the score of each example.
      higher_is_better: False for an error.
      percent: whether scores are fractions in [0, 1], which reports show in percent.

    >>> Metric("accuracy", lambda outputs, targets: outputs == targets).higher_is_better
    True
    """

    name: str
    score: Callable[[Any, Any], jax.Array]
    higher_is_better: bool = True
    percent: bool = True


class TaskType(NamedTuple):
    """What a task is: how outputs are judged, and which targets count. `metajax.tasks` has the usual ones.

    Attributes:
      name: for messages; two task types of one name are the same kind of task.
      loss: `(outputs, targets) -> [n]`, what training minimises.
      metric: what evaluation reports.
      counts: `(targets) -> [n]` bool, False for an example none of whose targets counts (padding tokens).
      num_outputs: `(examples) -> int | None`, how many numbers a new head gives for an example of such a task, read
        from shapes; None where the model itself decides (a vocabulary, the ends of a span).
      heads: which heads of a pretrained model serve: "features", "tokens", "span", "score" (one number an example).
      classes: whether targets are labels of the task's classes, integers in `[0, ways)`.

    >>> import metajax
    >>> metajax.tasks.regression.metric.name
    'mse'
    """

    name: str
    loss: _protocols.Loss
    metric: Metric
    counts: Callable[[Any], jax.Array]
    num_outputs: Callable[[Examples], int | None]
    heads: tuple[str, ...] = ("features",)
    classes: bool = False


OWN = "one's own"  # the name of a task type whose meaning a user's loss alone knows


class InnerLosses(NamedTuple):
    """The inner losses of a task, each taken before its update.

    Attributes:
      values: `[num_steps]`; 0 for a step that does not count.
      valid: `[num_steps]` bool, False for a step whose data is all padding.

    >>> InnerLosses._fields
    ('values', 'valid')
    """

    values: jax.Array
    valid: jax.Array


class InnerProblem(NamedTuple):
    """What is optimised inside a task.

    The last three fields are optional. Each function below gets the keywords of the fields that are set, and no others:
    `context=` goes to `init`, `loss`, `carry` and `finalize`, `data=` to `loss`, `carry=` to `loss` and `finalize`.

    Attributes:
      init: `(meta_params, support, key) -> params`, the tree of fast weights.
      loss: `(params, meta_params, support, step, key) -> scalar`; with a carry `-> (scalar, carry)`. `key` is already
        folded with the step. The inner gradient is that of the scalar with respect to `params`.
      optimizer: `(meta_params) -> optax.GradientTransformation`; learned rates are read here.
      num_steps: how many inner steps one `adapt` takes.
      finalize: `(params, meta_params, support, key) -> adapted`; merges with what does not adapt.
      stream: `(meta_params, support, key) -> data`, leaves `[num_steps, ...]`: data of its own for each step; what is
        longer is cut. Where it returns `Examples`, with a mask `[num_steps]` or `[num_steps, n]`, padding is cleared,
        and a step whose mask is all False changes nothing: not the parameters, the optimizer, the carry or the
        objective. Any other tree has no padding: every step counts.
      context: `(meta_params, support, key) -> context`, any tree that is computed once a task and differentiated once,
        such as outputs of the frozen prefix of a model.
      carry: `(meta_params, support, key) -> carry`, the first carry: what goes from step to step beside parameters and
        optimizer state (a key-value cache, running statistics). It is differentiated.

    >>> InnerProblem._fields
    ('init', 'loss', 'optimizer', 'num_steps', 'finalize', 'stream', 'context', 'carry')
    """

    init: _protocols.InnerInit
    loss: _protocols.InnerLoss
    optimizer: _protocols.InnerRule
    num_steps: int
    finalize: _protocols.Finalize
    stream: _protocols.OfSupport | None = None
    context: _protocols.OfSupport | None = None
    carry: _protocols.InnerInit | None = None


class Aux(NamedTuple):
    """What describes an outer loss beside its value.

    Attributes:
      outputs: the predictions for the query set, None where there are none; the metric of the task type is taken of
        them.
      metrics: further numbers by name, averaged over tasks; estimators add theirs (`inner_loss` `[num_steps]`).
      state: values for meta-parameters that no gradient trains. They are averaged over the tasks that count, in their
        own precision; integers must be the same in all tasks and are copied exactly.
      collected: values that are gathered over tasks instead, such as keys for a queue.
      inner_losses: set by estimators where there is an inner loop.
      episode: the episode that all this speaks of, where it is not the one that was given (persistent estimators).

    >>> Aux(outputs=1.0).state
    ()
    """

    outputs: Any = None
    metrics: dict[str, jax.Array] = {}  # noqa: RUF012 - never written
    state: Any = ()
    collected: Any = ()
    inner_losses: InnerLosses | None = None
    episode: Any = None


class Collected(NamedTuple):
    """What `Aux.collected` held, over all tasks of a meta step.

    Attributes:
      values: leaves `[num_tasks, ...]`, in the order of the tasks, over all devices.
      counts: `[num_tasks]` bool, False for a task that does not count.

    >>> Collected._fields
    ('values', 'counts')
    """

    values: Any
    counts: jax.Array


Objective = Literal["query", "prequential", "both"]


class Learner(NamedTuple):
    """A model that adapts to a task.

    Attributes:
      init: `(key, example_inputs) -> meta_params`; `example_inputs` leaves are `[n, ...]`.
      adapt: `(meta_params, support, *, num_steps=None, key=None) -> adapted`.
      predict: `(adapted, inputs, *, mask=None, key=None) -> outputs`.
      outer_loss: `(adapted, meta_params, query, *, key=None) -> (scalar, Aux)`; unless the objective is "query" it also
        gets `inner_losses=`, an `InnerLosses`.
      problem: the inner problem, or None where adaptation takes one pass.
      task: the task type, None for `metajax.tasks.classification`.
      objective: what the outer loss is made of: "query", the query set after adaptation; "prequential", the inner
        losses, each taken before its update; or "both". A task counts where its objective has a kept term.
      update_state: `(meta_params, averaged, collected) -> meta_params`, writes meta-parameters that no gradient trains,
        from the averages of `Aux.state` and a `Collected` of `Aux.collected`; None where there are none.

    >>> 'problem' in Learner._fields
    True
    """

    init: _protocols.ModelInit
    adapt: _protocols.Adapt
    predict: _protocols.Predict
    outer_loss: _protocols.OuterLoss
    problem: InnerProblem | None = None
    task: TaskType | None = None
    objective: Objective = "query"
    update_state: _protocols.UpdateState | None = None


class Hypergrad(NamedTuple):
    """An estimator of the gradient of the outer loss with respect to the meta-parameters.

    Attributes:
      init: `(learner, meta_params, episode, key, *, frozen=None) -> state` of one task, `()` where none is kept.
      value_and_grad: `(learner, meta_params, state, episode, *, key, frozen=None) -> ((loss, aux), grads,
        state)`. Only `meta_params` is differentiated. Where `frozen` is given, the learner sees
        `merge(meta_params, frozen)`: two trees of one structure, each with None where the other has a leaf.

    >>> Hypergrad._fields
    ('init', 'value_and_grad')
    """

    init: _protocols.EstimatorInit
    value_and_grad: _protocols.ValueAndGrad


class MetaState(NamedTuple):
    """Everything that meta-training carries from step to step; a pytree, and what a checkpoint holds.

    Attributes:
      params: meta-parameters: what is trained, and what changes without a gradient (running statistics, an average of
        the network, a queue). None where a frozen base has a leaf.
      opt_state: state of the outer optax transform, over the trainable meta-parameters only.
      hypergrad_state: state of the estimator, leading task axis; `()` where it keeps none.
      step: int32 scalar, number of outer steps taken.
      key: PRNG key from which every step and task derives its own.

    >>> MetaState._fields
    ('params', 'opt_state', 'hypergrad_state', 'step', 'key')
    """

    params: Params
    opt_state: Any
    hypergrad_state: Any
    step: jax.Array
    key: jax.Array


class PartialSums(NamedTuple):
    """Weighted sums over tasks: all that has to be reduced over chunks and devices.

    Attributes:
      weight: how many tasks count.
      grads: sum of their hypergradients.
      metrics: sums of what describes them.
      inner: sums of the inner losses by step, and how many tasks have a valid one.
      state: sums of the floating-point values of `Aux.state`.

    >>> PartialSums._fields
    ('weight', 'grads', 'metrics', 'inner', 'state')
    """

    weight: Any
    grads: Any
    metrics: Any
    inner: Any = ()
    state: Any = ()


class PerTask(NamedTuple):
    """What a meta step keeps of each task; leaves have a leading task axis.

    Attributes:
      hypergrad_state: of the estimator.
      collected: of `Aux.collected`.
      state: the values of `Aux.state` that are no floating-point numbers.
      counts: whether the task counts.

    >>> PerTask._fields
    ('hypergrad_state', 'collected', 'state', 'counts')
    """

    hypergrad_state: Any
    collected: Any = ()
    state: Any = ()
    counts: Any = ()


class OuterUpdate(NamedTuple):
    """A compiled-friendly meta step, made by `metajax.outer_update`.

    Attributes:
      init: `(key, episode, params=None, *, frozen=None, num_tasks=1) -> MetaState`; one episode (no task axis) gives
        the shapes.
      update: `(state, episodes, frozen=None) -> (state, metrics)`; every leaf of `episodes` has a leading task axis.
        `frozen` is an argument that is never donated and never comes back.
      axis_name: the `pmap` or `shard_map` axis that `update` must run under, None for none.
      partial_sums: `(state, episodes, frozen, axes) -> (sums, per_task)`, the first half of `update`: hypergradients
        and metrics of these tasks, summed, and not yet over the `shard_map` axes along which the tasks are spread.
      apply_updates: `(state, sums, per_task, frozen) -> (state, metrics)`, the second half: the step of the optimizer.
        The two are what `metajax.parallel.shard` needs; None where `update` is no longer made of them.
      task: the task type of the learner, None where it is not known.
      objective: of the learner; it says which part of an episode makes a task count.

    >>> OuterUpdate._fields[-2:]
    ('task', 'objective')
    """

    init: _protocols.OuterInit
    update: _protocols.Update
    axis_name: str | None = None
    partial_sums: _protocols.MakePartialSums | None = None
    apply_updates: _protocols.ApplyUpdates | None = None
    task: TaskType | None = None
    objective: Objective = "query"

    def wrapped(self, init: _protocols.OuterInit, update: _protocols.Update) -> OuterUpdate:
        """The same, with other functions; `update` is no longer made of the two halves."""
        return self._replace(init=init, update=update, partial_sums=None, apply_updates=None)
