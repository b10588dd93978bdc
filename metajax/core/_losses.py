"""Per-example losses, and the masks that every mean and every logit honours."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metajax.core._types import Array, Examples, Loss

ABSENT = -1e9  # the logit of an absent class: finite, so that its gradient is zero and never NaN


def cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Softmax cross-entropy with integer labels, averaged over the kept positions of each example.

    Args:
      outputs: `[n, ..., c]` logits.
      targets: `[n, ...]` integers; a negative target is left out.

    Returns:
      `[n]` losses; 0 for an example without a kept position.

    Raises:
      ValueError: the shapes do not match.

    >>> import jax.numpy as jnp
    >>> cross_entropy(jnp.zeros([1, 4]), jnp.array([2])).shape
    (1,)
    """
    if outputs.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must have the shape of outputs {outputs.shape} without its last axis, got {targets.shape}"
        )
    kept = targets >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.where(kept, targets, 0))
    axes = tuple(range(1, targets.ndim))
    total = jnp.sum(jnp.where(kept, losses, 0), axis=axes)
    return total / jnp.maximum(jnp.sum(kept, axis=axes), 1).astype(total.dtype)


def span_cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Loss of extractive question answering: softmax cross-entropies of the first and the last position, averaged.

    Positions that can hold no answer (padding) must have large negative logits, as the span heads of models give them.

    Args:
      outputs: `[n, length, 2]` logits, of each position to be the first and to be the last of the span.
      targets: `[n, 2]` integers, the first and the last position, both of the span; a negative one is left out.

    Returns:
      `[n]` losses; 0 for an example whose two targets are left out.

    Raises:
      ValueError: the shapes do not match.

    Source: Devlin et al. 2019, section 4.2 (arXiv:1810.04805).

    >>> import jax.numpy as jnp
    >>> span_cross_entropy(jnp.zeros([1, 4, 2]), jnp.array([[1, 2]])).shape
    (1,)
    """
    if not _is_span(outputs, targets):
        raise ValueError(
            f"targets of spans must be [n, 2] for outputs [n, length, 2], got {targets.shape} and {outputs.shape}"
        )
    return cross_entropy(jnp.swapaxes(outputs, 1, 2), targets)


def _is_span(outputs: Any, targets: Any) -> bool:
    return outputs.ndim == 3 and outputs.shape[2] == 2 and targets.shape == (outputs.shape[0], 2)


def by_target(outputs: Any, targets: Any) -> Any:
    """Logits with one row for each target: those of spans, `[n, length, 2]`, become `[n, 2, length]`; others pass.

    >>> by_target(jnp.zeros([3, 7, 2]), jnp.zeros([3, 2], int)).shape
    (3, 2, 7)
    """
    rows = outputs.shape[:-1] == targets.shape
    return jnp.swapaxes(outputs, 1, 2) if not rows and _is_span(outputs, targets) else outputs


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Squared error, averaged over the positions of each example: `[n, ...]` and `[n, ...]` to `[n]`.

    Raises:
      ValueError: the shapes differ.

    >>> import jax.numpy as jnp
    >>> squared_error(jnp.array([[1.0], [3.0]]), jnp.zeros([2, 1])).tolist()
    [1.0, 9.0]
    """
    if outputs.shape != targets.shape:
        raise ValueError(f"targets must have the shape of outputs {outputs.shape}, got {targets.shape}")
    return jnp.mean(jnp.square(outputs - targets), axis=tuple(range(1, outputs.ndim)))


def kept_examples(examples: Examples) -> jax.Array:
    """`[n]` bool: examples that the mask keeps and that have at least one target that counts.

    >>> import numpy as np
    >>> kept_examples(Examples(np.zeros(3), np.array([0, -1, 1]), np.array([True, True, False]))).tolist()
    [True, False, False]
    """
    kept = jnp.asarray(examples.mask)
    targets = examples.targets
    if is_integer(targets):
        kept &= jnp.any(targets >= 0, axis=tuple(range(1, targets.ndim)))
    return kept


def is_integer(targets: Any) -> bool:
    """Whether targets are class labels.

    >>> is_integer(jnp.array([1])), is_integer(jnp.array([1.0]))
    (True, False)
    """
    return hasattr(targets, "dtype") and jnp.issubdtype(targets.dtype, jnp.integer)


def mean_loss(loss: Loss, outputs: Any, examples: Examples) -> jax.Array:
    """The mean of `loss(outputs, targets) -> [n]` over the kept examples; 0 where none is kept.

    >>> import numpy as np
    >>> examples = Examples(np.zeros(2), np.array([[1.0], [5.0]]), np.array([True, False]))
    >>> float(mean_loss(squared_error, jnp.zeros([2, 1]), examples))
    1.0
    """
    kept = kept_examples(examples)
    losses = loss(outputs, clear_padding(examples.targets, examples.mask))
    # where, not a product: a padding example may be NaN and must still not count
    total = jnp.sum(jnp.where(kept, losses, 0))
    return total / jnp.maximum(jnp.sum(kept), 1).astype(total.dtype)


def clear_padding(tree: Any, mask: Array | None) -> Any:
    """Zeros in place of what stands in padding examples: leaves `[n, ...]`, mask `[n]` or None.

    Masking the losses alone is not enough: the gradient of a masked loss is zero times what is there, and zero
    times NaN is NaN.

    >>> clear_padding(jnp.array([1.0, jnp.nan]), jnp.array([True, False])).tolist()
    [1.0, 0.0]
    """
    if mask is None:
        return tree

    def clear(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        kept = jnp.expand_dims(jnp.asarray(mask), tuple(range(1, leaf.ndim)))
        return jnp.where(kept, leaf, jnp.zeros_like(leaf))

    return jax.tree.map(clear, tree)


def mask_classes(logits: jax.Array, class_mask: Array | None) -> jax.Array:
    """Gives absent classes a large negative logit.

    Args:
      logits: `[..., c]`.
      class_mask: `[ways]` bool with `ways <= c`, or None for no absent class. Outputs above `ways` are absent.

    Raises:
      ValueError: there are more classes than outputs.

    >>> mask_classes(jnp.zeros([1, 3]), jnp.array([True, False]))[0].tolist()
    [0.0, -1000000000.0, -1000000000.0]
    """
    if class_mask is None:
        return logits
    width, ways = logits.shape[-1], class_mask.shape[0]
    if ways > width:
        raise ValueError(f"ways must be at most {width}, the number of outputs of the model, got {ways}")
    present = jnp.pad(jnp.asarray(class_mask), (0, width - ways))
    return jnp.where(present, logits, jnp.asarray(ABSENT, logits.dtype))


def accuracy(outputs: jax.Array, examples: Examples) -> jax.Array:
    """Fraction of kept targets whose largest logit is right, averaged over the kept examples.

    Args:
      outputs: `[n, ..., c]` logits, or those of spans, `[n, length, 2]`, whose two ends count one half each.
      examples: with integer targets `[n, ...]`; `[n, 2]` for spans.

    >>> import numpy as np
    >>> examples = Examples(np.zeros(2), np.array([0, 1]), np.ones(2, bool))
    >>> float(accuracy(jnp.array([[1.0, 0.0], [1.0, 0.0]]), examples))
    0.5
    """
    right = jnp.argmax(by_target(outputs, examples.targets), axis=-1) == examples.targets

    def fraction(hits: jax.Array, targets: jax.Array) -> jax.Array:
        kept, axes = targets >= 0, tuple(range(1, targets.ndim))
        return jnp.sum(hits & kept, axis=axes) / jnp.maximum(jnp.sum(kept, axis=axes), 1)

    return mean_loss(lambda hits, targets: fraction(hits, targets), right, examples)


def count_ways(examples: Examples, ways: int | None = None) -> int:
    """The static number of classes of a task.

    Taken from the length of `class_mask`, else from the argument `ways`, else from the concrete targets of the
    kept examples (1 where none is kept).

    Raises:
      ValueError: none of the three is known, as under `jit` without a class mask.

    >>> import numpy as np
    >>> count_ways(Examples(np.zeros(2), np.array([0, 4]), np.ones(2, bool)))
    5
    """
    if examples.class_mask is not None:
        return int(examples.class_mask.shape[0])
    if ways is not None:
        return ways
    if isinstance(examples.targets, jax.core.Tracer) or isinstance(examples.mask, jax.core.Tracer):
        raise ValueError(
            "the number of ways is unknown: under jit, give support.class_mask ([ways] bool) or the learner's ways="
        )
    kept = np.asarray(examples.targets)[np.asarray(examples.mask)]
    return int(np.max(kept, initial=0)) + 1
