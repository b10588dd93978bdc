"""Metric learners: a class is a point in feature space."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from metajax import tasks
from metajax.core import _losses, _validate
from metajax.core._types import Examples, Features, Learner, Loss, Model, Params
from metajax.learners._forward import Adapted, forward, masked, query_loss

Distance = Literal["euclidean", "cosine", "centred_cosine"]
_SCALES = {"euclidean": 1.0, "cosine": 10.0, "centred_cosine": 10.0}
_TINY = 1e-12  # keeps the gradient of a norm finite at zero; representable in float32, in which norms are computed


def prototypical(
    model: Features,
    *,
    distance: Distance = "euclidean",
    scale: float | None = None,
    ways: int | None = None,
    loss: Loss | None = None,
) -> Learner:
    """Prototypical networks (Snell et al. 2017): a class is the mean of its support features.

    Logits are `-scale * |feature - prototype|^2` (Euclidean) or `scale * cos(feature, prototype)`. Features of a
    pretrained encoder have a common component that makes all cosines similar. "centred_cosine" first subtracts the mean
    of the task's prototypes (SimpleShot subtracts the mean of the base classes). The learner takes any number of ways
    and shots, also other numbers than in training.

    Args:
      model: a network from inputs to features `[n, d]`.
      distance: "euclidean", "cosine" or "centred_cosine".
      scale: multiplies the logits; by default 1 for Euclidean and 10 for cosines.
      ways: number of classes if episodes carry no class mask.
      loss: `(outputs, targets) -> [n]`, instead of the cross-entropy.

    Returns:
      A `Learner` without an inner problem. A class without a kept support example is absent: it gets a large
      negative logit. Without any kept support example all classes are absent and predictions are meaningless.

    Raises:
      ValueError: an argument has the wrong type, the distance is unknown, the scale is not positive, or (under jit)
        the number of ways is unknown.

    Source: Snell, Swersky and Zemel 2017, Prototypical Networks for Few-shot Learning, arXiv:1703.05175; Wang et al.
    2019, SimpleShot, arXiv:1911.04623.

    >>> import jax, jax.numpy as jnp, metajax
    >>> learner = metajax.learners.prototypical(metajax.Model(lambda key, x: (), lambda params, x: x))
    >>> support = metajax.Examples(jnp.eye(2), jnp.array([0, 1]), jnp.ones(2, bool))
    >>> learner.predict(learner.adapt((), support), jnp.array([[1.0, 0.0]])).tolist()
    [[-0.0, -2.0]]
    """
    _validate.instance("model", model, Model)
    _validate.one_of("distance", distance, tuple(_SCALES))
    if ways is not None:
        _validate.positive_int("ways", ways)
    task = tasks.resolve(tasks.classification, loss)
    factor = _validate.positive_float("scale", _SCALES[distance] if scale is None else scale)

    def adapt(meta_params: Params, support: Examples, *, num_steps: int | None = None, key: Any = None) -> Adapted:
        del num_steps
        num_classes = _losses.count_ways(support, ways)
        features, stats = forward(model, meta_params, support.inputs, mask=support.mask, key=key)
        prototypes, present = class_means(features, support, num_classes)
        return Adapted(meta_params, present, stats, prototypes)

    def predict(adapted: Adapted, inputs: Any, *, mask: Any = None, key: Any = None) -> jax.Array:
        features, _ = forward(model, adapted.params, inputs, mask=mask, key=key, stats=adapted.stats)
        prototypes = adapted.head
        if distance == "centred_cosine":
            present = jnp.asarray(adapted.class_mask)[:, None]
            centre = jnp.sum(prototypes * present, axis=0) / jnp.maximum(jnp.sum(present), 1)
            features, prototypes = features - centre, prototypes - centre
        logits = (_euclidean if distance == "euclidean" else cosine)(features, prototypes)
        return masked(factor * logits, adapted.class_mask)

    return Learner(model.init, adapt, predict, query_loss(predict, task), task=task)


def class_means(features: jax.Array, support: Examples, num_classes: int) -> tuple[jax.Array, jax.Array]:
    """Returns the means `[ways, d]` of the kept features of each class, and which classes are present `[ways]`."""
    kept = _losses.kept_examples(tasks.classification, support)
    features = jnp.where(kept[:, None], features, 0)
    member = jax.nn.one_hot(support.targets, num_classes, dtype=features.dtype) * kept[:, None]
    count = jnp.sum(member, axis=0)
    present = count > 0
    if support.class_mask is not None:
        present &= support.class_mask
    return (member.T @ features) / jnp.maximum(count, 1)[:, None], present


def _euclidean(features: jax.Array, prototypes: jax.Array) -> jax.Array:
    return -jnp.sum(jnp.square(features[:, None] - prototypes[None]), axis=-1)


def cosine(features: jax.Array, prototypes: jax.Array) -> jax.Array:
    """Computes cosines `[n, ways]` between `[n, d]` and `[ways, d]`; 0 for a zero vector."""
    return unit(features) @ unit(prototypes).T


def unit(vectors: jax.Array) -> jax.Array:
    """Scales vectors `[..., d]` to length 1; a zero vector stays zero.

    >>> unit(jnp.array([[3.0, 4.0], [0.0, 0.0]])).round(3).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    wide = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
    length = jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + _TINY)
    return (wide * length).astype(vectors.dtype)
