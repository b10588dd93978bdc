"""MAML with learned inner rates: both the start of each weight and its step size are meta-learned."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from metajax import tasks
from metajax.core import _tree, _validate
from metajax.core._types import Learner, Loss, Model, Params, TaskType
from metajax.learners._maml import gradient_learner

Per = Literal["weight", "array"]


def meta_sgd(
    model: Model,
    rate: float = 0.01,
    num_steps: int = 1,
    *,
    per: Per = "weight",
    each_step: bool = False,
    inner: optax.GradientTransformation | None = None,
    adapts: _tree.Where = None,
    task: TaskType | None = None,
    loss: Loss | None = None,
) -> Learner:
    """Meta-SGD (Li et al. 2017), and the rates of MAML++ (Antoniou et al. 2019): MAML that learns inner rates.

    The meta-parameters are `{"backbone", "rates"}`: the parameters of `model`, and a rate for each weight that adapts
    (`per="weight"`, Meta-SGD) or for each array (`per="array"`). With `each_step`, every inner step has its own rates
    (`per="array", each_step=True` is LSLR of MAML++; transformer blocks are stacked in one array, so they share rates).
    Rates are unconstrained: if moving a weight does not help on the query set, its rate goes to zero or below. Every
    estimator that differentiates the update rule trains the rates, `first_order()` and `sama()` included;
    `displacement()` and `implicit()` leave them unchanged.

    Args:
      model: a network with one output for each class (or the regression targets).
      rate: initial value of each rate, above 0.
      num_steps: inner steps, at least 1. `adapt(..., num_steps=)` takes another number; steps beyond the last one with
        its own rates use the last rates.
      per: "weight" or "array".
      each_step: whether every inner step has its own rates.
      inner: the rule whose updates are multiplied by the rates; None is plain gradient descent, `optax.sgd(1.0)`.
      adapts: path regex or predicate that picks the parameters of `model` that adapt and have rates; None picks all.
      task: the task type, None for classification.
      loss: `(outputs, targets) -> [n]`, instead of the loss of the task type; see `metajax.tasks.resolve`.

    Returns:
      A `Learner`. It behaves like `maml` otherwise.

    Raises:
      ValueError: an argument has the wrong type, `rate` is 0 or below, `num_steps` is below 1, `per` is unknown, or (at
        trace time) `adapts` picks nothing, or a task has more classes than the model has outputs.

    Source: Li, Zhou, Chen and Li 2017, arXiv:1707.09835; Antoniou, Edwards and Storkey 2019, How to train your MAML,
    arXiv:1810.09502.

    >>> import jax, jax.numpy as jnp, metajax
    >>> learner = metajax.learners.meta_sgd(metajax.models.mlp(outputs=2), rate=0.1, num_steps=3, adapts="head")
    >>> support = metajax.Examples(jnp.eye(4), jnp.array([0, 0, 1, 1]), jnp.ones(4, bool))
    >>> params = learner.init(jax.random.key(0), support.inputs)
    >>> params["rates"]["head"]["bias"].tolist()
    [0.10000000149011612, 0.10000000149011612]
    >>> learner.predict(learner.adapt(params, support), support.inputs).shape
    (4, 2)
    """
    _validate.positive_float("rate", rate)
    _validate.one_of("per", per, ("weight", "array"))
    inner = optax.sgd(1.0) if inner is None else inner
    _validate.instance("inner", inner, optax.GradientTransformation)
    base = optax.with_extra_args_support(inner)

    def rates_of(leaf: jax.Array) -> jax.Array:
        shape = leaf.shape if per == "weight" else ()
        return jnp.full((num_steps, *shape) if each_step else shape, rate, leaf.dtype)

    def init(key: Any, inputs: Any) -> Params:
        params = model.init(key, inputs)
        return {"backbone": params, "rates": jax.tree.map(rates_of, _tree.split(params, adapts, name="adapts")[0])}

    def rule(meta_params: Params) -> optax.GradientTransformation:
        def begin(params: Params) -> Any:
            return jnp.zeros([], jnp.int32), base.init(params)

        def update(grads: Params, state: Any, params: Params = None, **extra: Any) -> tuple[Params, Any]:
            step, base_state = state
            changes, base_state = base.update(grads, base_state, params, **extra)
            rates = meta_params["rates"]
            if each_step:
                rates = jax.tree.map(lambda leaf: leaf[jnp.minimum(step, num_steps - 1)], rates)
            return jax.tree.map(jnp.multiply, rates, changes), (step + 1, base_state)

        return optax.GradientTransformationExtraArgs(begin, update)

    return gradient_learner(
        model, rule, num_steps, adapts=adapts, task=tasks.resolve(task, loss),
        network=lambda meta_params: meta_params["backbone"], init=init,
    )  # fmt: skip
