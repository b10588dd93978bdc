"""Judges, which define what is predicted for a query set, what is kept of the outputs, and the scores.

`evaluate` runs any judge. Its default judge depends on the task type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from metajax.core import _keys, _losses
from metajax.core._objective import outer_objective
from metajax.core._types import Episode, Examples, Learner, Metric, Params, TaskType


class Prepared(NamedTuple):
    """A batch of episodes in the form that a judge requires.

    Attributes:
      support: the support sets, leaves `[batch, ...]`.
      query: the inputs to predict and everything else that the judge reads on the device, leaves `[batch, ...]`.
      notes: everything that the judge reads on the host.
    """

    support: Examples
    query: Any
    notes: Any = None


class Judge(Protocol):
    """Scores the predictions of episodes. Equal judges share a compiled program.

    Attributes:
      metric: the metric that `evaluate` reports.
      before: whether `evaluate` also computes the scores before adaptation by default.
    """

    @property
    def metric(self) -> Metric: ...

    @property
    def before(self) -> bool: ...

    def check(self, source: Any) -> None:
        """Raises a ValueError if the judge cannot score episodes of a source."""
        ...

    def prepare(self, source: Any, chunk: Episode, seed: int, start: int) -> Prepared:
        """Prepares a batch of episodes on the host. The first episode has the number `start`."""
        ...

    def run(self, learner: Learner, num_steps: int | None) -> Callable[[Params, Examples, Any, Any], Any]:
        """Returns `(params, support, query, key) -> values` for one task, which is compiled and may be vmapped."""
        ...

    def score(self, source: Any, values: Any, notes: Any) -> dict[str, np.ndarray]:
        """Returns scores `[batch]` by name, including that of `metric`, from values with a leading axis `[batch]`."""
        ...

    def rows(self, source: Any) -> dict[str, str]:
        """Returns additional rows for the table of an evaluation."""
        ...


def adapt_and_predict(learner: Learner, num_steps: int | None) -> Callable[..., Any]:
    """Returns a function `(params, support, inputs, mask, key) -> outputs` for one task."""

    def outputs(params: Params, support: Examples, inputs: Any, mask: Any, key: Any) -> Any:
        keys = _keys.of_task(key)
        adapted = learner.adapt(params, support, num_steps=num_steps, key=keys.adapt)
        return learner.predict(adapted, inputs, mask=mask, key=keys.outer)

    return outputs


@dataclasses.dataclass(frozen=True)
class ByMetric:
    """Scores the metric of a task type, averaged over kept query examples, and counts outputs that are not finite."""

    task: TaskType
    before: bool = False

    @property
    def metric(self) -> Metric:
        return self.task.metric

    def check(self, source: Any) -> None:
        pass

    def prepare(self, source: Any, chunk: Episode, seed: int, start: int) -> Prepared:
        del seed
        if not np.any(chunk.query.mask, axis=-1).all():
            raise ValueError(
                f"{source.name} ({source.split}) gives an episode without query examples, from {start} to "
                f"{start + len(chunk.query.mask) - 1}"
            )
        return Prepared(chunk.support, chunk.query)

    def run(self, learner: Learner, num_steps: int | None) -> Callable[[Params, Examples, Any, Any], Any]:
        outputs = adapt_and_predict(learner, num_steps)

        def values(params: Params, support: Examples, query: Examples, key: Any) -> Any:
            found = outputs(params, support, query.inputs, query.mask, key)
            scores = self.task.metric.score(found, _losses.clear_padding(query.targets, query.mask))
            _losses.check_loss(scores, len(query.mask), f"metric {self.metric.name!r}: score")
            kept = _losses.kept_examples(self.task, query)
            return _losses.mean_over(scores, kept), jnp.sum(kept & ~_finite(found))

        return values

    def score(self, source: Any, values: Any, notes: Any) -> dict[str, np.ndarray]:
        scores, broken = values
        return {self.metric.name: scores, "nonfinite": broken}

    def rows(self, source: Any) -> dict[str, str]:
        return {}


@dataclasses.dataclass(frozen=True)
class ByLoss:
    """Scores the outer objective itself, for objectives of inner losses that do not predict the query set."""

    before: bool = False

    @property
    def metric(self) -> Metric:
        return Metric("loss", lambda outputs, targets: outputs, higher_is_better=False, percent=False)

    def check(self, source: Any) -> None:
        pass

    def prepare(self, source: Any, chunk: Episode, seed: int, start: int) -> Prepared:
        return Prepared(chunk.support, chunk.query)

    def run(self, learner: Learner, num_steps: int | None) -> Callable[[Params, Examples, Any, Any], Any]:
        def values(params: Params, support: Examples, query: Examples, key: Any) -> Any:
            return outer_objective(learner, params, Episode(support, query), key=key, num_steps=num_steps)[0]

        return values

    def score(self, source: Any, values: Any, notes: Any) -> dict[str, np.ndarray]:
        return {"loss": values, "nonfinite": ~np.isfinite(values)}

    def rows(self, source: Any) -> dict[str, str]:
        return {}


def _finite(outputs: Any) -> jax.Array:
    """Returns `[n]` bool: examples whose outputs have no NaN and no infinity, except -inf next to finite numbers."""

    def of_leaf(leaf: jax.Array) -> jax.Array:
        rows = leaf if leaf.ndim > 1 else leaf[:, None]
        return jnp.all(_losses.usable(rows), axis=tuple(range(1, rows.ndim - 1)))

    return jnp.all(jnp.stack([of_leaf(leaf) for leaf in jax.tree.leaves(outputs)]), axis=0)
