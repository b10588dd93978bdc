"""Few-shot prompting: the support set stands in front of the query as text, and no weight changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metajax import tasks
from metajax.core import _losses, _validate
from metajax.core._types import Array, Examples, Learner, Loss, Model, Params
from metajax.learners._forward import Adapted, masked, query_loss
from metajax.models._decoder import last_kept
from metajax.models._generate import continued

_Text = tuple[jax.Array, jax.Array]  # tokens and mask, both [n, length]


def in_context(
    model: Model,
    *,
    labels: Any,
    separator: Sequence[int] = (),
    end: Sequence[int] = (),
    content_free: Sequence[int] | None = None,
    loss: Loss | None = None,
) -> Learner:
    """In-context learning (Brown et al. 2020): a language model reads the support set, and names the class of a query.

    `adapt` reads the demonstrations, `[text, separator, label, end]` of one kept support example after the other, once:
    a task's adaptation is their keys and values. `predict` gives the log-probability of each label behind
    `[demonstrations, text, separator]`. Padding takes no position, so that neither results nor positions depend on it;
    the order of the support set counts, as words in a text do.

    Meta-training it is MetaICL (Min et al. 2022), with all parameters or with adapters:
    `outer_update(in_context(lora(model), labels=...), optax.adam(1e-4), hypergrad=unrolled(), trainable="lora")`. The
    loss is by default that of the label among the classes; the paper's, among all tokens, is
    `loss=lambda outputs, targets: -outputs[jnp.arange(len(targets)), targets]`.

    Args:
      model: `models.decoder` with `outputs="tokens"`, also with adapters. Inputs are int32 `[n, length]`, or
        `{"tokens", "mask"}` as `data.text` gives them.
      labels: what classes are called, int32 `[classes]` or `[classes, k]`, where a negative number is padding behind a
        label. Class c of an episode is `labels[c]`: words with a meaning where its classes are always the same, and
        else any words, such as letters.
      separator: tokens between a text and its label, such as those of " =>".
      end: tokens behind a demonstration, such as those of a blank line.
      content_free: tokens of a text that says nothing, such as those of "N/A". The log-probabilities of the labels
        behind it are subtracted, so that it has no class that it prefers (contextual calibration, Zhao et al. 2021).
      loss: `(outputs, targets) -> [n]`, instead of the cross-entropy.

    Returns:
      A `Learner` without an inner problem. Outputs are `[n, classes]`. A class without a support example has its
      log-probability as others have; one that the episode's class mask denies gets a large negative logit.

    Raises:
      ValueError: a part of another type, labels that are no tokens or two that are the same, without `content_free` a
        label that begins with another and so is never likelier, other arguments that are no tokens, or (where it
        adapts) a model without a cache or a task with more classes than labels.

    Source: Brown et al. 2020, arXiv:2005.14165; Min et al. 2022, arXiv:2110.15943; Zhao et al. 2021, arXiv:2102.09690.

    >>> import jax, jax.numpy as jnp, metajax
    >>> model = metajax.models.decoder(100, width=16, depth=2, heads=4)
    >>> learner = metajax.learners.in_context(model, labels=[10, 11], separator=[5], end=[6])
    >>> support = metajax.Examples(jnp.array([[1, 2, 3], [4, 5, 6]]), jnp.array([0, 1]), jnp.ones(2, bool))
    >>> adapted = learner.adapt(jax.jit(learner.init)(jax.random.key(0), support.inputs), support)
    >>> jax.jit(learner.predict)(adapted, jnp.array([[1, 2, 3]])).shape
    (1, 2)
    """
    _validate.instance("model", model, Model)
    task = tasks.resolve(tasks.classification, loss)
    names = _labels(labels)
    before_label, after_label = _tokens("separator", separator), _tokens("end", end)
    blank = None if content_free is None else _tokens("content_free", content_free)
    if blank is None:
        _check_beginnings(names)
    if blank is not None and not len(blank) + len(before_label):
        raise ValueError("content_free must hold a token where separator holds none, got no tokens")
    classes, width = names.shape
    said = [part for part in (names, before_label, after_label, blank) if part is not None and part.size]
    largest = max(int(part.max()) for part in said)

    def scores(params: Params, cache: Any, texts: _Text) -> jax.Array:
        """Log-probabilities `[n, classes]` of the labels behind texts that continue `cache`."""
        tokens, mask = _joined(texts, before_label)
        n, length = tokens.shape
        # labels of one token need no row of their own: nothing of a label is read before its last token
        rows = 1 if width == 1 else classes
        known = jnp.tile(names[:rows, :-1], (n, 1))
        tokens, mask = (jnp.repeat(part, rows, axis=0) for part in (tokens, mask))
        within = jnp.broadcast_to(length + jnp.arange(width - 1), known.shape)
        read = jnp.concatenate([last_kept(mask)[:, None], within], axis=1)
        tokens, mask = _joined((tokens, mask), (jnp.maximum(known, 0), known >= 0))
        logits, _ = continued(model, params, {"tokens": tokens, "mask": mask, "read": read}, cache)
        logs = jax.nn.log_softmax(logits).reshape(n, rows, width, -1)
        chosen = jnp.take_along_axis(logs, jnp.maximum(names, 0)[None, :, :, None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(names >= 0, chosen, 0), axis=-1)

    def adapt(meta_params: Params, support: Examples, *, num_steps: int | None = None, key: Any = None) -> Adapted:
        del num_steps, key
        if _losses.count_ways(support, 1) > classes:
            raise ValueError(
                f"labels must name each of the {_losses.count_ways(support, 1)} classes of a task, got {classes} labels"
            )
        kept = _losses.kept_examples(task, support)
        answers = jnp.asarray(names)[jnp.where(kept, support.targets, 0)]
        texts = _joined(
            _texts(support.inputs, kept), before_label, (jnp.maximum(answers, 0), answers >= 0), after_label
        )
        shown = {"tokens": texts[0].reshape(1, -1), "mask": (texts[1] & kept[:, None]).reshape(1, -1)}
        logits, cache = continued(model, meta_params, shown, {})
        if largest >= logits.shape[-1]:
            raise ValueError(
                "labels, separator, end and content_free must be among the "
                f"{logits.shape[-1]} tokens of the model, got {largest}"
            )
        bias = None
        if blank is not None:
            bias = scores(meta_params, cache, (jnp.asarray(blank)[None], jnp.ones([1, len(blank)], bool)))
        return Adapted(meta_params, support.class_mask, None, {"cache": cache, "bias": bias})

    def predict(adapted: Adapted, inputs: Any, *, mask: Any = None, key: Any = None) -> jax.Array:
        del key
        outputs = scores(adapted.params, adapted.head["cache"], _texts(inputs, mask))
        if adapted.head["bias"] is not None:
            outputs -= adapted.head["bias"]
        return masked(outputs, adapted.class_mask)

    return Learner(model.init, adapt, predict, query_loss(predict, task), task=task)


def _labels(labels: Any) -> np.ndarray:
    """Labels as `[classes, k]`, where a negative number is padding."""
    try:
        names = np.asarray(labels)
    except ValueError as error:
        raise ValueError(f"labels must be of one length, shorter ones padded with -1, got {labels!r}") from error
    names = names[:, None] if names.ndim == 1 else names
    if names.ndim != 2 or not names.size or not np.issubdtype(names.dtype, np.integer):
        raise ValueError(f"labels must be token ids [classes] or [classes, k], got {labels!r}")
    names = np.maximum(names, -1).astype(np.int32)
    if np.any(names[:, 0] < 0) or np.any((names[:, 1:] >= 0) & (names[:, :-1] < 0)):
        raise ValueError(f"labels must each begin with a token, and be padded behind it, got {labels!r}")
    if len(np.unique(names, axis=0)) != len(names):
        raise ValueError(f"labels must differ from class to class, got {labels!r}")
    return names


def _check_beginnings(names: np.ndarray) -> None:
    """A label that begins with another is never likelier, unless a text that says nothing is the measure of both."""
    rows = [tuple(row[row >= 0].tolist()) for row in names]
    for short in rows:
        for row in rows:
            if row != short and row[: len(short)] == short:
                raise ValueError(
                    f"labels must not begin with another one without content_free, got {list(row)}, which begins with "
                    f"{list(short)}"
                )


def _tokens(name: str, tokens: Sequence[int]) -> np.ndarray:
    array = np.asarray(tokens)
    array = array if array.size else array.astype(np.int32)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) or np.any(array < 0):
        raise ValueError(f"{name} must be a list of token ids, got {tokens!r}")
    return array.astype(np.int32)


def _texts(inputs: Any, mask: Array | None) -> _Text:
    """The tokens of examples, and which of them are kept: none of an example that is padding."""
    inputs = inputs if isinstance(inputs, dict) else {"tokens": inputs}
    tokens = jnp.asarray(inputs["tokens"])
    return _losses.clear_padding((tokens, jnp.asarray(inputs.get("mask", jnp.ones(tokens.shape, bool)), bool)), mask)


def _joined(texts: _Text, *parts: Any) -> _Text:
    """Texts with more tokens behind: the same ones `[k]` behind each, or a pair of tokens and mask `[n, k]`."""
    n = len(texts[0])
    pairs = [
        part if isinstance(part, tuple) else (jnp.tile(part, (n, 1)), jnp.ones([n, len(part)], bool)) for part in parts
    ]
    tokens, masks = zip(texts, *pairs, strict=True)
    return jnp.concatenate(tokens, axis=1), jnp.concatenate(masks, axis=1)
