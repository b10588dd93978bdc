"""Proto-MAML: gradient steps from a linear head that initially predicts like prototypes."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from metajax import tasks
from metajax.core import _inner, _losses, _tree
from metajax.core._types import Examples, Features, InnerProblem, Learner, Params
from metajax.learners._forward import Adapted, forward, masked, query_loss, support_stats
from metajax.learners._metric import class_means, unit

_SCALE = 10.0  # of cosines, as in learners.prototypical


def proto_maml(
    model: Features,
    inner: optax.GradientTransformation,
    num_steps: int,
    *,
    adapts: _tree.Where,
    distance: Literal["euclidean", "cosine"] = "cosine",
) -> Learner:
    """Proto-MAML (Triantafillou et al. 2020): a linear head made from the prototypes of the task, then an inner loop.

    Before the first step it predicts like `learners.prototypical`, so it takes any number of ways and already works
    with a single shot. The meta-parameters are those of the model alone. With "cosine", the head acts on normalised
    features.

    Args:
      model: a network from inputs to features `[n, d]`.
      inner: the inner update rule of the head and of the parameters that `adapts` picks.
      num_steps: inner steps; 0 is allowed.
      adapts: path regex or predicate that picks the parameters of the model that adapt; None adapts all.
      distance: the distance between features and prototypes.

    Source: Triantafillou et al. 2020, section 3.3 (arXiv:1903.03096).

    >>> import metajax
    >>> proto_maml(metajax.models.mlp(8), optax.sgd(0.1), 2, adapts="head").problem.num_steps
    2
    """

    def features(params: Params, inputs: Any, mask: Any, key: Any, stats: Any = None) -> jax.Array:
        found = forward(model, params, inputs, mask=mask, key=key, stats=stats)[0]
        return found if distance == "euclidean" else unit(found)

    def logits(head: dict[str, jax.Array], values: jax.Array) -> jax.Array:
        return values @ head["kernel"].T + head["bias"]

    def init(meta_params: Params, support: Examples, key: Any) -> Params:
        ways = _losses.count_ways(support)
        means, _ = class_means(features(meta_params, support.inputs, support.mask, key), support, ways)
        if distance == "euclidean":  # -|x - c|^2 without |x|^2, which is the same for all classes
            head = {"kernel": 2 * means, "bias": -jnp.sum(jnp.square(means), axis=-1)}
        else:
            head = {"kernel": _SCALE * unit(means), "bias": jnp.zeros_like(means[:, 0])}
        return {"head": head, "model": _tree.split(meta_params, adapts, name="adapts")[0]}

    def loss(params: Params, meta_params: Params, support: Examples, step: Any, key: Any) -> jax.Array:
        del step
        values = features(_tree.fill(params["model"], meta_params), support.inputs, support.mask, key)
        outputs = masked(logits(params["head"], values), support.class_mask)
        return _losses.mean_loss(tasks.classification, outputs, support)

    def finalize(params: Params, meta_params: Params, support: Examples, key: Any) -> Adapted:
        everything = _tree.fill(params["model"], meta_params)
        return Adapted(everything, support.class_mask, support_stats(model, everything, support, key), params["head"])

    problem = InnerProblem(init, loss, lambda meta_params: inner, num_steps, finalize)

    def predict(adapted: Adapted, inputs: Any, *, mask: Any = None, key: Any = None) -> jax.Array:
        values = features(adapted.params, inputs, mask, key, adapted.stats)
        return masked(logits(adapted.head, values), adapted.class_mask)

    task = tasks.classification
    return Learner(model.init, _inner.adaptation(problem), predict, query_loss(predict, task), problem, task)
