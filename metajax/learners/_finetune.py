"""Transfer learning: train on all base classes at once, then fit a head for each task."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from metajax import tasks
from metajax.core import _inner, _losses, _validate
from metajax.core._types import Examples, Features, InnerProblem, Learner, Loss, Model, Params, TaskType
from metajax.learners._forward import Adapted, forward, masked, query_loss
from metajax.learners._metric import class_means, cosine

Head = Literal["linear", "cosine"]
_COSINE_SCALE = 10.0


def _check_head(head: str) -> None:
    _validate.one_of("head", head, ("linear", "cosine"))


def _new_head(head: Head, key: Any, width: int, classes: int, dtype: Any) -> dict[str, jax.Array]:
    if key is None:
        kernel = jnp.zeros([classes, width], dtype)
    else:
        kernel = jax.nn.initializers.lecun_normal(in_axis=1, out_axis=0)(key, (classes, width), dtype)
    return {"kernel": kernel} if head == "cosine" else {"bias": jnp.zeros([classes], dtype), "kernel": kernel}


def _apply_head(head: Head, params: dict[str, jax.Array], features: jax.Array) -> jax.Array:
    if head == "cosine":
        return _COSINE_SCALE * cosine(features, params["kernel"])
    return features @ params["kernel"].T + params["bias"]


def pretrain(
    model: Features,
    num_classes: int | None = None,
    *,
    head: Head = "linear",
    task: TaskType | None = None,
    loss: Loss | None = None,
) -> Learner:
    """Ordinary supervised training on all base classes with global labels, as a learner that does not adapt.

    Train it on `metajax.data.batches(source, size, seed)`. Its meta-parameters are `{"backbone", "head"}`; `finetune`
    takes them unchanged.

    Args:
      model: a network from inputs to features `[n, d]`.
      num_classes: number of base classes; None adds no head, and the outputs of `model` are the predictions
        (regression).
      head: "linear" (Baseline) or "cosine" (Baseline++: weights and features normalised).
      task: the task type, None for classification.
      loss: `(outputs, targets) -> [n]`, instead of the loss of the task type; see `metajax.tasks.resolve`.

    Raises:
      ValueError: an argument has the wrong type, the head is unknown, or `num_classes` is below 1.

    Source: Chen et al. 2019, A Closer Look at Few-shot Classification, arXiv:1904.04232.

    >>> import metajax
    >>> learner = metajax.learners.pretrain(metajax.models.conv4(), num_classes=64)
    >>> learner.problem is None
    True
    """
    _check_head(head)
    _validate.instance("model", model, Model)
    if num_classes is not None:
        _validate.positive_int("num_classes", num_classes)
    resolved = tasks.resolve(task, loss)

    def init(key: Any, inputs: Any) -> Params:
        model_key, head_key = jax.random.split(key)
        params = {"backbone": model.init(model_key, inputs)}
        if num_classes is None:
            return params
        features = jax.eval_shape(lambda: forward(model, params["backbone"], inputs, mask=None)[0])
        return {**params, "head": _new_head(head, head_key, features.shape[-1], num_classes, features.dtype)}

    def adapt(meta_params: Params, support: Examples, *, num_steps: int | None = None, key: Any = None) -> Adapted:
        del num_steps, key
        return Adapted(meta_params["backbone"], support.class_mask, None, meta_params.get("head"))

    def predict(adapted: Adapted, inputs: Any, *, mask: Any = None, key: Any = None) -> Any:
        outputs, _ = forward(model, adapted.params, inputs, mask=mask, key=key)
        if adapted.head is None:
            return outputs
        return masked(_apply_head(head, adapted.head, outputs), adapted.class_mask)

    return Learner(init, adapt, predict, query_loss(predict, resolved), task=resolved)


def finetune(
    model: Features,
    inner: optax.GradientTransformation,
    num_steps: int = 100,
    *,
    head: Head = "linear",
    ways: int | None = None,
    loss: Loss | None = None,
) -> Learner:
    """Fits a new head for each task on a frozen backbone: Baseline (linear) and Baseline++ (cosine).

    Args:
      model: a network from inputs to features `[n, d]`.
      inner: the update rule of the head, any optax transform.
      num_steps: steps for each task, at least 1.
      head: "linear", which starts at zero, or "cosine", which starts at the class means of the support set.
      ways: number of classes if episodes carry no class mask.
      loss: `(outputs, targets) -> [n]`, instead of the cross-entropy.

    Returns:
      A `Learner` with the meta-parameters `{"backbone"}`. It also accepts those of `pretrain` and ignores their head.
      Its `problem` is None, because the backbone does not adapt; `hypergrad` estimators differentiate the whole fit.

    Raises:
      ValueError: an argument has the wrong type, the head is unknown, or `num_steps` is below 1.

    Source: Chen et al. 2019, A Closer Look at Few-shot Classification, arXiv:1904.04232.

    >>> import jax, jax.numpy as jnp, optax, metajax
    >>> identity = metajax.Model(lambda key, x: {}, lambda params, x: x)
    >>> learner = metajax.learners.finetune(identity, optax.sgd(1.0), num_steps=10)
    >>> support = metajax.Examples(jnp.eye(2), jnp.array([0, 1]), jnp.ones(2, bool))
    >>> adapted = learner.adapt({"backbone": {}}, support)
    >>> learner.predict(adapted, jnp.eye(2)).argmax(-1).tolist()
    [0, 1]
    """
    _check_head(head)
    _validate.instance("model", model, Model)
    _validate.instance("inner", inner, optax.GradientTransformation)
    _validate.positive_int("num_steps", num_steps)
    task = tasks.resolve(tasks.classification, loss)

    def head_init(meta_params: Params, features: Examples, key: Any) -> Params:
        del meta_params, key
        num_classes = _losses.count_ways(features, ways)
        if head == "cosine":
            return {"kernel": class_means(features.inputs, features, num_classes)[0]}
        return _new_head(head, None, features.inputs.shape[-1], num_classes, features.inputs.dtype)

    def head_loss(params: Params, meta_params: Params, features: Examples, step: Any, key: Any) -> jax.Array:
        del meta_params, step, key
        logits = _apply_head(head, params, features.inputs)
        return _losses.mean_loss(task, masked(logits, features.class_mask), features)

    # The inner problem of the head alone. Its support set holds features, so the backbone runs once for each task.
    head_problem = InnerProblem(
        head_init, head_loss, lambda meta_params: inner, num_steps, lambda params, meta_params, features, key: params
    )

    def init(key: Any, inputs: Any) -> Params:
        return {"backbone": model.init(key, inputs)}

    def adapt(meta_params: Params, support: Examples, *, num_steps: int | None = None, key: Any = None) -> Adapted:
        backbone = meta_params["backbone"]
        features, stats = forward(model, backbone, support.inputs, mask=support.mask, key=key)
        fitted = _inner.unroll(head_problem, (), support._replace(inputs=features), num_steps=num_steps).adapted
        return Adapted(backbone, support.class_mask, stats, fitted)

    def predict(adapted: Adapted, inputs: Any, *, mask: Any = None, key: Any = None) -> jax.Array:
        features, _ = forward(model, adapted.params, inputs, mask=mask, key=key, stats=adapted.stats)
        return masked(_apply_head(head, adapted.head, features), adapted.class_mask)

    return Learner(init, adapt, predict, query_loss(predict, task), task=task)
