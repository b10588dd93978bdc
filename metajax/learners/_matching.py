"""Matching networks: a query takes the labels of the support examples that it attends to."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from metajax import tasks
from metajax.core import Examples, Features, Learner, Model, _losses, _validate
from metajax.core._types import Loss, Params
from metajax.learners._forward import Adapted, forward, masked, query_loss
from metajax.learners._metric import unit
from metajax.models import from_nnx


class _Cell(nnx.Module):
    """One step of an LSTM: `[n, 2 * width + inputs]`, its two states and its inputs, to `[n, 2 * width]`."""

    def __init__(self, inputs: int, width: int, rngs: nnx.Rngs):
        self.width = width
        self.cell = nnx.LSTMCell(inputs, width, rngs=rngs)

    def __call__(self, values: jax.Array) -> jax.Array:
        memory, hidden, inputs = jnp.split(values, [self.width, 2 * self.width], axis=1)
        return jnp.concatenate(self.cell((memory, hidden), inputs)[0], axis=1)


def matching(
    model: Features, *, scale: float = 10.0, full_context: bool = False, steps: int = 5, loss: Loss | None = None
) -> Learner:
    """Matching networks (Vinyals et al. 2016): attention over the support set by cosines, without inner steps.

    The probability of a class is the sum of the attention that its support examples get, a softmax of scaled cosines.

    Args:
      model: from inputs to features `[n, d]`.
      scale: of the cosines in the softmax. The paper has 1, with which hardly any class is likelier than the others.
      full_context: whether features depend on the whole support set (full context embeddings): those of the support set
        through an LSTM in its order and one in the opposite order, those of a query through an LSTM that attends to it.
      steps: of the LSTM of a query, with `full_context`.
      loss: `(outputs, targets) -> [n]`, instead of the cross-entropy.

    Returns:
      A `Learner` without an inner problem. Outputs are log-probabilities `[n, ways]`. Its meta-parameters are those of
      the model, or with `full_context` `{"backbone", "forward", "backward", "query"}`.

    Raises:
      ValueError: a part of another type, a scale that is not above 0, or fewer steps than 1.

    Source: Vinyals et al. 2016, Matching Networks for One Shot Learning, arXiv:1606.04080; full context embeddings are
    its appendix A.

    >>> import jax, jax.numpy as jnp, metajax
    >>> learner = metajax.learners.matching(metajax.Model(lambda key, x: (), lambda params, x: x), scale=1.0)
    >>> support = metajax.Examples(jnp.eye(2), jnp.array([0, 1]), jnp.ones(2, bool))
    >>> jnp.exp(learner.predict(learner.adapt((), support), jnp.eye(2)[:1]))[0, 0].round(3)
    Array(0.731, dtype=float32)
    """
    _validate.instance("model", model, Model)
    _validate.positive_float("scale", scale)
    _validate.positive_int("steps", steps)
    task = tasks.resolve(tasks.classification, loss)

    def init(key: jax.Array, inputs: Any) -> Params:
        keys = jax.random.split(key, 4)
        backbone = model.init(keys[0], inputs)
        if not full_context:
            return backbone
        mask = jnp.ones(len(jax.tree.leaves(inputs)[0]), bool)
        width = jax.eval_shape(lambda: forward(model, backbone, inputs, mask=mask)[0]).shape[1]
        sizes = {"forward": width, "backward": width, "query": 2 * width}
        cells = {
            name: _cell(size, width).init(key, jnp.zeros([1, 2 * width + size]))
            for (name, size), key in zip(sizes.items(), keys[1:], strict=True)
        }
        return {"backbone": backbone, **cells}

    def adapt(meta_params: Params, support: Examples, *, num_steps: int | None = None, key: Any = None) -> Adapted:
        del num_steps
        ways = _losses.count_ways(support)
        kept = _losses.kept_examples(task, support)
        params = meta_params["backbone"] if full_context else meta_params
        features, stats = forward(model, params, support.inputs, mask=support.mask, key=key)
        features = jnp.where(kept[:, None], features, 0)
        if full_context:
            there, back = (_read(meta_params[name], features[::way], kept[::way])[::way]
                           for name, way in (("forward", 1), ("backward", -1)))  # fmt: skip
            features = jnp.where(kept[:, None], features + there + back, 0)
        labels = jax.nn.one_hot(jnp.where(kept, support.targets, -1), ways, dtype=features.dtype)
        return Adapted(meta_params, support.class_mask, stats, {"features": features, "labels": labels, "kept": kept})

    def predict(adapted: Adapted, inputs: Any, *, mask: Any = None, key: Any = None) -> jax.Array:
        head, params = adapted.head, adapted.params["backbone"] if full_context else adapted.params
        features, _ = forward(model, params, inputs, mask=mask, key=key, stats=adapted.stats)
        if full_context:
            features = _attend(adapted.params["query"], features, head["features"], head["kept"], steps)
        cosines = scale * unit(features) @ unit(head["features"]).T
        shares = _attention(cosines, head["kept"]) @ head["labels"]
        return masked(jnp.log(jnp.maximum(shares, jnp.finfo(shares.dtype).tiny)), adapted.class_mask)

    return Learner(init, adapt, predict, query_loss(predict, task), task=task)


def _cell(inputs: int, width: int) -> Model:
    return from_nnx(lambda rngs: _Cell(inputs, width, rngs))


def _attention(scores: jax.Array, kept: jax.Array) -> jax.Array:
    """A softmax over the kept examples; 0 for all where none is kept."""
    shares = jax.nn.softmax(jnp.where(kept, scores, _losses.absent_logit(scores.dtype)), axis=-1)
    return jnp.where(kept, shares, 0)


def _read(params: Params, features: jax.Array, kept: jax.Array) -> jax.Array:
    """Hidden states `[n, d]` of an LSTM that reads features one after the other; padding is not read."""
    width = features.shape[1]

    def step(state: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        values, counts = row
        new = _cell(width, width).apply(params, jnp.concatenate([state, values])[None])[0]
        new = jnp.where(counts, new, state)
        return new, new[width:]

    return jax.lax.scan(step, jnp.zeros(2 * width, features.dtype), (features, kept))[1]


def _attend(params: Params, features: jax.Array, known: jax.Array, kept: jax.Array, steps: int) -> jax.Array:
    """Features of queries after so many steps of an LSTM that reads them and what it attends to of the support set."""
    width = features.shape[1]
    memory, hidden, read = jnp.zeros_like(features), features, jnp.zeros_like(features)
    for _ in range(steps):
        read = _attention(hidden @ known.T, kept) @ known
        state = jnp.concatenate([memory, hidden, features, read], axis=1)
        memory, hidden = jnp.split(_cell(2 * width, width).apply(params, state), 2, axis=1)
        hidden += features
    return hidden
