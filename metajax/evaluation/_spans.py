"""Extractive question answering on fixed episodes: exact match and F1 of texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from metajax.core import _validate
from metajax.core._types import Episode, Examples, Learner, Metric, Params
from metajax.data import AnswerSource, cut_to, read
from metajax.evaluation import _answers
from metajax.evaluation._judges import Judge, Prepared, adapt_and_predict

_RULES = ("squad", "mlqa")
_NO_SPAN = (-1, -1, -np.inf)  # start, end and score of a missing window


def answers(*, max_answer: int = 30, rules: str = "squad") -> Judge:
    """Scores extractive question answering by exact match and F1 of the answer texts.

    Each query question is answered from all windows of its context, without knowledge of its answer: the prediction is
    the best span over all windows. The score of an episode is the mean over its query questions. By default, the
    scores before adaptation are computed too.

    Args:
      max_answer: maximum number of tokens of an answer.
      rules: "squad" uses the rules of SQuAD v1.1 in all languages, "mlqa" the rules of each language (see
        `answer_scores`).

    Returns:
      A judge for `evaluate`. Its scores are `f1`, the reported metric, and `exact_match`. It requires a source of
      `metajax.data.question_answering` and outputs `[n, length, 2]`, the start and end logits of each token.

    Raises:
      ValueError: an argument is out of range; or (when used) another source, or a language without rules.

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
    >>> learner = metajax.learners.maml(model, optax.sgd(0.1), task=metajax.tasks.spans)
    >>> spec = metajax.data.EpisodeSpec(1, 1, 1)
    >>> metajax.evaluation.evaluate(learner, jnp.ones([]), source, spec, episodes=2, judge=answers()).summary()
    'f1 100.00 +- 0.00 % (2 episodes)'
    """
    _validate.positive_int("max_answer", max_answer)
    _validate.one_of("rules", rules, _RULES)
    return _Answers(max_answer, rules)


@dataclasses.dataclass(frozen=True)
class _Answers:
    max_answer: int
    rules: str
    before: bool = True

    @property
    def metric(self) -> Metric:
        return Metric("f1", lambda outputs, targets: outputs)

    def check(self, source: Any) -> None:
        _validate.instance("source", source, AnswerSource)
        if self.rules == "mlqa":
            for language in sorted({question.language for question in source.questions}):
                _answers.answer_scores("", [""], language=language)  # raises for a language without rules

    def prepare(self, source: AnswerSource, chunk: Episode, seed: int, start: int) -> Prepared:
        """Collects all windows of the query questions."""
        ids, kept = chunk.query.inputs["id"], np.asarray(chunk.query.mask)
        rows = np.where(kept[..., None], source.windows(ids), -1)
        packed, places = _packed(rows.reshape(len(rows), -1))
        return Prepared(chunk.support, (_inputs(source, packed), packed >= 0), (rows, kept, places))

    def run(self, learner: Learner, num_steps: int | None) -> Callable[[Params, Examples, Any, Any], Any]:
        outputs = adapt_and_predict(learner, num_steps)

        def best_spans(params: Params, support: Examples, query: Any, key: Any) -> Any:
            """Returns start, end and score of the best span of each window, `[windows]`."""
            inputs, mask = query
            logits = outputs(params, support, inputs, mask, key)
            return _answers.best_span(logits, inputs["context"] & mask[:, None], max_answer=self.max_answer)

        return best_spans

    def score(self, source: AnswerSource, values: Any, notes: Any) -> dict[str, np.ndarray]:
        rows, kept, places = notes
        spans = [_unpacked(leaf, places, rows, nothing) for leaf, nothing in zip(values, _NO_SPAN, strict=True)]
        exact, f1 = _scores(source, rows, kept, spans, self.rules).T
        broken = (kept & ~np.isfinite(spans[2].max(axis=-1))).sum(axis=-1)
        return {"exact_match": exact, "f1": f1, "nonfinite": broken}

    def rows(self, source: AnswerSource) -> dict[str, str]:
        return {
            "answers": f"up to {self.max_answer} tokens, scored by the rules of {self.rules}",
            "left out": f"{len(source.left_out)} questions",
        }


def _packed(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Removes most of the -1 from rows of windows `[batch, n]`. Returns the rows and their old places `[batch, m]`.

    Most questions have one window and few have many. m is a multiple of 8 (at most n), to limit the number of shapes.
    """
    real = rows >= 0
    width = min(rows.shape[1], 8 * -(-int(real.sum(axis=1).max()) // 8))
    places = np.argsort(~real, axis=1, kind="stable")[:, :width]
    return np.take_along_axis(rows, places, axis=1), places


def _unpacked(found: np.ndarray, places: np.ndarray, rows: np.ndarray, nothing: float) -> np.ndarray:
    """Returns the values of packed windows in the shape of `rows`, with `nothing` for missing windows."""
    whole = np.full([len(rows), rows[0].size], nothing, found.dtype)
    np.put_along_axis(whole, places, found, axis=1)
    return whole.reshape(rows.shape)


def _inputs(source: AnswerSource, rows: np.ndarray) -> Any:
    """Returns the inputs of windows, cut to the smallest length bucket that holds the longest window."""
    length = 0
    if source.length_buckets:
        longest = int(read(source.lengths, rows[rows >= 0]).max())
        length = next(bucket for bucket in source.length_buckets if bucket >= longest)
    return jax.tree.map(lambda leaf: read(cut_to(source, leaf, leaf, length), rows), source.inputs)


def _scores(
    source: AnswerSource, rows: np.ndarray, kept: np.ndarray, spans: list[np.ndarray], rules: str
) -> np.ndarray:
    """Returns exact match and F1 of each episode, `[batch, 2]`, from spans `[batch, questions, windows]`."""
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
