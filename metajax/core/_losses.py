"""Per-example losses, and the masks that apply to every mean and every logit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metajax.core._types import Array, Examples, Loss, TaskType


def absent_logit(dtype: Any) -> float:
    """Returns the logit of an absent class: large, negative, and finite in `dtype`.

    The gradient of a masked logit is then zero and never NaN.

    >>> absent_logit(jnp.float32), absent_logit(jnp.float16)
    (-1000000000.0, -32752.0)
    """
    return max(-1e9, float(jnp.finfo(dtype).min) / 2)


def cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Softmax cross-entropy with integer labels, averaged over the kept positions of each example.

    Args:
      outputs: `[n, ..., c]` logits.
      targets: `[n, ...]` integers; negative targets are ignored.

    Returns:
      `[n]` losses; 0 for an example without a kept position.

    Raises:
      ValueError: the shapes do not match, or the targets are not integers.

    >>> import jax.numpy as jnp
    >>> cross_entropy(jnp.zeros([1, 4]), jnp.array([2])).shape
    (1,)
    """
    check_labels_fit(outputs, targets)
    kept = targets >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.where(kept, targets, 0))
    axes = tuple(range(1, targets.ndim))
    total = jnp.sum(jnp.where(kept, losses, 0), axis=axes)
    return total / jnp.maximum(jnp.sum(kept, axis=axes), 1).astype(total.dtype)


def check_labels_fit(outputs: Any, targets: Any) -> None:
    """Raises a ValueError unless the targets are integers, one for each row of logits.

    >>> check_labels_fit(jnp.zeros([3, 5]), jnp.zeros(3, int))
    """
    require_labels(targets)
    if jnp.shape(outputs)[:-1] != jnp.shape(targets):
        raise ValueError(
            f"targets must have the shape of outputs {jnp.shape(outputs)} without its last axis, got "
            f"{jnp.shape(targets)}"
        )


def require_labels(targets: Any) -> None:
    """Raises a ValueError unless the targets are an array of integers.

    >>> require_labels(np.zeros(3, int))
    """
    kind = getattr(targets, "dtype", None)
    if kind is None or not jnp.issubdtype(kind, jnp.integer):
        raise ValueError(
            f"targets must be integers, labels of classes, got {type(targets).__name__ if kind is None else kind}: "
            "other targets need another task type, such as task=metajax.tasks.regression, or a loss= of their own"
        )


def span_cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Loss of extractive question answering: mean softmax cross-entropy of the first and the last position.

    Positions that cannot be part of an answer (padding) must have large negative logits. The span heads of models
    return such logits.

    Args:
      outputs: `[n, length, 2]` logits: each position as the first position of the span, and as the last one.
      targets: `[n, 2]` integers, the first and the last position, both inclusive; negative targets are ignored.

    Returns:
      `[n]` losses; 0 for an example whose two targets are ignored.

    Raises:
      ValueError: the shapes do not match.

    Source: Devlin et al. 2019, section 4.2 (arXiv:1810.04805).

    >>> import jax.numpy as jnp
    >>> span_cross_entropy(jnp.zeros([1, 4, 2]), jnp.array([[1, 2]])).shape
    (1,)
    """
    return cross_entropy(by_end(outputs, targets), targets)


def by_end(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Transposes logits of spans `[n, length, 2]` to one row for each end, `[n, 2, length]`.

    Raises:
      ValueError: the shapes do not match.

    >>> by_end(jnp.zeros([3, 7, 2]), jnp.zeros([3, 2], int)).shape
    (3, 2, 7)
    """
    if outputs.ndim != 3 or outputs.shape[2] != 2 or targets.shape != (outputs.shape[0], 2):
        raise ValueError(
            f"targets of spans must be [n, 2] for outputs [n, length, 2], got {targets.shape} and {outputs.shape}"
        )
    return jnp.swapaxes(outputs, 1, 2)


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Squared error, averaged over the positions of each example: `[n, ...]` and `[n, ...]` to `[n]`.

    Targets are numbers; integers are accepted.

    Raises:
      ValueError: the shapes differ.

    >>> import jax.numpy as jnp
    >>> squared_error(jnp.array([[1.0], [3.0]]), jnp.zeros([2, 1])).tolist()
    [1.0, 9.0]
    """
    if outputs.shape != targets.shape:
        raise ValueError(f"targets must have the shape of outputs {outputs.shape}, got {targets.shape}")
    return jnp.mean(jnp.square(outputs - targets), axis=tuple(range(1, outputs.ndim)))


def kept_examples(task: TaskType, examples: Examples) -> jax.Array:
    """Returns `[n]` bools: True for examples that the mask keeps and that have at least one target that counts.

    Raises:
      ValueError: the mask does not have one entry for each example.

    >>> import numpy as np, metajax
    >>> examples = Examples(np.zeros(3), np.array([0, -1, 1]), np.array([True, True, False]))
    >>> kept_examples(metajax.tasks.classification, examples).tolist()
    [True, False, False]
    """
    mask = jnp.asarray(examples.mask)
    if not jax.tree.leaves(examples.targets):
        return mask
    counts = jnp.asarray(task.counts(examples.targets))
    if jnp.ndim(counts) != 1 or counts.dtype != bool:
        raise ValueError(
            f"counts of the task type {task.name!r} must return a bool for each example, [n], got "
            f"{counts.dtype.name}{list(jnp.shape(counts))}"
        )
    if mask.shape != counts.shape:
        raise ValueError(f"mask must be [{counts.shape[0]}], one for each example, got shape {list(mask.shape)}")
    return mask & counts


def mean_loss(task: TaskType, outputs: Any, examples: Examples) -> jax.Array:
    """Returns the mean of the task type's loss over the kept examples; 0 if none is kept.

    Raises:
      ValueError: the loss does not return one number for each example; or, if values are known, a label is not below
        the number of outputs or belongs to a class that the task does not have.

    >>> import numpy as np, metajax
    >>> examples = Examples(np.zeros(2), np.array([[1.0], [5.0]]), np.array([True, False]))
    >>> float(mean_loss(metajax.tasks.regression, jnp.zeros([2, 1]), examples))
    1.0
    """
    kept = kept_examples(task, examples)
    if task.classes:
        check_labels(examples, jnp.shape(outputs)[-1])
    losses = task.loss(outputs, clear_padding(examples.targets, examples.mask))
    check_loss(losses, len(kept))
    return mean_over(losses, kept)


def mean_over(values: jax.Array, kept: jax.Array) -> jax.Array:
    """Returns the mean of the `[n]` values where `kept` is True; 0 if it is False everywhere.

    >>> float(mean_over(jnp.array([1.0, jnp.nan]), jnp.array([True, False])))
    1.0
    """
    # `where` instead of a product, because a padding example may be NaN and must not count
    total = jnp.sum(jnp.where(kept, values, 0))
    return total / jnp.maximum(jnp.sum(kept), 1).astype(total.dtype)


def check_loss(losses: Any, count: int, name: str = "loss") -> None:
    """Raises a ValueError unless there is one loss for each example; `name` is the name of the loss function.

    >>> check_loss(jnp.zeros(3), 3)
    """
    if jnp.shape(losses) != (count,):
        raise ValueError(
            f"{name}(outputs, targets) must return one number for each of the {count} examples, shape ({count},), got "
            f"shape {jnp.shape(losses)}"
        )


def per_example(loss: Loss) -> Loss:
    """Returns a loss that is computed on one example at a time, so that its arrays never broadcast across examples.

    Raises (when called):
      ValueError: the loss does not return one number for each example.

    >>> wrong = per_example(lambda outputs, targets: jnp.mean((outputs - targets) ** 2, axis=-1))  # [3, 1] and [3]
    >>> wrong(jnp.array([[1.0], [2.0], [3.0]]), jnp.array([1.0, 2.0, 3.0])).tolist()
    [0.0, 0.0, 0.0]
    """

    def losses(outputs: Any, targets: Any) -> jax.Array:
        check_loss(jax.eval_shape(loss, outputs, targets), len(jax.tree.leaves(targets)[0]))
        one = jax.vmap(lambda *example: loss(*jax.tree.map(lambda leaf: leaf[None], example)))
        return one(outputs, targets)[:, 0]

    return losses


def check_labels(examples: Examples, outputs: int | None = None) -> None:
    """Checks that all labels belong to classes of the task, if the values are known (not while tracing).

    Args:
      examples: examples of a task whose targets are labels.
      outputs: number of classes that the model distinguishes, None to skip this check.

    Raises:
      ValueError: a kept label is not below the number of outputs or the length of the class mask, or belongs to a
        class that the task does not have.

    >>> check_labels(Examples(np.zeros(2), np.array([0, 7]), np.array([True, False])), 5)
    """
    _, targets, mask, class_mask = examples
    if any(isinstance(part, jax.core.Tracer) for part in (targets, mask, class_mask)):
        return
    require_labels(targets)
    _check_mask(np.shape(mask), np.shape(targets))
    labels = np.asarray(targets)[np.asarray(mask, bool)]
    limits = {"outputs of the model": outputs, "entries of class_mask": None if class_mask is None else len(class_mask)}
    for what, limit in limits.items():
        if limit is not None and np.any(labels >= limit):
            raise ValueError(f"targets must be labels below {limit}, the number of {what}, got {labels.max()}")
    if class_mask is not None:
        labels = labels[labels >= 0]
        absent = labels[~np.asarray(class_mask)[labels]]
        if absent.size:
            raise ValueError(f"targets must be labels of classes that class_mask has, got {absent[0]}")


def clear_padding(tree: Any, mask: Array | None, *, strict: bool = True) -> Any:
    """Replaces the values of padding examples by zeros: leaves `[n, ...]`, mask `[n]` or None.

    A mask may have more axes, such as `[steps, n]` for leaves `[steps, n, ...]`. Without `strict`, leaves that do not
    begin with the axes of the mask are returned unchanged.

    Masking only the losses is not enough: the gradient of a masked loss is zero times the value in the padding, and
    zero times NaN is NaN.

    Raises:
      ValueError: the mask does not have one entry for each example.

    >>> clear_padding(jnp.array([1.0, jnp.nan]), jnp.array([True, False])).tolist()
    [1.0, 0.0]
    """
    if mask is None:
        return tree

    def clear(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        if not strict and leaf.shape[: kept.ndim] != kept.shape:
            return leaf
        _check_mask(kept.shape, leaf.shape)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):  # keys
            return leaf
        return jnp.where(jnp.expand_dims(kept, tuple(range(kept.ndim, leaf.ndim))), leaf, jnp.zeros_like(leaf))

    kept = jnp.asarray(mask)
    return jax.tree.map(clear, tree)


def _check_mask(mask: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if shape[: len(mask)] != mask:
        raise ValueError(
            f"mask must be [n], one for each example, got shape {list(mask)} for an array of shape {list(shape)}"
        )


def mask_classes(logits: jax.Array, class_mask: Array | None) -> jax.Array:
    """Sets the logits of absent classes to a large negative number.

    Args:
      logits: `[..., c]`.
      class_mask: `[ways]` bool with `ways <= c`, or None if no class is absent. Outputs from `ways` on are absent.

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
    return jnp.where(present, logits, jnp.asarray(absent_logit(logits.dtype), logits.dtype))


def usable(outputs: Any) -> jax.Array:
    """Returns `[n, ...]` bools: True for rows of logits `[n, ..., c]` without NaN and with a finite largest logit.

    >>> usable(jnp.array([[0.0, 1.0], [0.0, jnp.nan], [-jnp.inf, 2.0]])).tolist()
    [True, False, True]
    """
    return jnp.isfinite(jnp.max(outputs, axis=-1))  # the maximum of a row with a NaN is NaN


def hits(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the fraction of correct predictions among the kept targets of each example, `[n]`; 0 if none is kept.

    A row of logits that contains a NaN, or whose largest logit is not finite, counts as wrong.

    Args:
      outputs: `[n, ..., c]` logits.
      targets: `[n, ...]` integers; negative targets are ignored.

    Raises:
      ValueError: the shapes do not match, or the targets are not integers.

    >>> hits(jnp.array([[1.0, 0.0], [jnp.nan, 0.0]]), jnp.array([0, 0])).tolist()
    [1.0, 0.0]
    """
    check_labels_fit(outputs, targets)
    right = (jnp.argmax(outputs, axis=-1) == targets) & usable(outputs)
    kept, axes = targets >= 0, tuple(range(1, jnp.ndim(targets)))
    return jnp.sum(right & kept, axis=axes) / jnp.maximum(jnp.sum(kept, axis=axes), 1)


def accuracy(outputs: jax.Array, examples: Examples) -> jax.Array:
    """Fraction of kept labels that are predicted correctly, averaged over the kept examples.

    A prediction is the largest logit. A row of logits that contains a NaN, or whose largest logit is not finite,
    counts as wrong.

    Args:
      outputs: `[n, ..., c]` logits.
      examples: examples with integer targets `[n, ...]`; negative targets are ignored.

    Raises:
      ValueError: the shapes do not match, or the targets are not integers.

    >>> import numpy as np
    >>> examples = Examples(np.zeros(2), np.array([0, 1]), np.ones(2, bool))
    >>> float(accuracy(jnp.array([[1.0, 0.0], [1.0, 0.0]]), examples))
    0.5
    """
    targets = jnp.asarray(examples.targets)
    counts = jnp.any(targets >= 0, axis=tuple(range(1, targets.ndim)))
    return mean_over(hits(outputs, targets), jnp.asarray(examples.mask) & counts)


def count_ways(examples: Examples, ways: int | None = None) -> int:
    """Returns the static number of classes of a task.

    It is the length of `class_mask` if there is one, else the argument `ways`, else the largest concrete target of
    the kept examples plus 1 (1 if none is kept).

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
