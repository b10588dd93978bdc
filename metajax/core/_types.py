"""The contract: every part of metajax is one of these NamedTuples of pure functions.

All functions are written for **one task, without a batch axis**. `metajax.outer_update` and its wrappers batch over
tasks, devices and hosts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

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
      targets: pytree, leaves `[n, ...]`; a `TaskType` defines what they mean and which of them count.
      mask: `[n]` bool; False marks a padding example that must not influence any result.
      class_mask: `[max_ways]` bool or None; False marks a class that this task does not have. Its static
        length is the number of classes, so that shapes are known under `jit`.

    >>> import numpy as np
    >>> Examples(np.zeros([2, 3]), np.array([0, 1]), np.ones(2, bool)).inputs.shape
    (2, 3)
    """

    inputs: PyTree
    targets: PyTree
    mask: Array
    class_mask: Array | None = None


class Episode(NamedTuple):
    """A sampled task: the learner adapts to the support set and is evaluated on the query set.

    A batch of episodes is the same structure with a leading task axis on every leaf.

    >>> import numpy as np
    >>> examples = Examples(np.zeros([2, 3]), np.array([0, 1]), np.ones(2, bool))
    >>> Episode(support=examples, query=examples).query.targets.tolist()
    [0, 1]
    """

    support: Examples
    query: Examples


class Model(NamedTuple):
    """A network as pure functions; `metajax.models.from_nnx`, for example, converts a module of another library.

    Attributes:
      init: `(key, inputs) -> params`.
      apply: `(params, inputs, **needed) -> outputs`, where `needed` are the keywords listed in `needs`.
      needs: the keywords that `apply` takes, out of `mask` (bool `[n]`, padding must not influence statistics),
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


# annotation of an argument: a model whose outputs are features, not the outputs of a task
Features = Annotated[Model, "features"]
Dtype = Annotated[Any, "dtype"]


class Metric(NamedTuple):
    """A measure of how well outputs match targets.

    Attributes:
      name: name of the metric, such as "accuracy".
      score: `(outputs, targets) -> [n]`, the score of each example.
      higher_is_better: False for an error.
      percent: whether scores are fractions in [0, 1]; reports show these in percent.

    >>> Metric("accuracy", lambda outputs, targets: outputs == targets).higher_is_better
    True
    """

    name: str
    score: Callable[[Any, Any], jax.Array]
    higher_is_better: bool = True
    percent: bool = True


class TaskType(NamedTuple):
    """The type of a task: how outputs are scored, and which targets count. `metajax.tasks` has the usual types.

    Attributes:
      name: name in messages; two task types with the same name are the same kind of task.
      loss: `(outputs, targets) -> [n]`, the loss that training minimises.
      metric: the metric that evaluation reports.
      counts: `(targets) -> [n]` bool, False for an example without a target that counts (padding tokens).
      num_outputs: `(examples) -> int | None`, the number of outputs per example of a new head for this task, read
        from shapes; None if the model decides (a vocabulary, the ends of a span).
      heads: usable heads of a pretrained model: "features", "tokens", "span", "score" (one number per example).
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


OWN = "one's own"  # the name of a task type that is defined only by a user's loss


class InnerLosses(NamedTuple):
    """The inner losses of a task, each computed before its update.

    Attributes:
      values: `[num_steps]`; 0 for a step that does not count.
      valid: `[num_steps]` bool, False for a step whose data is all padding.

    >>> InnerLosses._fields
    ('values', 'valid')
    """

    values: jax.Array
    valid: jax.Array


class InnerProblem(NamedTuple):
    """The optimisation problem inside a task.

    The last three fields are optional. Each function below receives the keywords of the fields that are set:
    `init`, `loss`, `carry` and `finalize` receive `context=`, `loss` receives `data=`, and `loss` and `finalize`
    receive `carry=`.

    Attributes:
      init: `(meta_params, support, key) -> params`, the tree of fast weights.
      loss: `(params, meta_params, support, step, key) -> scalar`; with a carry `-> (scalar, carry)`. `key` is already
        folded with the step. The inner gradient is the gradient of the scalar with respect to `params`.
      optimizer: `(meta_params) -> optax.GradientTransformation`; learned rates are read here.
      num_steps: number of inner steps of one `adapt`.
      finalize: `(params, meta_params, support, key) -> adapted`; merges the fast weights with the weights that do not
        adapt.
      stream: `(meta_params, support, key) -> data`, leaves `[num_steps, ...]`: separate data for each step; longer
        leaves are cut. If it returns `Examples`, with a mask `[num_steps]` or `[num_steps, n]`, padding is cleared,
        and a step whose mask is all False does not change the parameters, the optimizer state, the carry or the
        objective. Any other tree has no padding: every step counts.
      context: `(meta_params, support, key) -> context`, any tree that is computed once and differentiated once per
        task, such as outputs of the frozen prefix of a model.
      carry: `(meta_params, support, key) -> carry`, the initial carry: values that are passed from step to step in
        addition to parameters and optimizer state (a key-value cache, running statistics). It is differentiated.

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
    """Auxiliary outputs of an outer loss.

    Attributes:
      outputs: the predictions for the query set, None if there are none; the metric of the task type is computed from
        them.
      metrics: further numbers by name, averaged over tasks; estimators add their own (`inner_loss` `[num_steps]`).
      state: values for meta-parameters that no gradient trains. They are averaged over the tasks that count, in their
        own precision; integers must be the same in all tasks and are copied exactly.
      collected: values that are gathered over tasks instead of averaged, such as keys for a queue.
      inner_losses: set by estimators if there is an inner loop.
      episode: the episode that these outputs describe, if it is not the given episode (persistent estimators).

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
    """The values of `Aux.collected` of all tasks of a meta step.

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
      problem: the inner problem, or None if adaptation takes one pass.
      task: the task type, None for `metajax.tasks.classification`.
      objective: the terms of the outer loss: "query", the query set after adaptation; "prequential", the inner
        losses, each computed before its update; or "both". A task counts if its objective has a kept term.
      update_state: `(meta_params, averaged, collected) -> meta_params`, writes meta-parameters that no gradient trains,
        from the averages of `Aux.state` and a `Collected` of `Aux.collected`; None if there are none.
      trainable: path regex of the meta-parameters that a gradient trains, None for all of them.

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
    trainable: str | None = None


class Hypergrad(NamedTuple):
    """An estimator of the gradient of the outer loss with respect to the meta-parameters.

    Attributes:
      init: `(learner, meta_params, episode, key, *, frozen=None) -> state` of one task, `()` if it keeps none.
      value_and_grad: `(learner, meta_params, state, episode, *, key, frozen=None) -> ((loss, aux), grads,
        state)`. Only `meta_params` is differentiated. If `frozen` is given, the learner receives
        `merge(meta_params, frozen)`: two trees of one structure, each with None where the other has a leaf.

    >>> Hypergrad._fields
    ('init', 'value_and_grad')
    """

    init: _protocols.EstimatorInit
    value_and_grad: _protocols.ValueAndGrad


class MetaState(NamedTuple):
    """The state of meta-training, passed from step to step: a pytree, and the content of a checkpoint.

    Attributes:
      params: meta-parameters: trained values, and values that change without a gradient (running statistics, an
        average of the network, a queue). None where a frozen base has a leaf.
      opt_state: state of the outer optax transform, for the trainable meta-parameters only.
      hypergrad_state: state of the estimator, leading task axis; `()` if it keeps none.
      step: int32 scalar, number of outer steps taken.
      key: PRNG key from which the keys of all steps and tasks are derived.

    >>> MetaState._fields
    ('params', 'opt_state', 'hypergrad_state', 'step', 'key')
    """

    params: Params
    opt_state: Any
    hypergrad_state: Any
    step: jax.Array
    key: jax.Array


class PartialSums(NamedTuple):
    """Weighted sums over tasks: the values that are reduced over chunks and devices.

    Attributes:
      weight: number of tasks that count.
      grads: sum of their hypergradients.
      metrics: sums of their metrics.
      inner: sums of the inner losses of each step, and the number of tasks for which the step is valid.
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
    """Values that a meta step keeps for each task; leaves have a leading task axis.

    Attributes:
      hypergrad_state: state of the estimator.
      collected: values of `Aux.collected`.
      state: the values of `Aux.state` that are not floating-point numbers.
      counts: whether the task counts.

    >>> PerTask._fields
    ('hypergrad_state', 'collected', 'state', 'counts')
    """

    hypergrad_state: Any
    collected: Any = ()
    state: Any = ()
    counts: Any = ()


class OuterUpdate(NamedTuple):
    """A meta step that can be compiled, returned by `metajax.outer_update`.

    Attributes:
      init: `(key, episode, params=None, *, frozen=None, num_tasks=1) -> MetaState`; one episode (no task axis) provides
        the shapes.
      update: `(state, episodes, frozen=None) -> (state, metrics)`; every leaf of `episodes` has a leading task axis.
        `frozen` is an argument that is never donated and never returned.
      axis_name: the `pmap` or `shard_map` axis that `update` must run under, None for none.
      partial_sums: `(state, episodes, frozen, axes) -> (sums, per_task)`, the first half of `update`: sums of the
        hypergradients and metrics of these tasks, not yet summed over the `shard_map` axes that split the tasks.
      apply_updates: `(state, sums, per_task, frozen) -> (state, metrics)`, the second half: the step of the optimizer.
        `metajax.parallel.shard` needs both halves; they are None if `update` does not consist of them.
      task: the task type of the learner, None if it is not known.
      objective: objective of the learner; it determines which part of an episode makes a task count.

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
        """Returns a copy with other functions; `update` then no longer consists of the two halves."""
        return self._replace(init=init, update=update, partial_sums=None, apply_updates=None)
