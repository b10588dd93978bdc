"""Calls a model with the arguments it needs, and masks its outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from metajax.core import _losses
from metajax.core._types import Array, Aux, Examples, Model, Params, TaskType


class Adapted(NamedTuple):
    """A model adapted to one task.

    Attributes:
      params: parameters of the model (the base is shared, not copied).
      class_mask: `[ways]` bool or None; the classes that the task has.
      stats: statistics of the support set, or None.
      head: what the learner adds on top of the model, such as prototypes or a task's linear head; or None.

    >>> Adapted._fields
    ('params', 'class_mask', 'stats', 'head')
    """

    params: Params
    class_mask: Array | None
    stats: Any = None
    head: Any = None


def forward(
    model: Model, params: Params, inputs: Any, *, mask: Any = None, key: Any = None, stats: Any = None
) -> tuple[Any, Any]:
    """Returns `(outputs, stats)`; stats is None if the model keeps none. Inputs in padding are cleared first."""
    available = {"mask": mask, "key": key, "stats": stats}
    unknown = [name for name in model.needs if name not in available]
    if unknown:
        raise ValueError(f"needs must be among 'mask', 'key' and 'stats', got {unknown[0]!r}")
    inputs = _losses.clear_padding(inputs, mask)
    outputs = model.apply(params, inputs, **{name: available[name] for name in model.needs})
    return outputs if "stats" in model.needs else (outputs, None)


def support_stats(model: Model, params: Params, support: Examples, key: Any) -> Any:
    """Returns statistics of the support set under `params`, or None if the model keeps none."""
    if "stats" not in model.needs:
        return None
    return forward(model, params, support.inputs, mask=support.mask, key=key)[1]


def masked(outputs: Any, class_mask: Array | None) -> Any:
    """Masks the outputs of absent classes; structured and regression outputs pass through."""
    return outputs if class_mask is None else _losses.mask_classes(outputs, class_mask)


def query_loss(predict: Callable[..., Any], task: TaskType) -> Callable[..., tuple[jax.Array, Aux]]:
    """Makes the `outer_loss` of a learner: the mean loss of its predictions for the kept query examples."""

    def outer_loss(adapted: Any, meta_params: Params, query: Examples, *, key: Any = None) -> tuple[jax.Array, Aux]:
        del meta_params
        outputs = predict(adapted, query.inputs, mask=query.mask, key=key)
        return _losses.mean_loss(task, outputs, query), Aux(outputs)

    return outer_loss
