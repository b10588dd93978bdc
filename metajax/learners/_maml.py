"""Model-agnostic meta-learning: the meta-parameters are the starting point of an inner loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metajax import tasks
from metajax.core import _inner, _keys, _losses, _tree, _validate
from metajax.core._types import Examples, InnerProblem, Learner, Loss, Model, Params, TaskType
from metajax.learners._forward import Adapted, forward, masked, query_loss, support_stats


def maml(
    model: Model,
    inner: optax.GradientTransformation,
    num_steps: int = 1,
    *,
    adapts: _tree.Where = None,
    proximal: float = 0.0,
    task: TaskType | None = None,
    loss: Loss | None = None,
) -> Learner:
    """MAML (Finn et al. 2017): the meta-parameters are those of `model`, and an inner loop adapts them.

    FOMAML is this learner with the estimator `first_order()`. ANIL (Raghu et al. 2020) is `adapts="head"`.
    If the normalisation of the model uses support statistics, they are computed from the support set under the adapted
    parameters, so that predictions are inductive.

    Args:
      model: a network with one output for each class (or the regression targets).
      inner: the inner update rule, any optax transform. The loss is a mean over support examples. Multiply a rate
        taken from code that sums the loss over classes by the number of classes.
      num_steps: inner steps, at least 1. `adapt(..., num_steps=)` takes another number, 0 included.
      adapts: path regex or predicate that picks the parameters that adapt; None adapts all.
      proximal: weight of `0.5 * |params - meta_params|^2` in the inner loss (Rajeswaran et al. 2019).
      task: the task type, None for classification.
      loss: `(outputs, targets) -> [n]`, instead of the loss of the task type; see `metajax.tasks.resolve`.

    Returns:
      A `Learner`. If every support example is masked, the inner gradient is zero and nothing adapts. A NaN in a kept
      example gives a NaN loss; a NaN in padding has no effect.

    Raises:
      ValueError: an argument has the wrong type, `num_steps` is below 1, `proximal` is negative, or (at trace time)
        `adapts` picks nothing, or a task has more classes than the model has outputs.

    Source: Finn, Abbeel and Levine 2017, arXiv:1703.03400.

    >>> import jax, jax.numpy as jnp, optax, metajax
    >>> learner = metajax.learners.maml(metajax.models.mlp(outputs=2), inner=optax.sgd(0.1), num_steps=3)
    >>> support = metajax.Examples(jnp.eye(4), jnp.array([0, 0, 1, 1]), jnp.ones(4, bool))
    >>> params = learner.init(jax.random.key(0), support.inputs)
    >>> adapted = learner.adapt(params, support)
    >>> learner.predict(adapted, support.inputs).shape
    (4, 2)
    """
    _validate.instance("inner", inner, optax.GradientTransformation)
    resolved = tasks.resolve(task, loss)
    return gradient_learner(
        model, lambda meta_params: inner, num_steps, adapts=adapts, proximal=proximal, task=resolved
    )


def reptile(
    model: Model,
    inner: optax.GradientTransformation,
    num_steps: int = 5,
    *,
    batch_size: int | None = None,
    adapts: _tree.Where = None,
    task: TaskType | None = None,
    loss: Loss | None = None,
) -> Learner:
    """Reptile (Nichol et al. 2018): an inner loop over minibatches of the support set.

    Meta-train it with the estimator `displacement()`, and with more shots than in evaluation.

    Args:
      model: a network with one output for each class (or the regression targets).
      inner: the inner update rule, any optax transform; the paper uses Adam without momentum (`b1=0`).
      num_steps: inner steps, at least 1.
      batch_size: number of support examples in each inner step, drawn anew in each step without replacement from the
        kept ones. None uses the whole set, and so does a call without a key.
      adapts: path regex or predicate that picks the parameters that adapt; None adapts all.
      task: the task type, None for classification.
      loss: `(outputs, targets) -> [n]`, instead of the loss of the task type; see `metajax.tasks.resolve`.

    Raises:
      ValueError: an argument has the wrong type, or `num_steps` or `batch_size` is below 1.

    Source: Nichol, Achiam and Schulman 2018, arXiv:1803.02999.

    >>> import optax, metajax
    >>> learner = metajax.learners.reptile(metajax.models.mlp(outputs=2), optax.adam(1e-3, b1=0.0), batch_size=10)
    >>> learner.problem.num_steps
    5
    """
    if batch_size is not None:
        _validate.positive_int("batch_size", batch_size)
    _validate.instance("inner", inner, optax.GradientTransformation)
    resolved = tasks.resolve(task, loss)
    return gradient_learner(
        model, lambda meta_params: inner, num_steps, adapts=adapts, task=resolved, batch_size=batch_size
    )


def gradient_learner(
    model: Model,
    rule: Callable[[Params], optax.GradientTransformation],
    num_steps: int,
    *,
    adapts: _tree.Where,
    task: TaskType,
    proximal: float = 0.0,
    batch_size: int | None = None,
    network: Callable[[Params], Params] = lambda meta_params: meta_params,
    init: Callable[..., Params] | None = None,
) -> Learner:
    """A learner whose inner loop updates parameters of `model`, starting from those that the meta-parameters give.

    Args:
      model, num_steps, adapts, task, proximal, batch_size: as for `maml` and `reptile`.
      rule: `(meta_params) -> optax transform`, the inner update rule.
      network: `(meta_params) -> params` of the model, where the loop starts.
      init: the `init` of the learner; None uses the one of the model.
    """
    _validate.instance("model", model, Model)
    _validate.positive_int("num_steps", num_steps)
    _validate.non_negative_float("proximal", proximal)

    def fast_weights(meta_params: Params) -> Params:
        return _tree.split(network(meta_params), adapts, name="adapts")[0]

    def whole(params: Params, meta_params: Params) -> Params:
        return params if adapts is None else _tree.fill(params, network(meta_params))

    def problem_init(meta_params: Params, support: Examples, key: Any) -> Params:
        del support, key
        return fast_weights(meta_params)

    def inner_loss(params: Params, meta_params: Params, support: Examples, step: Any, key: Any) -> jax.Array:
        del step
        batch_key, model_key = _keys.split(key, 2)
        if batch_size is not None and batch_key is not None:
            support = _minibatch(support, batch_size, batch_key)
        outputs, _ = forward(model, whole(params, meta_params), support.inputs, mask=support.mask, key=model_key)
        value = _losses.mean_loss(task, masked(outputs, support.class_mask), support)
        if proximal:
            moved = jax.tree.map(lambda now, start: now - start, params, fast_weights(meta_params))
            value += 0.5 * proximal * optax.tree.norm(moved, squared=True)
        return value

    def finalize(params: Params, meta_params: Params, support: Examples, key: Any) -> Adapted:
        everything = whole(params, meta_params)
        return Adapted(everything, support.class_mask, support_stats(model, everything, support, key))

    problem = InnerProblem(problem_init, inner_loss, rule, num_steps, finalize)

    def predict(adapted: Adapted, inputs: Any, *, mask: Any = None, key: Any = None) -> Any:
        outputs, _ = forward(model, adapted.params, inputs, mask=mask, key=key, stats=adapted.stats)
        return masked(outputs, adapted.class_mask)

    return Learner(init or model.init, _inner.adaptation(problem), predict, query_loss(predict, task), problem, task)


def _minibatch(support: Examples, size: int, key: jax.Array) -> Examples:
    """Draws `size` of the kept examples without replacement, or all of them if there are fewer."""
    scores = jax.random.uniform(key, support.mask.shape)
    rows = jnp.argsort(jnp.where(support.mask, scores, 2.0))[: min(size, support.mask.shape[0])]
    inputs, targets, mask = jax.tree.map(lambda leaf: leaf[rows], (support.inputs, support.targets, support.mask))
    return Examples(inputs, targets, mask, support.class_mask)
