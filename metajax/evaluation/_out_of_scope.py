"""Telling queries of a task's classes from inputs of no class, on fixed episodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from metajax.core import _validate
from metajax.core._types import Episode, Examples, Learner, Metric, Params
from metajax.data._sources import ClassSource, cut_to, read
from metajax.evaluation import _metrics
from metajax.evaluation._judges import Judge, Prepared, adapt_and_predict
from metajax.tasks import classification
from metajax.tasks._lookup import require_same

Score = Literal["probability", "logit"]
_STREAM = 1  # of random numbers; shuffled support labels have another


def out_of_scope(outside: ClassSource, *, score: Score = "probability") -> Judge:
    """Judges how well an adapted learner tells queries of its classes from inputs of none of them.

    Beside the query set of each episode stand as many inputs from outside of all classes, drawn without replacement by
    the seed and the number of the episode, and predicted in the same call. The score of an episode is the area under
    the ROC curve; it is NaN where an output is NaN.

    Args:
      outside: inputs of no class; its labels do not matter.
      score: what is high for queries of the classes: the largest "probability" (Hendrycks and Gimpel 2017), or the
        largest "logit" (Hendrycks et al. 2022), which is the nearest prototype of a prototypical network and stays low
        where all of them are far.

    Returns:
      What `evaluate` takes as `judge`; its score is `out_of_scope_auroc`.

    Raises:
      ValueError: an argument of another kind; or (when used) a source without classes.

    Source: Hendrycks and Gimpel 2017, arXiv:1610.02136; Hendrycks et al. 2022, arXiv:1911.11132; the protocol with
      texts of no intent is that of Larson et al. 2019, arXiv:1909.02027.

    >>> import metajax
    >>> inputs = np.array([[0.0, 1.0], [0.0, 1.1], [1.0, 0.0], [1.1, 0.0]])
    >>> source = ClassSource("toy", "test", inputs, np.array([0, 0, 1, 1]), ("up", "right"))
    >>> outside = ClassSource("toy", "test", np.full([9, 2], 5.0), np.zeros(9, int), ("none",))
    >>> learner = metajax.learners.prototypical(metajax.Model(lambda key, x: (), lambda params, x: x))
    >>> judge, spec = out_of_scope(outside, score="logit"), metajax.data.EpisodeSpec(2, 1, 1)
    >>> metajax.evaluation.evaluate(learner, (), source, spec, episodes=10, judge=judge).summary()
    'out of scope auroc 100.00 +- 0.00 % (10 episodes)'
    """
    _validate.instance("outside", outside, ClassSource)
    _validate.one_of("score", score, ("probability", "logit"))
    return _OutOfScope(score, outside)


@dataclasses.dataclass(frozen=True)
class _OutOfScope:
    confidence: Score
    outside: ClassSource = dataclasses.field(compare=False)  # whatever it is, the program is the same
    before: bool = False

    @property
    def metric(self) -> Metric:
        return Metric("out_of_scope_auroc", lambda outputs, targets: outputs)

    def check(self, source: Any) -> None:
        require_same(getattr(source, "task", None), classification, name="source", other_name="out_of_scope()")

    def prepare(self, source: Any, chunk: Episode, seed: int, start: int) -> Prepared:
        chunk, others = _beside(chunk, self.outside, seed, start)
        return Prepared(chunk.support, (chunk.query.inputs, chunk.query.mask, others), chunk.query.mask)

    def run(self, learner: Learner, num_steps: int | None) -> Callable[[Params, Examples, Any, Any], Any]:
        outputs = adapt_and_predict(learner, num_steps)

        def confidences(params: Params, support: Examples, query: Any, key: Any) -> jax.Array:
            """`[n + m]`: the largest logit, or log-odds, of each query, then of each input from outside."""
            inputs, mask, beyond = query
            joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), inputs, beyond)
            size = jax.tree.leaves(beyond)[0].shape[0]
            logits = outputs(params, support, joined, jnp.concatenate([mask, jnp.ones(size, bool)]), key)
            return _log_odds(logits) if self.confidence == "probability" else jnp.max(logits, axis=-1)

        return confidences

    def score(self, source: Any, values: Any, notes: Any) -> dict[str, np.ndarray]:
        slots, found = notes.shape[1], []
        for line, mask in zip(values, notes, strict=True):
            inside, beyond = line[:slots][mask], line[slots:]
            positive = np.arange(len(inside) + len(beyond)) < len(inside)
            found.append(_metrics.auroc(np.concatenate([inside, beyond]), positive))
        return {self.metric.name: np.array(found)}

    def rows(self, source: Any) -> dict[str, str]:
        return {"out of scope": f"{len(self.outside.labels)} inputs, told by the largest {self.confidence}"}


def _beside(chunk: Episode, outside: ClassSource, seed: int, start: int) -> tuple[Episode, Any]:
    """Inputs from outside `[batch, m, ...]`, and the episodes with sequences padded to the same length."""
    count, slots = chunk.query.mask.shape
    size = min(slots, len(outside.labels))
    rows = np.stack([
        np.random.default_rng([seed, start + index, _STREAM]).choice(len(outside.labels), size, replace=False)
        for index in range(count)
    ])  # fmt: skip
    if not outside.length_buckets or outside.lengths is None:
        return chunk, jax.tree.map(lambda leaf: read(leaf, rows), outside.inputs)
    axis = outside.length_axis

    def is_long(leaf: Any) -> bool:
        return leaf.shape[axis : axis + 1] == outside.length_buckets[-1:]

    widths = jax.tree.map(
        lambda leaf, values: values.shape[axis + 1] if is_long(leaf) else 0, outside.inputs, chunk.query.inputs
    )
    needed = max(*jax.tree.leaves(widths), int(outside.lengths[rows].max()))
    length = next(bucket for bucket in (*outside.length_buckets, needed) if bucket >= needed)

    def pad(leaf: Any, values: np.ndarray) -> np.ndarray:
        if not is_long(leaf):
            return values
        return np.pad(
            values, [(0, length - size if place == axis + 1 else 0) for place, size in enumerate(values.shape)]
        )

    query = chunk.query._replace(inputs=jax.tree.map(pad, outside.inputs, chunk.query.inputs))
    others = jax.tree.map(lambda leaf: read(cut_to(outside, leaf, leaf, length), rows), outside.inputs)
    return chunk._replace(query=query), others


def _log_odds(logits: jax.Array) -> jax.Array:
    """Log-odds of the largest probability: of the same order, and apart where probabilities have been rounded to 1."""
    largest = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=bool)
    return jnp.max(logits, axis=-1) - jax.nn.logsumexp(jnp.where(largest, -jnp.inf, logits), axis=-1)
