"""Extractive question answering on fixed episodes: exact match and F1 of texts, before and after adaptation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metajax.core import _rng, _validate
from metajax.core._types import Examples, Learner, Params
from metajax.data._episodes import check_source, episode, episode_batch
from metajax.data._questions import AnswerSource
from metajax.data._sources import cut_to, read
from metajax.data._spec import EpisodeSpec, told
from metajax.evaluation import _answers, _fewshot, _metrics

_RULES = ("squad", "mlqa")
_NO_SPAN = (-1, -1, -np.inf)  # start, end and score of a window that is none


class AnswerScores(NamedTuple):
    """Exact match and F1 of one learner, fractions in [0, 1].

    Attributes:
      exact_match: mean over episodes.
      exact_match_ci95: half width of the 95 % interval.
      f1: likewise.
      f1_ci95: likewise.
      values: `[episodes, 2]`, exact match and F1 of each episode.

    >>> print(AnswerScores(0.5, 0.01, 0.625, 0.02, np.zeros([600, 2])))
    exact match 50.00 +- 1.00 %, F1 62.50 +- 2.00 %
    """

    exact_match: float
    exact_match_ci95: float
    f1: float
    f1_ci95: float
    values: np.ndarray

    def __str__(self) -> str:
        exact, f1 = (self.exact_match, self.exact_match_ci95), (self.f1, self.f1_ci95)
        return "exact match {:.2f} +- {:.2f} %, F1 {:.2f} +- {:.2f} %".format(*(100 * x for x in (*exact, *f1)))


class AnswerEvaluation(NamedTuple):
    """What `evaluate_answers` found; its `str` is a table.

    Attributes:
      before: without adaptation, or None where the learner has no inner loop.
      after: of the adapted learner.
      episodes: how many.
      seed: of the list of episodes.
      spec: the size of the episodes.
      source: name and split of the source.
      rules: "squad" or "mlqa", see `evaluate_answers`.
      max_answer: most tokens of an answer.
      left_out: questions of the source that no episode draws (`AnswerSource.left_out`).
      transductive: as of an `Evaluation`, measured on the windows that episodes draw.
      normalisation: the policy as the caller named it, or None.

    >>> scores, spec = AnswerScores(0.5, 0.01, 0.625, 0.02, np.zeros([600, 2])), EpisodeSpec(1, 5, 10)
    >>> print(AnswerEvaluation(None, scores, 600, 0, spec, "xquad (test)", "squad", 30, 0))
    source    xquad (test)
    task      5 support and 10 query questions of one article
    episodes  600 (seed 0)
    answers   up to 30 tokens, scored by the rules of squad
    left out  0 questions
    after     exact match 50.00 +- 1.00 %, F1 62.50 +- 2.00 %
    F1 62.50 +- 2.00 % (600 episodes)
    """

    before: AnswerScores | None
    after: AnswerScores
    episodes: int
    seed: int
    spec: EpisodeSpec
    source: str
    rules: str
    max_answer: int
    left_out: int
    transductive: bool | None = None
    normalisation: str | None = None

    @property
    def metric(self) -> str:
        """The score that `mean` is of."""
        return "f1"

    @property
    def mean(self) -> float:
        """F1 after adaptation."""
        return self.after.f1

    @property
    def ci95(self) -> float:
        """Half width of its 95 % interval."""
        return self.after.f1_ci95

    @property
    def gain(self) -> tuple[float, float] | None:
        """What adaptation adds to F1, mean and half width of the 95 % interval over the same episodes; or None."""
        if self.before is None:
            return None
        return _metrics.mean_and_interval(self.after.values[:, 1] - self.before.values[:, 1])

    def summary(self) -> str:
        """One line: `F1 62.50 +- 2.00 % (600 episodes)`."""
        return f"F1 {100 * self.mean:.2f} +- {100 * self.ci95:.2f} % ({self.episodes} episodes)"

    def __str__(self) -> str:
        rows = {
            "source": self.source,
            "task": f"{told(self.spec.shots)} support and {self.spec.queries} query questions of one article",
            "episodes": f"{self.episodes} (seed {self.seed})",
            "answers": f"up to {self.max_answer} tokens, scored by the rules of {self.rules}",
            "left out": f"{self.left_out} questions",
            "before": self.before,
            "after": self.after,
            "gain": self.gain and "F1 {:+.2f} +- {:.2f} points".format(*(100 * x for x in self.gain)),
        }
        lines = [f"{name:<8}  {value}" for name, value in rows.items() if value is not None]
        return "\n".join([*lines, self.summary()])


def evaluate_answers(
    learner: Learner,
    params: Params,
    source: AnswerSource,
    spec: EpisodeSpec,
    *,
    episodes: int = 600,
    seed: int = 0,
    num_steps: int | None = None,
    batch: int = 20,
    max_answer: int = 30,
    rules: str = "squad",
    normalisation: str | None = None,
    key: jax.Array | None = None,
    progress: Callable[[int], None] | None = None,
) -> AnswerEvaluation:
    """Evaluates meta-parameters on extractive question answering: exact match and F1 of the answers' texts.

    The episodes are those of `evaluate`. A query question is answered from all windows of its context, and nothing of
    its answer is seen: the best span of the window that scores highest counts. A score of an episode is the mean over
    its query questions, and the interval is over episodes.

    Args:
      learner: what adapts; its outputs are logits `[n, length, 2]`, of each token to be the first and the last of the
        answer.
      params: its meta-parameters.
      source: what `metajax.data.question_answering` gives.
      spec: size of the episodes; `ways` is 1.
      episodes: how many, at least 2.
      seed: which list of episodes, 0 or above.
      num_steps: inner steps after which `after` is measured; None is the learner's own.
      batch: episodes in one compiled call.
      max_answer: most tokens of an answer.
      rules: "squad": SQuAD v1.1's in all languages; "mlqa": each language's own (see `answer_scores`).
      normalisation: the policy, to be stated.
      key: PRNG key for learners that draw (episode k folds in k); None is deterministic.
      progress: called after each batch with the number of episodes that are done.

    Returns:
      An `AnswerEvaluation`; `before` takes no inner step.

    Raises:
      ValueError: an argument is out of range, the source is another one or too small for `spec`, a language has no
        rules, or the outputs have another shape.

    >>> import jax.numpy as jnp, metajax, optax
    >>> question = metajax.data.Question("q1", "en", "Moon", "Who ?", "Ada saw it", ("Ada",), 0, "question 'q1'")
    >>> tokens, offsets = np.array([[0, 0, 9, 1, 1]] * 2), np.array([[[0, 0], [0, 0], [0, 3], [4, 7], [8, 10]]] * 2)
    >>> inputs = {"tokens": tokens, "context": tokens > 0, "id": np.arange(2)}
    >>> source = metajax.data.AnswerSource(
    ...     "toy", "test", inputs, np.zeros(2, int), ("en/Moon",), targets=np.full([2, 2], 2),
    ...     questions=(question, question), offsets=offsets,
    ... )
    >>> apply = lambda params, inputs: jnp.stack([inputs["tokens"] * params] * 2, axis=-1)
    >>> model = metajax.Model(lambda key, inputs: jnp.ones([]), apply)
    >>> learner = metajax.learners.maml(model, optax.sgd(0.1), loss=metajax.core.span_cross_entropy)
    >>> print(evaluate_answers(learner, jnp.ones([]), source, metajax.data.EpisodeSpec(1, 1, 1), episodes=2).after)
    exact match 100.00 +- 0.00 %, F1 100.00 +- 0.00 %
    """
    _validate.instance("learner", learner, Learner)
    check_source(source, spec)
    _validate.instance("source", source, AnswerSource)
    _validate.int_at_least("episodes", episodes, 2)
    _validate.int_at_least("seed", seed, 0)
    if num_steps is not None:
        _validate.int_at_least("num_steps", num_steps, 0)
    _validate.positive_int("max_answer", max_answer)
    _validate.one_of("rules", rules, _RULES)
    if rules == "mlqa":
        for language in sorted({question.language for question in source.questions}):
            _answers.answer_scores("", [""], language=language)  # refuses what has no rules before anything is computed
    batch = min(_validate.positive_int("batch", batch), episodes)
    params = jax.tree.map(_fewshot.settled, params)
    steps = {"after": num_steps} if learner.problem is None else {"before": 0, "after": num_steps}
    values: dict[str, list[np.ndarray]] = {name: [] for name in steps}
    first = episode(source, spec, seed=seed, index=0)
    transductive = _fewshot.is_transductive(learner, params, first, num_steps, key)
    for start in range(0, episodes, batch):
        chunk = episode_batch(source, spec, seed=seed, start=start, count=batch)
        ids, kept = chunk.query.inputs["id"], np.asarray(chunk.query.mask)
        rows = np.where(kept[..., None], source.windows(ids), -1)
        packed, places = _packed(rows.reshape(batch, -1))
        inputs = _inputs(source, packed)
        side_by_side = _fewshot.side_by_side(jax.tree.map(lambda leaf: leaf[0], chunk))
        for name, taken in steps.items():
            spans = _best_spans(
                params, chunk.support, inputs, packed >= 0, key, start,
                learner=learner, num_steps=taken, max_answer=max_answer, side_by_side=side_by_side,
            )  # fmt: skip
            found = [
                _unpacked(np.asarray(leaf), places, rows, nothing)
                for leaf, nothing in zip(spans, _NO_SPAN, strict=True)
            ]
            values[name].append(_scores(source, rows, kept, found, rules))
        if progress is not None:
            progress(min(start + batch, episodes))
    name = f"{source.name} ({source.split})"
    scores = {which: _summary(np.concatenate(parts)[:episodes]) for which, parts in values.items()}
    return AnswerEvaluation(
        scores.get("before"), scores["after"], episodes, seed, spec, name, rules, max_answer, len(source.left_out),
        transductive, normalisation,
    )  # fmt: skip


def _packed(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of windows `[batch, n]` without most of the -1, and the places `[batch, m]` that they were in.

    Most questions have one window, and few have many. m is a multiple of 8, so that few shapes arise.
    """
    real = rows >= 0
    width = min(rows.shape[1], 8 * -(-int(real.sum(axis=1).max()) // 8))
    places = np.argsort(~real, axis=1, kind="stable")[:, :width]
    return np.take_along_axis(rows, places, axis=1), places


def _unpacked(found: np.ndarray, places: np.ndarray, rows: np.ndarray, nothing: float) -> np.ndarray:
    """What was found of packed windows, in the shape of `rows`; `nothing` where there is none."""
    whole = np.full([len(rows), rows[0].size], nothing, found.dtype)
    np.put_along_axis(whole, places, found, axis=1)
    return whole.reshape(rows.shape)


def _inputs(source: AnswerSource, rows: np.ndarray) -> Any:
    """The inputs of windows, cut to the length that holds the longest."""
    length = 0
    if source.length_buckets:
        longest = int(read(source.lengths, rows[rows >= 0]).max())
        length = next(bucket for bucket in source.length_buckets if bucket >= longest)
    return jax.tree.map(lambda leaf: read(cut_to(source, leaf, leaf, length), rows), source.inputs)


@functools.partial(jax.jit, static_argnames=("learner", "num_steps", "max_answer", "side_by_side"))
def _best_spans(
    params: Params, support: Examples, inputs: Any, mask: Any, key: Any, start: Any, *,
    learner: Learner, num_steps: int | None, max_answer: int, side_by_side: bool,
) -> Any:  # fmt: skip
    """Start, end and score of the best span of each window, `[batch, windows]`."""
    outputs = _fewshot.adapt_and_predict(learner, num_steps)

    def one(task: Any) -> Any:
        index, support, inputs, mask = task
        logits = outputs(params, support, inputs, mask, _rng.fold(key, index))
        return _answers.best_span(logits, inputs["context"] & mask[:, None], max_answer=max_answer)

    tasks = (start + jnp.arange(len(mask)), support, inputs, mask)
    return jax.vmap(one)(tasks) if side_by_side else jax.lax.map(one, tasks)


def _scores(
    source: AnswerSource, rows: np.ndarray, kept: np.ndarray, spans: list[np.ndarray], rules: str
) -> np.ndarray:
    """`[batch, 2]`: exact match and F1 of each episode, from spans of windows `[batch, questions, windows]`."""
    start, end, score = spans
    values = np.zeros([*kept.shape, 2])
    best = np.argmax(score, axis=-1)
    for place in zip(*np.nonzero(kept), strict=True):
        row, first, last = (int(leaf[place][best[place]]) for leaf in (rows, start, end))
        question = source.questions[source.inputs["id"][rows[place][0]]]
        text = "" if first < 0 else source.text(row, first, last)
        language = question.language if rules == "mlqa" else None
        values[place] = _answers.answer_scores(text, question.answers, language=language)
    return values.sum(axis=1) / kept.sum(axis=1, keepdims=True)


def _summary(values: np.ndarray) -> AnswerScores:
    exact, f1 = (_metrics.mean_and_interval(values[:, which]) for which in (0, 1))
    return AnswerScores(*exact, *f1, values)
