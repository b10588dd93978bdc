"""Texts with holes, for training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from metajax.core import _validate
from metajax.core._types import Model


def hide_tokens(model: Model, share: float) -> Model:
    """Makes a model of texts miss some of their tokens where it is given a key, which is in training.

    A class then cannot rest on one word of its support. Each token but the first of a text is hidden by itself, as if
    it were padding; without a key all are seen.

    Args:
      model: from `{"tokens": [n, length], "mask": bool [n, length], ...}`.
      share: of the tokens that are hidden, from 0 and below 1.

    Returns:
      A `Model` of the same parameters, which needs a key (`needs` holds "key").

    Raises:
      ValueError: a part of another type, a share out of range, or a model that needs a key of its own.

    Source: Iyyer et al. 2015 (word dropout), Deep Unordered Composition Rivals Syntactic Methods for Text
    Classification.

    >>> import metajax
    >>> count = metajax.Model(lambda key, x: {}, lambda params, x: x["mask"].sum(axis=1))
    >>> text = {"tokens": jnp.zeros([2, 400], int), "mask": jnp.arange(400) < jnp.array([[400], [5]])}
    >>> seen = hide_tokens(count, 0.5).apply({}, text, key=jax.random.key(0))
    >>> 150 < seen[0] < 250, 1 <= seen[1] <= 5, hide_tokens(count, 0.5).apply({}, text).tolist()
    (Array(True, dtype=bool), Array(True, dtype=bool), [400, 5])
    """
    _validate.instance("model", model, Model)
    _validate.below_one("share", share)
    if "key" in model.needs:
        raise ValueError(f"model must need no key of its own, got one that needs {', '.join(model.needs)}")

    def apply(params: Any, inputs: Any, *, key: Any = None, **needed: Any) -> Any:
        if key is not None:
            seen = jax.random.bernoulli(key, 1 - share, inputs["mask"].shape)
            seen |= jnp.arange(seen.shape[-1]) == 0  # a text is never empty
            inputs = {**inputs, "mask": inputs["mask"] & seen}
        return model.apply(params, inputs, **needed)

    return Model(model.init, apply, (*model.needs, "key"))
