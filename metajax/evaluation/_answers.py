"""Exact match and F1 of answers, and the best span of logits."""

from __future__ import annotations

import collections
import functools
import re
import string
import sys
import unicodedata
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from metajax.core import _validate

_ASCII_PUNCTUATION = frozenset(string.punctuation)
_ENGLISH = re.compile(r"\b(a|an|the)\b")
_ARTICLES = {  # of MLQA, whose script takes the Arabic al- out wherever its letters stand
    "ar": re.compile("\u0627\u0644"),
    "de": re.compile(r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b"),
    "en": _ENGLISH,
    "es": re.compile(r"\b(un|una|unos|unas|el|la|los|las)\b"),
    "hi": None,
    "ru": None,  # no language of MLQA; it has no articles
    "vi": re.compile(r"\b(của|là|cái|chiếc|những)\b"),
    "zh": None,
}


def answer_scores(prediction: str, answers: Sequence[str], *, language: str | None = None) -> tuple[float, float]:
    """Exact match and F1 of a predicted answer, each the highest over the right answers.

    Without a language these are the metrics of SQuAD v1.1: texts are lower-cased, punctuation (of ASCII) and the
    articles a, an, the are taken out, white space separates words; F1 is that of the two bags of words. XQuAD is
    usually scored so in all languages. With a language they are those of MLQA: the articles of that language, all
    punctuation of Unicode, and in Chinese ("zh") each character is a word.

    Args:
      prediction: the predicted text.
      answers: the right ones, at least one.
      language: None, or one of MLQA's: "ar", "de", "en", "es", "hi", "vi", "zh"; and "ru", by the same rules.

    Returns:
      `(exact match, F1)`, each in [0, 1].

    Raises:
      ValueError: no answers, or another language.

    Source: Rajpurkar et al. 2016, section 6.1 (arXiv:1606.05250); Lewis et al. 2020 (MLQA), arXiv:1910.07475.

    >>> answer_scores("The Blue cat!", ["blue cat", "a cat"])
    (1.0, 1.0)
    >>> answer_scores("in New York", ["New York City"])
    (0.0, 0.6666666666666666)
    >>> answer_scores("中国人", ["中国"], language="zh")
    (0.0, 0.8)
    """
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers must be a list of at least one text, got {answers!r}")
    if language is not None:
        _validate.one_of("language", language, tuple(_ARTICLES))
    found = _words(prediction, language)
    scores = [(float(found == words), _f1(found, words)) for words in (_words(answer, language) for answer in answers)]
    return max(exact for exact, _ in scores), max(f1 for _, f1 in scores)


def _f1(found: list[str], right: list[str]) -> float:
    same = sum((collections.Counter(found) & collections.Counter(right)).values())
    return 2 * same / (len(found) + len(right)) if same else 0.0


def _words(text: str, language: str | None) -> list[str]:
    punctuation = _ASCII_PUNCTUATION if language is None else _unicode_punctuation()
    text = "".join(letter for letter in text.lower() if letter not in punctuation)
    articles = _ENGLISH if language is None else _ARTICLES[language]
    if articles is not None:
        text = articles.sub(" ", text)
    if language == "zh":
        text = re.sub("([\u4e00-\u9fa5])", r" \1 ", text)
    return text.split()


@functools.cache
def _unicode_punctuation() -> frozenset[str]:
    every = (chr(code) for code in range(sys.maxunicode + 1))
    return _ASCII_PUNCTUATION | {letter for letter in every if unicodedata.category(letter).startswith("P")}


def best_span(logits: jax.Array, context: jax.Array, *, max_answer: int = 30) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The span with the largest sum of start and end logits, among those that an answer can be.

    Args:
      logits: `[..., length, 2]`, of each position to be the first and to be the last of the answer.
      context: `[..., length]` bool, where an answer may stand: one run of True, or none.
      max_answer: most tokens of an answer.

    Returns:
      `(start, end, score)`, each `[...]`; both positions are of the span. Where the context is empty or a logit in it
      is not finite, they are -1, and the score is -inf.

    Raises:
      ValueError: shapes that do not match, or `max_answer` is below 1.

    >>> logits = jnp.array([[0.0, 0.0], [1.0, 3.0], [2.0, 0.0], [0.0, 1.0]])
    >>> start, end, score = best_span(logits, jnp.array([False, True, True, True]))
    >>> int(start), int(end), float(score)
    (1, 1, 4.0)
    """
    _validate.positive_int("max_answer", max_answer)
    if logits.ndim < 2 or logits.shape[-1] != 2 or logits.shape[:-1] != context.shape:
        raise ValueError(f"logits must be [..., length, 2] for context {context.shape}, got {logits.shape}")
    lowest = jnp.asarray(-jnp.inf, logits.dtype)
    start, end = (jnp.where(context, logits[..., which], lowest) for which in (0, 1))
    leading = (1,) * (start.ndim - 1)
    reach = min(max_answer, start.shape[-1])  # a window of the last positions up to each
    before = jax.lax.reduce_window(
        start, lowest, jax.lax.max, (*leading, reach), (*leading, 1), [(0, 0)] * len(leading) + [(reach - 1, 0)]
    )
    last = jnp.argmax(before + end, axis=-1)
    place = jnp.arange(start.shape[-1])
    near = (place <= last[..., None]) & (place > last[..., None] - reach)
    first = jnp.argmax(jnp.where(near, start, lowest), axis=-1)
    finite = jnp.all(jnp.isfinite(logits) | ~context[..., None], axis=(-2, -1)) & jnp.any(context, axis=-1)
    score = jnp.where(finite, jnp.max(before + end, axis=-1), lowest)
    return jnp.where(finite, first, -1), jnp.where(finite, last, -1), score
