"""Lookup of the task type of a learner or of a loss."""

from __future__ import annotations

from metajax.core import Learner, Metric, TaskType
from metajax.core._losses import per_example
from metajax.core._types import OWN, Loss
from metajax.tasks._classification import classification
from metajax.tasks._multiple_choice import multiple_choice
from metajax.tasks._next_token import next_token_prediction
from metajax.tasks._regression import every, regression
from metajax.tasks._spans import spans

ALL = (classification, regression, next_token_prediction, spans, multiple_choice)


def of(learner: Learner) -> TaskType:
    """Returns the task type of a learner; classification if the learner has none.

    >>> import metajax
    >>> of(metajax.learners.prototypical(metajax.models.mlp(4))).name
    'classification'
    """
    return classification if learner.task is None else learner.task


def resolve(task: TaskType | None = None, loss: Loss | None = None) -> TaskType:
    """Returns the task type that the arguments `task` and `loss` of a learner describe.

    | `task` | `loss` | |
    |---|---|---|
    | given | None | that task type |
    | given | given | that task type, trained on the loss |
    | None | None | classification |
    | None | of a task type, such as `metajax.core.squared_error` | that task type |
    | None | any other | its own: every example that the mask keeps counts, and the loss is the only metric |

    A loss that does not belong to a task type is computed on one example at a time.

    Args:
      task: a task type or None.
      loss: `(outputs, targets) -> [n]`, or None.

    Raises:
      ValueError: `task` is not a task type, or `loss` is not a function.

    >>> import metajax
    >>> resolve(loss=metajax.core.squared_error).name
    'regression'
    >>> resolve(loss=lambda outputs, targets: abs(outputs - targets)).metric.name
    'loss'
    """
    if task is not None and not isinstance(task, TaskType):
        raise ValueError(f"task must be of type TaskType, such as metajax.tasks.regression, got {task!r}")
    if loss is not None and not callable(loss):
        raise ValueError(f"loss must be a function (outputs, targets) -> [n], got {loss!r}")
    if loss is None:
        return classification if task is None else task
    for known in ALL:
        if loss is known.loss and task in (None, known):
            return known
    alone = per_example(loss)
    if task is not None:
        return task._replace(loss=alone)
    metric = Metric("loss", alone, higher_is_better=False, percent=False)
    return TaskType(OWN, alone, metric, every, lambda examples: None)


def require_same(task: TaskType | None, other: TaskType | None, *, name: str, other_name: str) -> None:
    """Raises a ValueError if two parts have different task types.

    A part without a task type, or with a task type that is defined by a loss, is accepted with any other.

    >>> require_same(regression, regression, name="source", other_name="learner")
    """
    if task is None or other is None:
        return
    if task.name != other.name and OWN not in (task.name, other.name):
        raise ValueError(
            f"{name} and {other_name} must be of one task type, got {task.name} of {name} and {other.name} of "
            f"{other_name}"
        )
