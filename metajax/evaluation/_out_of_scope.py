"""Telling queries of a task's classes from inputs of no class, on fixed episodes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metajax.core import _losses, _rng, _validate
from metajax.core._types import Episode, Learner, Params
from metajax.data._episodes import check_source, episode_batch
from metajax.data._sources import ClassSource, Source, cut_to, read
from metajax.data._spec import EpisodeSpec
from metajax.evaluation import _fewshot, _metrics

Score = Literal["probability", "logit"]
_STREAM = 1  # of random numbers; shuffled support labels have another


class OutOfScope(NamedTuple):
    """What `evaluate_out_of_scope` found; its `str` is one line.

    Attributes:
      score: "probability" or "logit", of which the largest tells queries from the rest.
      mean: mean AUROC over episodes.
      ci95: half width of the 95 % interval, `1.96 s / sqrt(n)` with the sample standard deviation s.
      values: `[episodes]`, the AUROC of each episode.
      episodes: how many.
      seed: of the list of episodes.

    >>> print(OutOfScope("logit", 0.9, 0.01, np.full(600, 0.9), 600, 0))
    out-of-scope AUROC 90.00 +- 1.00 % (600 episodes, largest logit)
    """

    score: Score
    mean: float
    ci95: float
    values: np.ndarray
    episodes: int
    seed: int

    def __str__(self) -> str:
        mean, ci95 = 100 * self.mean, 100 * self.ci95
        return f"out-of-scope AUROC {mean:.2f} +- {ci95:.2f} % ({self.episodes} episodes, largest {self.score})"


def evaluate_out_of_scope(
    learner: Learner,
    params: Params,
    source: Source,
    outside: ClassSource,
    spec: EpisodeSpec,
    *,
    score: Score = "probability",
    episodes: int = 600,
    seed: int = 0,
    num_steps: int | None = None,
    batch: int = 20,
    key: jax.Array | None = None,
    progress: Callable[[int], None] | None = None,
) -> OutOfScope:
    """How well an adapted learner tells queries of its classes from inputs of none of them.

    The episodes are those of `evaluate`. Beside the query set of each stand as many inputs from outside of all classes,
    drawn without replacement by `seed` and the number of the episode, and predicted in the same call.

    Args:
      learner: what adapts.
      params: its meta-parameters.
      source: where episodes are drawn from, of classes.
      outside: inputs of no class; its labels do not matter.
      spec: size of the episodes.
      score: what is high for queries of the classes: the largest "probability" (Hendrycks and Gimpel 2017), or the
        largest "logit" (Hendrycks et al. 2022), which is the nearest prototype of a prototypical network and stays low
        where all of them are far.
      episodes: how many, at least 2.
      seed: which list of episodes, 0 or above.
      num_steps: inner steps, where the learner takes a number; None is the learner's own.
      batch: episodes in one compiled call.
      key: PRNG key for learners that draw (episode k folds in k); None is deterministic.
      progress: called after each batch with the number of episodes that are done.

    Returns:
      An `OutOfScope`. An episode with an output that is NaN has the AUROC NaN.

    Raises:
      ValueError: an argument is out of range, the source is too small for `spec` or has no classes, or the most ways
        of `spec` exceed the outputs of the model.

    Source: Hendrycks and Gimpel 2017, arXiv:1610.02136; Hendrycks et al. 2022, arXiv:1911.11132; the protocol with
      texts of no intent is that of Larson et al. 2019, arXiv:1909.02027.

    >>> import metajax
    >>> inputs = np.array([[0.0, 1.0], [0.0, 1.1], [1.0, 0.0], [1.1, 0.0]])
    >>> source = ClassSource("toy", "test", inputs, np.array([0, 0, 1, 1]), ("up", "right"))
    >>> outside = ClassSource("toy", "test", np.full([9, 2], 5.0), np.zeros(9, int), ("none",))
    >>> learner = metajax.learners.prototypical(metajax.Model(lambda key, x: (), lambda params, x: x))
    >>> evaluate_out_of_scope(learner, (), source, outside, EpisodeSpec(2, 1, 1), score="logit", episodes=10).mean
    1.0
    """
    _validate.instance("learner", learner, Learner)
    check_source(source, spec)
    _validate.instance("outside", outside, ClassSource)
    _validate.one_of("score", score, ("probability", "logit"))
    _validate.int_at_least("episodes", episodes, 2)
    _validate.int_at_least("seed", seed, 0)
    batch = min(_validate.positive_int("batch", batch), episodes)
    params = jax.tree.map(_fewshot.settled, params)
    values: list[float] = []
    for start in range(0, episodes, batch):
        chunk = episode_batch(source, spec, seed=seed, start=start, count=batch)
        if not _losses.is_integer(chunk.query.targets):
            raise ValueError(f"source must have classes, got {source.name} ({source.split}) of real targets")
        chunk, others = _beside(chunk, outside, seed, start)
        first: Episode = jax.tree.map(lambda leaf: leaf[0], chunk)
        found = _confidences(
            params, chunk, others, key, start,
            learner=learner, num_steps=num_steps, score=score, side_by_side=_fewshot.side_by_side(first),
        )  # fmt: skip
        slots = chunk.query.mask.shape[1]
        for line, mask in zip(np.asarray(found), chunk.query.mask, strict=True):
            inside, beyond = line[:slots][mask], line[slots:]
            positive = np.arange(len(inside) + len(beyond)) < len(inside)
            values.append(_metrics.auroc(np.concatenate([inside, beyond]), positive))
        if progress is not None:
            progress(min(start + batch, episodes))
    kept = np.array(values[:episodes])
    mean, ci95 = _metrics.mean_and_interval(kept)
    return OutOfScope(score, mean, ci95, kept, episodes, seed)


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


@functools.partial(jax.jit, static_argnames=("learner", "num_steps", "score", "side_by_side"))
def _confidences(
    params: Params, episodes: Episode, others: Any, key: Any, start: Any, *,
    learner: Learner, num_steps: int | None, score: Score, side_by_side: bool,
) -> jax.Array:  # fmt: skip
    """`[batch, n + m]`: the largest logit, or log-odds, of each query, then of each input from outside."""
    outputs = _fewshot.adapt_and_predict(learner, num_steps)

    def one(task: tuple[jax.Array, Episode, Any]) -> jax.Array:
        index, (support, query), beyond = task
        inputs = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), query.inputs, beyond)
        size = jax.tree.leaves(beyond)[0].shape[0]
        mask = jnp.concatenate([query.mask, jnp.ones(size, bool)])
        logits = outputs(params, support, inputs, mask, _rng.fold(key, index))
        return _log_odds(logits) if score == "probability" else jnp.max(logits, axis=-1)

    tasks = (start + jnp.arange(episodes.support.mask.shape[0]), episodes, others)
    return jax.vmap(one)(tasks) if side_by_side else jax.lax.map(one, tasks)


def _log_odds(logits: jax.Array) -> jax.Array:
    """Log-odds of the largest probability: of the same order, and apart where probabilities have been rounded to 1."""
    largest = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=bool)
    return jnp.max(logits, axis=-1) - jax.nn.logsumexp(jnp.where(largest, -jnp.inf, logits), axis=-1)
