"""Tokenizers of the tokenizers library, and the lengths of token sequences."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from metajax.core import _validate
from metajax.data.readers._files import read_content, regular_file

BLOCK = 1024  # texts tokenised at once


def buckets_of(max_length: Any, length_buckets: Any) -> tuple[int, ...]:
    """Returns the lengths of batches: the given ones, or a quarter of `max_length`, a half and all of it.

    Raises:
      ValueError: a length is not a positive integer, or the lengths do not ascend to `max_length`.

    >>> buckets_of(100, None), buckets_of(100, [64, 100])
    ((25, 50, 100), (64, 100))
    """
    _validate.positive_int("max_length", max_length)
    if length_buckets is None:
        return tuple(sorted({-(-max_length // part) for part in (4, 2, 1)}))
    buckets = tuple(_validate.positive_int("a length of length_buckets", length) for length in length_buckets)
    if list(buckets) != sorted(set(buckets)) or buckets[-1:] != (max_length,):
        raise ValueError(f"length_buckets must ascend and end with max_length, {max_length}, got {buckets}")
    return buckets


def load_tokenizer(path: Any, max_length: int, *, user: str, pair: bool = False) -> Any:
    """Loads the tokenizer of a file, without its own padding and truncation.

    Args:
      path: a file of the tokenizers library (tokenizer.json), or a folder that holds one.
      max_length: largest number of tokens; must leave room beside the special tokens.
      user: the function that needs the tokenizer, for error messages.
      pair: whether pairs of texts are encoded.

    Raises:
      ValueError: `path` is not such a file, or `max_length` leaves no room.
      ImportError: the tokenizers library is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"{user}() needs the tokenizers library: pip install 'metajax[text]'") from error
    if isinstance(path, str | os.PathLike) and os.path.isdir(path):
        path = pathlib.Path(path) / "tokenizer.json"
    file = regular_file("tokenizer", path)
    try:
        encoder = tokenizers.Tokenizer.from_str(read_content(file))
        special = encoder.num_special_tokens_to_add(pair)
        encoder.encode("", "" if pair else None)  # fails if special tokens are not in the vocabulary
    except BaseException as error:  # the library has no error types, and its panics are not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError(
            f"tokenizer must be a file of the tokenizers library (tokenizer.json), got {str(file)!r} ({error})"
        ) from error
    if max_length <= special:
        raise ValueError(
            f"max_length must leave room beside the {special} special tokens of {str(file)!r}, got {max_length}"
        )
    encoder.no_padding()
    encoder.no_truncation()
    return encoder


def encode_pairs(encoder: Any, pairs: Sequence[tuple[str, str]], places: Sequence[str]) -> Iterator[Any]:
    """Encodes whole pairs of texts with the special tokens of the tokenizer.

    Args:
      encoder: a tokenizer from `load_tokenizer`.
      pairs: the pairs of texts.
      places: the place of each pair, for error messages.

    Raises:
      ValueError: a pair cannot be tokenised.
    """
    for first in range(0, len(pairs), BLOCK):
        block = slice(first, first + BLOCK)
        yield from _encode_block(encoder, pairs[block], places[block])


def _encode_block(encoder: Any, pairs: Sequence[tuple[str, str]], places: Sequence[str]) -> list[Any]:
    try:
        return encoder.encode_batch(list(pairs))
    except Exception as error:  # the error does not say which pair it was
        if len(pairs) == 1:
            raise ValueError(f"the text in {places[0]} cannot be tokenised ({error})") from error
    return [
        encoding
        for pair, place in zip(pairs, places, strict=True)
        for encoding in _encode_block(encoder, [pair], [place])
    ]


def span_of(encoding: Any, sequence: int) -> tuple[int, int]:
    """Returns where the tokens of the first (0) or second (1) text of a pair begin and end; `(0, 0)` if it has none."""
    places = [place for place, number in enumerate(encoding.sequence_ids) if number == sequence]
    return (places[0], places[-1] + 1) if places else (0, 0)
