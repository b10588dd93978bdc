"""Hides tokens of texts during training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from metajax.core import _validate
from metajax.core._types import Model


def hide_tokens(model: Model, share: float) -> Model:
    """Makes a text model miss some tokens when it gets a key, which happens in training.

    A class then cannot depend on a single word of its support set. Each token except the first of a text is hidden
    independently, as if it were padding. Without a key all tokens are seen.

    Args:
      model: a network from `{"tokens": [n, length], "mask": bool [n, length], ...}`.
      share: share of hidden tokens, at least 0 and below 1.

    Returns:
      A `Model` with the same parameters, which needs a key (`needs` holds "key").

    Raises:
      ValueError: an argument has the wrong type, the share is out of range, or the model already needs a key.

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
