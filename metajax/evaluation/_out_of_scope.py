"""Detection of inputs that belong to no class of a task, on fixed episodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from metajax.core import _validate
from metajax.core._types import Episode, Examples, Learner, Metric, Params
from metajax.data import ClassSource, cut_to, read
from metajax.evaluation import _metrics
from metajax.evaluation._judges import Judge, Prepared, adapt_and_predict
from metajax.tasks import classification, require_same

Score = Literal["probability", "logit"]
_STREAM = 1  # separates these random numbers from those of shuffled support labels


def out_of_scope(outside: ClassSource, *, score: Score = "probability") -> Judge:
    """Scores how well an adapted learner separates queries of its classes from inputs that belong to no class.

    For each episode, the judge draws as many inputs outside all classes as there are queries. They are drawn without
    replacement, from the seed and the number of the episode, and predicted in the same call as the query set. The score
    of an episode is the area under the ROC curve. It is NaN if an output is NaN.

    Args:
      outside: inputs of no class. Its labels are ignored.
      score: the confidence that separates the two: the largest "probability" (Hendrycks and Gimpel 2017) or the largest
        "logit" (Hendrycks et al. 2022). In a prototypical network, the largest logit is that of the nearest prototype,
        and it is low if all prototypes are far.

    Returns:
      A judge for `evaluate`. Its score is `out_of_scope_auroc`.

    Raises:
      ValueError: an argument is invalid; or (when used) the source has no classes.

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
    outside: ClassSource = dataclasses.field(compare=False)  # does not change the compiled program
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
            """Returns `[n + m]`: the largest logit, or log-odds, of each query and then of each outside input."""
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
    """Returns the episodes, with sequences padded to a common length, and the outside inputs `[batch, m, ...]`."""
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
    """Returns the log-odds of the largest probability, with the same order but distinct if probabilities round to 1."""
    largest = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=bool)
    return jnp.max(logits, axis=-1) - jax.nn.logsumexp(jnp.where(largest, -jnp.inf, logits), axis=-1)
