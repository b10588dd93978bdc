"""A learned prompt: embeddings before the tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from metajax.adapters._adapter import Apply, absent, adapted
from metajax.core import _tree, _validate
from metajax.core._types import Model, Params


def prompt(model: Model, length: int, *, where: _tree.Where = "embed/embedding") -> Model:
    """Prompt tuning (Lester et al. 2021): learned embeddings before the tokens of every text.

    The leaf `prompt` `[length, width]` is at the top of the tree. It starts as the embeddings of random tokens, in
    float32 if the table is narrower. Texts see it like words before them; it gets no logits.

    Args:
      model: `models.decoder`, or a model that takes `{"tokens": ..., "prompt": [length, width]}`.
      length: number of embeddings in the prompt.
      where: path regex or predicate that picks the embedding table `[vocab, width]`.

    Returns:
      A `Model`, which composes with `lora` and `ia3`. No weight of the plain model can hold a prompt, so `merge`
      refuses it.

    Raises:
      ValueError: an argument has the wrong type, `length` is below 1, `model` already has a prompt, or (when parameters
        are made) `where` does not pick one table.

    Source: Lester, Al-Rfou and Constant 2021, arXiv:2104.08691.

    >>> import jax, jax.numpy as jnp, metajax
    >>> model = metajax.adapters.prompt(metajax.models.decoder(100, width=16, depth=2, heads=4), 3)
    >>> tokens = jnp.arange(10).reshape(2, 5)
    >>> params = model.init(jax.random.key(0), tokens)
    >>> params["prompt"].shape, model.apply(params, tokens).shape
    ((3, 16), (2, 5, 100))
    """
    _validate.instance("model", model, Model)
    _validate.positive_int("length", length)

    def add(params: Params, key: jax.Array) -> Params:
        tables = jax.tree.leaves(_tree.split(params, where)[0])
        if len(tables) != 1 or tables[0].ndim != 2:
            shapes = [leaf.shape for leaf in tables]
            raise ValueError(f"where must pick one table [vocab, width], got {where!r}, which picks {shapes}")
        (table,) = tables
        rows = table[jax.random.randint(key, (length,), 0, table.shape[0])]
        return {"prompt": rows.astype(jnp.promote_types(table.dtype, jnp.float32)), **params}

    def edit(params: Params, inputs: Any) -> tuple[Params, Any]:
        if "prompt" not in params:
            raise absent("prompt")
        rest = {name: leaf for name, leaf in params.items() if name != "prompt"}
        inputs = inputs if isinstance(inputs, dict) else {"tokens": inputs}
        return rest, {**inputs, "prompt": params["prompt"]}

    return adapted(Apply("prompt", model, add, edit, folds=False))
