"""Bilevel problems beyond few-shot learning, as learners."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metajax.core import _inner, _losses, _validate
from metajax.core._types import (
    OWN,
    Aux,
    Examples,
    InnerLosses,
    InnerProblem,
    Learner,
    Metric,
    Objective,
    Params,
    TaskType,
)


def bilevel(
    inner_problem: InnerProblem,
    outer_loss: Callable[..., Any] | None = None,
    *,
    init: Callable[..., Params] | None = None,
    predict: Callable[..., Any] | None = None,
    task: TaskType | None = None,
    objective: Objective = "query",
) -> Learner:
    """Turns any inner problem into a learner: it can learn hyper-parameters, data weights or a loss.

    The inner loop learns from the support set of an episode, and the query set judges the result. The outer loop learns
    the meta-parameters, which the inner problem may use anywhere: in its start, its loss or its update rule.
    `metajax.outer_update` and every estimator take this learner like any other.

    Both sets are `Examples`, because the mask says whether a task counts; no other few-shot structure is required.
    `inputs` and `targets` may be any trees, None included, and the two losses may read them in any way. The losses
    decide what the mask means; in the support set, values in padding are zero. A single problem is a batch of one
    task: `jax.tree.map(lambda leaf: leaf[None], episode)`.

    With a stream, each inner step sees its own data. With the objective "prequential", every inner loss is computed
    before its update and is a term of the outer loss: the model is scored on data before it learns from them.

    Args:
      inner_problem: the inner optimisation; its `finalize` makes `adapted` from the last fast weights.
      outer_loss: `(adapted, meta_params, query, *, key=None) -> loss`, a scalar, or `(loss, metajax.Aux)`; the `Aux`
        describes the result. Unless the objective is "query", it also gets `inner_losses=`. None is allowed only with
        the objective "prequential": the loss is then the mean of the inner losses that count, and the query set is not
        read, so it may be the support set.
      init: `(key, example_inputs) -> meta_params`. None if `outer.init(key, episode, params=...)` gives them.
      predict: `(adapted, inputs) -> outputs`, for `learner.predict` and for `Aux.outputs`, from which `outer_update`
        computes the metric of the task type.
      task: the task type, such as `metajax.tasks.classification`. None uses the losses alone: every example that the
        mask keeps counts, and the loss is the only metric.
      objective: "query", "prequential" or "both", see `metajax.Learner`.

    Returns:
      A `Learner`. Its metrics are the ones that `outer_update` documents for any learner; a NaN inside the inner loop
      gives a NaN in `inner_loss` and in the loss.

    Raises:
      ValueError: an argument has the wrong type, there is no inner step, or there is no outer loss for an objective
        with a query; or (when used) meta-parameters are requested without `init`, or predictions without `predict`.

    Source: Franceschi et al. 2018, Bilevel Programming for Hyperparameter Optimization and Meta-Learning,
    arXiv:1806.04910; reweighting: Ren et al. 2018, arXiv:1803.09050, and Shu et al. 2019, arXiv:1902.07379; prequential
    losses: Dawid 1984, Statistical Theory: The Prequential Approach.

    >>> import jax, jax.numpy as jnp, optax, metajax
    >>> def ridge(weights, penalty, support, step, key):
    ...     errors = support.inputs @ weights - support.targets
    ...     return jnp.mean(errors**2) + jnp.exp(penalty) * jnp.sum(weights**2)
    >>> def validation(weights, penalty, query, *, key=None):
    ...     return jnp.mean((query.inputs @ weights - query.targets) ** 2)
    >>> problem = metajax.InnerProblem(
    ...     init=lambda penalty, support, key: jnp.zeros(3), loss=ridge, optimizer=lambda penalty: optax.sgd(0.1),
    ...     num_steps=20, finalize=lambda weights, penalty, support, key: weights)
    >>> learner = metajax.learners.bilevel(problem, validation, init=lambda key, inputs: jnp.zeros([]))
    >>> outer = metajax.outer_update(learner, optax.adam(0.1), hypergrad=metajax.hypergrad.mixed_mode())
    >>> data = metajax.Examples(jnp.eye(3), jnp.arange(3.0), jnp.ones(3, bool))
    >>> task = metajax.Episode(support=data, query=data)
    >>> state = outer.init(jax.random.key(0), task)
    >>> state, metrics = jax.jit(outer.update)(state, jax.tree.map(lambda leaf: leaf[None], task))
    >>> bool(state.params < 0)  # without noise, less penalty is better
    True
    """
    _validate.instance("inner_problem", inner_problem, InnerProblem)
    _validate.positive_int("num_steps", inner_problem.num_steps)
    _validate.one_of("objective", objective, typing.get_args(Objective))
    if outer_loss is None and objective == "prequential":
        outer_loss = _mean_inner_loss
    if outer_loss is None:
        raise ValueError(f"outer_loss must be a function but for objective 'prequential', got None for {objective!r}")
    for name, part in (("outer_loss", outer_loss), ("init", init), ("predict", predict)):
        if not callable(part) and (part is not None or name == "outer_loss"):
            raise ValueError(f"{name} must be a function{'' if name == 'outer_loss' else ' or None'}, got {part!r}")

    def first(key: Any, example_inputs: Any) -> Params:
        if init is None:
            raise ValueError("init must be given to bilevel(), or params to the init of outer_update, got neither")
        return init(key, example_inputs)

    def outputs(adapted: Any, inputs: Any, *, mask: Any = None, key: Any = None) -> Any:
        del mask, key
        if predict is None:
            raise ValueError("predict must be given to bilevel() for predictions, got None")
        return predict(adapted, inputs)

    def judge(
        adapted: Any, meta_params: Params, query: Examples, *, key: Any = None, **inner_losses: Any
    ) -> tuple[jax.Array, Aux]:
        assert outer_loss is not None
        found = outer_loss(adapted, meta_params, query, key=key, **inner_losses)
        loss, aux = found if isinstance(found, tuple) else (found, Aux())
        if aux.outputs is None and predict is not None and objective != "prequential":
            aux = aux._replace(outputs=predict(adapted, query.inputs))
        return loss, aux

    task = _ANY if task is None else task
    adapt = _inner.adaptation(inner_problem)
    return _validate.learner(Learner(first, adapt, outputs, judge, inner_problem, task, objective))


def _unknown(outputs: Any, targets: Any) -> jax.Array:
    raise ValueError("task must be given to bilevel() where outputs are judged by it, got None")


# only the losses know what the targets mean
_ANY = TaskType(
    OWN, _unknown, Metric("loss", _unknown, higher_is_better=False, percent=False),
    lambda targets: jnp.ones(jax.tree.leaves(targets)[0].shape[:1], bool), lambda examples: None,
)  # fmt: skip


def _mean_inner_loss(
    adapted: Any, meta_params: Params, query: Examples, *, key: Any = None, inner_losses: InnerLosses
) -> jax.Array:
    """Computes the mean of the inner losses that count."""
    return _losses.mean_over(inner_losses.values, inner_losses.valid)
