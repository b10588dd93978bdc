"""Key folding: a step, a task and a purpose each derive their key; no key at all means deterministic."""

from __future__ import annotations

import jax

Key = jax.Array | None


def fold(key: Key, data: jax.Array | int) -> Key:
    """Folds an integer into the key; None stays None.

    >>> fold(None, 3) is None
    True
    """
    return None if key is None else jax.random.fold_in(key, data)


def split(key: Key, num: int) -> list[Key]:
    """Splits a key into `num` keys; None gives Nones.

    >>> split(None, 2)
    [None, None]
    """
    return [None] * num if key is None else list(jax.random.split(key, num))
