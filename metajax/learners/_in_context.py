"""Few-shot prompting: the model reads the support set as text before the query, and no weight changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metajax import tasks
from metajax.core import _losses, _validate
from metajax.core._types import Array, Examples, Features, Learner, Loss, Model, Params
from metajax.learners._forward import Adapted, masked, query_loss
from metajax.models import continued, last_kept

_Text = tuple[jax.Array, jax.Array]  # tokens and mask, both [n, length]


def in_context(
    model: Features,
    *,
    labels: Any,
    separator: str | Sequence[int] = (),
    end: str | Sequence[int] = (),
    content_free: str | Sequence[int] | None = None,
    encode: Callable[[str], Sequence[int]] | None = None,
    loss: Loss | None = None,
) -> Learner:
    """In-context learning (Brown et al. 2020): a language model reads the support set and names the class of a query.

    `adapt` reads the demonstrations once. A demonstration is `[text, separator, label, end]`, one for each kept support
    example, in order. The adaptation of a task is their keys and values. `predict` returns the log-probability of each
    label after `[demonstrations, text, separator]`. Padding takes no position, so neither results nor positions depend
    on it. The order of the support set matters, like the order of words in a text.

    Meta-training this learner is MetaICL (Min et al. 2022), with all parameters or with adapters:
    `outer_update(in_context(lora(model), labels=...), optax.adam(1e-4), hypergrad=unrolled(), trainable="lora")`. By
    default the loss is the cross-entropy of the label among the classes. The loss of the paper, among all tokens, is
    `loss=lambda outputs, targets: -outputs[jnp.arange(len(targets)), targets]`.

    Args:
      model: `models.decoder` with `outputs="tokens"`, also with adapters. Inputs are int32 `[n, length]`, or
        `{"tokens", "mask"}` as `data.text` gives them.
      labels: names of the classes, int32 `[classes]` or `[classes, k]`; negative numbers are padding after a label.
        Class c of an episode is `labels[c]`. Use meaningful words if the classes are always the same; otherwise use any
        words, such as letters.
      separator: tokens between a text and its label, such as those of " =>".
      end: tokens after a demonstration, such as those of a blank line.
      content_free: tokens of a text without content, such as those of "N/A". The log-probabilities of the labels after
        this text are subtracted, so that it favours no class (contextual calibration, Zhao et al. 2021).
      encode: `(text) -> tokens`; with it, all of these may be texts: labels `["A", "B"]`, a separator `" =>"`.
      loss: `(outputs, targets) -> [n]`, instead of the cross-entropy.

    Returns:
      A `Learner` without an inner problem. Outputs are `[n, classes]`. Classes without support examples are scored
      normally; classes masked out by the class mask of the episode get a large negative logit.

    Raises:
      ValueError: an argument has the wrong type; labels are not tokens, or two are the same; a label begins with
        another one and `content_free` is missing, so the longer one is never more likely; another argument does not
        hold tokens; or (in `adapt`) the model has no cache, or a task has more classes than there are labels.

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
    names = _labels(_encoded_labels(labels, encode))
    before_label, after_label = _tokens("separator", separator, encode), _tokens("end", end, encode)
    blank = None if content_free is None else _tokens("content_free", content_free, encode)
    if blank is None:
        _check_beginnings(names)
    if blank is not None and not len(blank) + len(before_label):
        raise ValueError("content_free must hold a token where separator holds none, got no tokens")
    classes, width = names.shape
    said = [part for part in (names, before_label, after_label, blank) if part is not None and part.size]
    largest = max(int(part.max()) for part in said)

    def scores(params: Params, cache: Any, texts: _Text) -> jax.Array:
        """Returns log-probabilities `[n, classes]` of the labels after texts that continue `cache`."""
        tokens, mask = _joined(texts, before_label)
        n, length = tokens.shape
        # labels of one token need no row each: the model reads no token of a label before the last one
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
    """Returns labels as `[classes, k]`; negative numbers are padding."""
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
    """Refuses a label that begins with another: it is never more likely, unless `content_free` calibrates both."""
    rows = [tuple(row[row >= 0].tolist()) for row in names]
    for short in rows:
        for row in rows:
            if row != short and row[: len(short)] == short:
                raise ValueError(
                    f"labels must not begin with another one without content_free, got {list(row)}, which begins with "
                    f"{list(short)}"
                )


def _encoded_labels(labels: Any, encode: Callable[[str], Sequence[int]] | None) -> Any:
    """Encodes text labels as tokens padded to one length, with a leading space if that gives any tokens."""
    if encode is None or not all(isinstance(label, str) for label in labels):
        return labels
    known = [list(encode(f" {label}") or encode(label)) for label in labels]
    width = max(map(len, known), default=0)
    return [[*label, *[-1] * (width - len(label))] for label in known]


def _tokens(name: str, tokens: str | Sequence[int], encode: Callable[[str], Sequence[int]] | None) -> np.ndarray:
    if isinstance(tokens, str):
        if encode is None:
            raise ValueError(f"encode must be given where {name} is a text, got None for {tokens!r}")
        tokens = encode(tokens)
    array = np.asarray(tokens)
    array = array if array.size else array.astype(np.int32)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) or np.any(array < 0):
        raise ValueError(f"{name} must be a list of token ids, got {tokens!r}")
    return array.astype(np.int32)


def _texts(inputs: Any, mask: Array | None) -> _Text:
    """Returns the tokens of examples and which of them are kept; padding examples keep none."""
    inputs = inputs if isinstance(inputs, dict) else {"tokens": inputs}
    tokens = jnp.asarray(inputs["tokens"])
    return _losses.clear_padding((tokens, jnp.asarray(inputs.get("mask", jnp.ones(tokens.shape, bool)), bool)), mask)


def _joined(texts: _Text, *parts: Any) -> _Text:
    """Appends tokens to texts: the same `[k]` to each text, or a pair of tokens and mask `[n, k]`."""
    n = len(texts[0])
    pairs = [
        part if isinstance(part, tuple) else (jnp.tile(part, (n, 1)), jnp.ones([n, len(part)], bool)) for part in parts
    ]
    tokens, masks = zip(texts, *pairs, strict=True)
    return jnp.concatenate(tokens, axis=1), jnp.concatenate(masks, axis=1)
