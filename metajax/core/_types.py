"""The contract: every part of metajax is one of these NamedTuples of pure functions.

All functions are written for **one task, without a batch axis**. Batching over tasks, devices and hosts
is decided by `metajax.outer_update` and whatever wraps it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

PyTree = Any
Array = jax.Array | np.ndarray
Params = Any
Loss = Callable[[Any, Any], jax.Array]


class Examples(NamedTuple):
    """Labelled examples of one task.

    Attributes:
      inputs: pytree, leaves `[n, ...]`.
      targets: pytree, leaves `[n, ...]`. Class labels are integers in `[0, ways)`; a negative integer
        target is left out of losses and metrics (padding tokens).
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

    init: Callable[..., Params]
    apply: Callable[..., Any]
    needs: tuple[str, ...] = ()


class InnerProblem(NamedTuple):
    """What is optimised inside a task.

    Attributes:
      init: `(meta_params, support, key) -> params`, the tree of fast weights.
      loss: `(params, meta_params, support, step, key) -> scalar`. `key` is already folded with the step.
      optimizer: `(meta_params) -> optax.GradientTransformation`; learned rates are read here.
      num_steps: how many inner steps one `adapt` takes.
      finish: `(params, meta_params, support, key) -> adapted`; merges with what does not adapt.

    >>> InnerProblem._fields
    ('init', 'loss', 'optimizer', 'num_steps', 'finish')
    """

    init: Callable[..., Params]
    loss: Callable[..., jax.Array]
    optimizer: Callable[..., Any]
    num_steps: int
    finish: Callable[..., Any]


class Learner(NamedTuple):
    """A model that adapts to a task.

    Attributes:
      init: `(key, example_inputs) -> meta_params`; `example_inputs` leaves are `[n, ...]`.
      adapt: `(meta_params, support, *, unlabelled=None, num_steps=None, key=None) -> adapted`.
      predict: `(adapted, inputs, *, mask=None, key=None) -> outputs`.
      outer_loss: `(adapted, meta_params, query, *, key=None) -> (scalar, aux)`. `aux` is a dict of what
        describes the prediction (`outputs`) and, under `state`, new values for meta-parameters that no
        gradient trains.
      problem: the inner problem, or None where adaptation takes one pass.

    >>> 'problem' in Learner._fields
    True
    """

    init: Callable[..., Params]
    adapt: Callable[..., Any]
    predict: Callable[..., Any]
    outer_loss: Callable[..., tuple[jax.Array, dict[str, Any]]]
    problem: InnerProblem | None = None


class Hypergrad(NamedTuple):
    """An estimator of the gradient of the outer loss with respect to the meta-parameters.

    Attributes:
      init: `(learner, meta_params, episode, key) -> state` of one task, `()` where none is kept.
      value_and_grad: `(learner, meta_params, state, episode, *, key, frozen=None) -> ((loss, aux), grads,
        state)`. Only `meta_params` is differentiated. Where `frozen` is given, the learner sees
        `merge(meta_params, frozen)`: two trees of one structure, each with None where the other has a leaf.

    >>> Hypergrad._fields
    ('init', 'value_and_grad')
    """

    init: Callable[..., Any]
    value_and_grad: Callable[..., Any]


class MetaState(NamedTuple):
    """Everything that meta-training carries from step to step; a pytree.

    Attributes:
      params: meta-parameters.
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


class Sums(NamedTuple):
    """Weighted sums over tasks: all that has to be reduced over chunks and devices.

    Attributes:
      weight: how many tasks count.
      grads: sum of their hypergradients.
      metrics: sums of what describes them.

    >>> Sums._fields
    ('weight', 'grads', 'metrics')
    """

    weight: Any
    grads: Any
    metrics: Any


class OuterUpdate(NamedTuple):
    """A compiled-friendly meta step, made by `metajax.outer_update`.

    Attributes:
      init: `(key, episode, params=None) -> MetaState`; one episode (no task axis) gives the shapes.
      update: `(state, episodes) -> (state, metrics)`; every leaf of `episodes` has a leading task axis.
      axis_name: the `pmap` or `shard_map` axis that `update` must run under, None for none.
      sums: `(state, episodes, axes) -> (sums, hypergrad_state)`, the first half of `update`: the hypergradients and
        metrics of these tasks, summed, and not yet over the `shard_map` axes along which the tasks are spread.
      apply: `(state, sums, hypergrad_state) -> (state, metrics)`, the second half: the step of the optimizer. The two
        are what `metajax.parallel.shard` needs; None where `update` is no longer made of them.

    >>> OuterUpdate._fields
    ('init', 'update', 'axis_name', 'sums', 'apply')
    """

    init: Callable[..., MetaState]
    update: Callable[..., tuple[MetaState, dict[str, Any]]]
    axis_name: str | None = None
    sums: Callable[..., tuple[Any, Any]] | None = None
    apply: Callable[..., tuple[MetaState, dict[str, Any]]] | None = None
