"""Generates text with a language model: one pass over the prompts, then one token per step, with a cache."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metajax.core import _validate
from metajax.core._types import Model, Params
from metajax.models._decoder import last_kept

_PLACES = {"key": 2, "value": 2, "mask": 1}  # the axis of a cache that counts tokens


def generate(
    model: Model,
    params: Params,
    inputs: Any,
    *,
    length: int,
    stop: int | None = None,
    temperature: float = 0.0,
    key: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Continues texts token by token. Each token is the most likely one or is drawn at random.

    One pass reads the prompts. Each step then computes one token of each text and reads the earlier tokens from keys
    and values, `[depth, n, prompt + length, kv_heads, size]`. Without `stop` there are `length` steps; with it, as many
    as the longest text needs. It is one program for given shapes, and works under jit and under vmap over tasks.

    Args:
      model: `models.decoder` with `outputs="tokens"`, also with adapters, or a model that takes and returns its cache.
      params: its parameters, also adapted ones (`adapted.params` of `learners.maml`).
      inputs: the prompts, int32 `[n, prompt]` or `{"tokens": ..., "mask": bool [n, prompt]}`. Padding may be on either
        side; each prompt needs at least one token that is not padding.
      length: number of tokens to generate.
      stop: the token that ends a text; None never ends a text.
      temperature: 0 takes the most likely token; above 0, tokens are drawn from the softmax of logits / temperature.
      key: PRNG key, required for a temperature above 0.

    Returns:
      `{"tokens": int32 [n, length], "mask": bool [n, length]}`, without the prompts. Everything after `stop` is
      padding: the mask is False and the token is 0.

    Raises:
      ValueError: an argument has the wrong type or shape, a prompt has no token, a token is not in the vocabulary
        (these two not under jit), an argument is out of range, a temperature has no key, or the model has no cache.

    >>> import jax, jax.numpy as jnp, metajax
    >>> model = metajax.models.decoder(100, width=16, depth=2, heads=4)
    >>> prompts = jnp.arange(10).reshape(2, 5)
    >>> params = model.init(jax.random.key(0), prompts)
    >>> metajax.models.generate(model, params, prompts, length=3)["tokens"].shape
    (2, 3)
    """
    _validate.instance("model", model, Model)
    _validate.positive_int("length", length)
    if stop is not None:
        _validate.int_at_least("stop", stop, 0)
    if _validate.non_negative_float("temperature", temperature) and key is None:
        raise ValueError(f"key must be given to draw tokens at temperature {temperature}, got None")
    inputs = inputs if isinstance(inputs, dict) else {"tokens": inputs}
    if not {"tokens"} <= set(inputs) <= {"tokens", "mask"}:
        raise ValueError(f"inputs must hold tokens, and may hold a mask, got {', '.join(inputs) or 'nothing'}")
    inputs = {name: jnp.asarray(part) for name, part in inputs.items()}
    tokens, mask = inputs["tokens"], inputs.get("mask")
    if stop is not None and stop >= _vocabulary(model):
        raise ValueError(f"stop must be one of the {_vocabulary(model)} tokens of the model, got {stop}")
    if tokens.ndim != 2 or not tokens.shape[1] or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens of inputs must be integers [n, prompt], got {tokens.dtype} {list(tokens.shape)}")
    if mask is not None:
        if mask.shape != tokens.shape:
            raise ValueError(f"mask of inputs must have the shape of its tokens, {tokens.shape}, got {mask.shape}")
        inputs["mask"] = mask.astype(bool)
    inputs["tokens"] = tokens.astype(jnp.int32)  # a narrower type may not hold the generated tokens
    if not isinstance(tokens, jax.core.Tracer) and not isinstance(mask, jax.core.Tracer):
        _check(np.asarray(tokens), None if mask is None else np.asarray(mask, bool), _vocabulary(model))
    return _generate(model, length, stop, temperature, params, inputs, key if temperature else None)


@functools.lru_cache(maxsize=32)
def _vocabulary(model: Model) -> int:
    """Returns how many tokens a model has logits for, without computing anything."""
    inputs = {"tokens": jax.ShapeDtypeStruct([1, 1], jnp.int32)}
    params = jax.eval_shape(model.init, jax.random.key(0), inputs["tokens"])
    return jax.eval_shape(lambda params, inputs: continued(model, params, inputs, {})[0], params, inputs).shape[-1]


def _check(tokens: np.ndarray, mask: np.ndarray | None, vocabulary: int) -> None:
    mask = np.ones(tokens.shape, bool) if mask is None else mask
    empty = np.flatnonzero(~mask.any(axis=1))
    if empty.size:
        raise ValueError(f"mask of inputs must keep a token of each prompt, got none in row {empty[0]}")
    unknown = tokens[mask & ((tokens < 0) | (tokens >= vocabulary))]
    if unknown.size:
        raise ValueError(f"tokens of inputs must be from 0 to {vocabulary - 1}, got {unknown[0]}")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
    model: Model, length: int, stop: int | None, temperature: float, params: Params, inputs: Any, key: Any
) -> dict[str, jax.Array]:
    tokens = inputs["tokens"]
    mask = inputs.get("mask", jnp.ones(tokens.shape, bool))
    rows, place = jnp.arange(len(tokens)), last_kept(mask)
    # The first step reads the last token of each prompt, so that all steps are alike. The logits of this pass are not
    # used, so they are never computed.
    _, cache = continued(model, params, {**inputs, "mask": mask.at[rows, place].set(False)}, {})
    first = cache["mask"].shape[1]  # includes the prompt of an adapter
    cache = {
        name: jnp.pad(leaf, [(0, length * (axis == _PLACES[name])) for axis in range(leaf.ndim)])
        for name, leaf in cache.items()
    }

    def more(carry: Any) -> jax.Array:
        step, _, live, *_ = carry
        return (step < length) & (True if stop is None else jnp.any(live))

    def write(carry: Any) -> Any:
        step, token, live, cache, text = carry
        logits, new = continued(model, params, {"tokens": token[:, None], "mask": live[:, None]}, cache)
        cache = {
            name: jax.lax.dynamic_update_slice_in_dim(leaf, new[name], first + step, _PLACES[name])
            for name, leaf in cache.items()
        }
        if key is None:
            token = jnp.argmax(logits[:, 0], axis=-1)
        else:
            token = jax.random.categorical(jax.random.fold_in(key, step), logits[:, 0] / temperature)
        token = jnp.where(live, token, 0).astype(tokens.dtype)
        text = {"tokens": text["tokens"].at[:, step].set(token), "mask": text["mask"].at[:, step].set(live)}
        return step + 1, token, live if stop is None else live & (token != stop), cache, text

    text = {"tokens": jnp.zeros([len(tokens), length], tokens.dtype), "mask": jnp.zeros([len(tokens), length], bool)}
    start = (0, tokens[rows, place], jnp.ones(len(tokens), bool), cache, text)
    return jax.lax.while_loop(more, write, start)[-1]


def continued(model: Model, params: Params, inputs: dict[str, Any], cache: dict[str, jax.Array]) -> tuple[Any, Any]:
    """Returns the logits of tokens that continue the texts in `cache`, and the cache of these tokens.

    Raises:
      ValueError: the model takes no cache, or returns no token logits.

    >>> from metajax.models._decoder import decoder
    >>> model, inputs = decoder(100, width=16, depth=2, heads=4), {"tokens": jnp.arange(10).reshape(2, 5)}
    >>> logits, cache = continued(model, model.init(jax.random.key(0), inputs), inputs, {})
    >>> logits.shape, cache["key"].shape
    ((2, 5, 100), (2, 2, 5, 4, 4))
    """
    outputs = model.apply(params, {**inputs, "cache": cache}, **dict.fromkeys(model.needs))
    if not isinstance(outputs, tuple) or outputs[0].ndim != 3:
        raise ValueError(
            "model must be a decoder with outputs='tokens', which takes a cache, got one whose outputs have shapes "
            f"{[leaf.shape for leaf in jax.tree.leaves(outputs)]}"
        )
    return outputs
