"""Bilevel problems beyond few-shot learning, as learners."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from metajax.core import _inner, _losses, _validate
from metajax.core._types import Examples, InnerProblem, Learner, Params


def bilevel(
    inner_problem: InnerProblem,
    outer_loss: Callable[..., Any],
    *,
    init: Callable[..., Params] | None = None,
    predict: Callable[..., Any] | None = None,
) -> Learner:
    """Any inner problem as a learner: hyper-parameters, weights of the data, or a loss that are learned.

    What the inner loop learns from is the support set of an episode, what judges the result is its query set, and
    what is learned in the outer loop are the meta-parameters, which the inner problem may use anywhere: in its start,
    its loss, its update rule. `metajax.outer_update` and every estimator take the learner as any other.

    Both sets are `Examples` because the mask says whether a task counts; nothing else of few-shot learning is asked.
    `inputs` and `targets` may be any trees, None included, and the two losses may read them as they like. They decide
    what the mask means to them. A single problem is a batch of one task: `jax.tree.map(lambda leaf: leaf[None],
    episode)`.

    Args:
      inner_problem: what is optimised inside; its `finish` makes `adapted` of the last fast weights.
      outer_loss: `(adapted, meta_params, query, *, key=None) -> loss`, a scalar, or `(loss, aux)` with a dict that
        describes the result, such as `outputs`.
      init: `(key, example_inputs) -> meta_params`. None where `outer.init(key, episode, params=...)` gives them.
      predict: `(adapted, inputs) -> outputs`, for `learner.predict` and for `outputs` in `aux`. With them,
        `outer_update` measures the accuracy of integer targets.

    Returns:
      A `Learner`. Its metrics hold what `outer_update` says of any learner; a NaN inside the inner loop is a NaN in
      `inner_loss` and in the loss.

    Raises:
      ValueError: a part of another type; no inner step; or (when used) meta-parameters are asked for without `init`,
        predictions without `predict`, or integer targets have no `outputs`.

    Source: Franceschi et al. 2018, Bilevel Programming for Hyperparameter Optimization and Meta-Learning,
    arXiv:1806.04910; reweighting: Ren et al. 2018, arXiv:1803.09050, and Shu et al. 2019, arXiv:1902.07379.

    >>> import jax, jax.numpy as jnp, optax, metajax
    >>> def ridge(weights, penalty, support, step, key):
    ...     errors = support.inputs @ weights - support.targets
    ...     return jnp.mean(errors**2) + jnp.exp(penalty) * jnp.sum(weights**2)
    >>> def validation(weights, penalty, query, *, key=None):
    ...     return jnp.mean((query.inputs @ weights - query.targets) ** 2)
    >>> problem = metajax.InnerProblem(
    ...     init=lambda penalty, support, key: jnp.zeros(3), loss=ridge, optimizer=lambda penalty: optax.sgd(0.1),
    ...     num_steps=20, finish=lambda weights, penalty, support, key: weights)
    >>> learner = metajax.bilevel(problem, validation, init=lambda key, inputs: jnp.zeros([]))
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
        adapted: Any, meta_params: Params, query: Examples, *, key: Any = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        found = outer_loss(adapted, meta_params, query, key=key)
        loss, aux = found if isinstance(found, tuple) else (found, {})
        if "outputs" not in aux and predict is not None:
            aux = {**aux, "outputs": predict(adapted, query.inputs)}
        if "outputs" not in aux and _losses.is_integer(query.targets):
            raise ValueError(
                "query.targets must not be integers without outputs, whose accuracy is measured: give bilevel() "
                "predict=, or return (loss, {'outputs': ...}) from outer_loss"
            )
        return loss, aux

    return Learner(first, _inner.adaptation(inner_problem), outputs, judge, inner_problem)
