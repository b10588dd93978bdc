"""Exact match and F1 scores of answers, and the best span for given logits."""

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
_ARTICLES = {  # from MLQA, whose script removes the letters of the Arabic al- anywhere in a word
    "ar": re.compile("\u0627\u0644"),
    "de": re.compile(r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b"),
    "en": _ENGLISH,
    "es": re.compile(r"\b(un|una|unos|unas|el|la|los|las)\b"),
    "hi": None,
    "ru": None,  # not in MLQA; Russian has no articles
    "vi": re.compile(r"\b(của|là|cái|chiếc|những)\b"),
    "zh": None,
}


def answer_scores(prediction: str, answers: Sequence[str], *, language: str | None = None) -> tuple[float, float]:
    """Computes exact match and F1 of a predicted answer, each as the maximum over the correct answers.

    Without a language these are the metrics of SQuAD v1.1: texts are converted to lower case, ASCII punctuation and the
    articles a, an, the are removed, and white space separates words. F1 compares the two bags of words. XQuAD is
    usually scored this way in all languages. With a language these are the metrics of MLQA, which remove the articles
    of that language and all Unicode punctuation, and treat each Chinese character ("zh") as a word.

    Args:
      prediction: the predicted text.
      answers: the correct answers, at least one.
      language: None, a language of MLQA ("ar", "de", "en", "es", "hi", "vi", "zh"), or "ru", with the same rules.

    Returns:
      `(exact match, F1)`, each in [0, 1].

    Raises:
      ValueError: there are no answers, or the language is not supported.

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
    """Returns the span in the context with the largest sum of start and end logits.

    Args:
      logits: `[..., length, 2]`, the start and end logits of each position.
      context: `[..., length]` bool, the positions that an answer may contain: one contiguous run of True, or none.
      max_answer: maximum number of tokens of an answer.

    Returns:
      `(start, end, score)`, each `[...]`. Both positions are inclusive. If the context is empty or a logit in it is not
      finite, the positions are -1 and the score is -inf.

    Raises:
      ValueError: the shapes do not match, or `max_answer` is below 1.

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
    reach = min(max_answer, start.shape[-1])  # length of the window of positions that ends at each position
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
