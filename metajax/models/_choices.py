"""Logits of choices, computed with a model of single sequences."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metajax.core import _losses, _validate
from metajax.core._types import Model, Params
from metajax.models._blocks import one_by_one

_LEAVES = ("tokens", "mask", "types")  # one row for each choice; any other leaf is shared by all choices


def score_choices(model: Model, *, length_normalised: bool = True, remat: bool = False) -> Model:
    """Makes a `Model` for multiple-choice questions (`data.multiple_choice`) from a model of single sequences.

    A language model scores a choice by the log-likelihood of its tokens after the prompt, as a mean over its tokens so
    that long choices have no disadvantage. A model with one output per sequence, such as an encoder with a head, scores
    a choice by that output. The scores are logits: cross-entropy trains both kinds, and every learner and adapter takes
    the result.

    Args:
      model: a network from tokens to next-token logits `[n, length, vocab]`, or to `[n, 1]`. Its inputs are
        `{"tokens": ..., "mask": ..., "types": ...}`.
      length_normalised: whether to divide the log-likelihood by the number of tokens of the choice.
      remat: whether questions go through the model one after the other, and once more in the backward pass. The logits
        of all tokens over the whole vocabulary then exist for one question at a time.

    Returns:
      A `Model` from `{"tokens": int32 [n, choices, length], "mask": bool, "choice": bool, ...}` to logits `[n,
      choices]`, with the parameters of `model`. A choice whose mask is all False is absent.

    Raises:
      ValueError: an argument has the wrong type, `remat` is set for a model whose outputs depend on the whole batch
        ("mask" or "stats" in its `needs`), or (when used) inputs or outputs have another form.

    Source: Brown et al. 2020, section 2.4 (arXiv:2005.14165); Radford et al. 2018 (one output per sequence).

    >>> import jax, jax.numpy as jnp, metajax
    >>> model = metajax.models.score_choices(metajax.models.decoder(100, width=16, depth=2, heads=4))
    >>> tokens, there = jnp.arange(24).reshape(2, 3, 4), jnp.ones([2, 3, 4], bool)
    >>> inputs = {"tokens": tokens, "mask": there, "choice": there.at[..., :2].set(False)}
    >>> params = jax.jit(model.init)(jax.random.key(0), inputs)
    >>> jax.jit(model.apply)(params, inputs).shape
    (2, 3)
    """
    _validate.instance("model", model, Model)
    _validate.instance("length_normalised", length_normalised, bool)
    _validate.instance("remat", remat, bool)
    if remat and not set(model.needs) <= {"key"}:
        raise ValueError(f"remat must be False for a model that needs {', '.join(model.needs)}, got True")

    def scores_of(params: Params, inputs: Any, **needed: Any) -> Any:
        lines = _lines(inputs)
        size, choices = inputs["tokens"].shape[:2]
        if needed.get("mask") is not None:
            needed["mask"] = jnp.repeat(needed["mask"], choices, axis=0)
        outputs = model.apply(params, lines, **needed)
        outputs, stats = outputs if "stats" in model.needs else (outputs, None)
        scores = _score(outputs, lines["tokens"], _flat(inputs["choice"]), length_normalised).reshape(size, choices)
        there = jnp.any(inputs["mask"], axis=-1)
        scores = jnp.where(there, scores, _losses.absent_logit(scores.dtype))
        return (scores, stats) if "stats" in model.needs else scores

    def scores_of_each(params: Params, inputs: Any, *, key: Any = None) -> Any:
        _check(inputs)
        each = {name: jnp.asarray(leaf) for name, leaf in inputs.items() if name in (*_LEAVES, "choice")}

        def scores(example: Any) -> Any:
            question, place = example
            needed = {name: None if key is None else jax.random.fold_in(key, place[0]) for name in model.needs}
            return scores_of(params, inputs | question, **needed)

        return one_by_one(scores, (each, jnp.arange(len(each["tokens"]))))

    apply = scores_of_each if remat else scores_of
    return Model(lambda key, inputs: model.init(key, _lines(inputs)), apply, model.needs)


def _check(inputs: Any) -> None:
    if not isinstance(inputs, dict) or not {"tokens", "mask", "choice"} <= set(inputs) or inputs["tokens"].ndim != 3:
        raise ValueError(
            "inputs must be those of data.multiple_choice, a dict of 'tokens', 'mask' and 'choice', each [n, choices, "
            f"length], got {jax.tree.map(jnp.shape, inputs)}"
        )


def _lines(inputs: Any) -> dict[str, Any]:
    """Returns one sequence for each choice."""
    _check(inputs)
    rest = {name: leaf for name, leaf in inputs.items() if name != "choice"}
    lines = rest | {name: _flat(rest[name]) for name in _LEAVES if name in rest}
    # an absent choice is read as a text of one token: attention over nothing may be NaN, and its gradient too
    lines["mask"] = lines["mask"].at[:, 0].set(True)
    return lines


def _flat(leaf: Any) -> jax.Array:
    return jnp.asarray(leaf).reshape(math.prod(leaf.shape[:2]), *leaf.shape[2:])


def _score(outputs: jax.Array, tokens: jax.Array, choice: jax.Array, length_normalised: bool) -> jax.Array:
    if outputs.shape == (len(tokens), 1):
        return outputs[:, 0]
    if outputs.shape[:-1] != tokens.shape:
        raise ValueError(
            f"model must give logits [n, length, vocab] or one output [n, 1] for tokens {tokens.shape}, "
            f"got outputs of shape {outputs.shape}"
        )
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs[:, :-1], tokens[:, 1:])
    scored = choice[:, 1:]  # a token is predicted by the one before it
    total = -jnp.sum(jnp.where(scored, losses, 0), axis=-1)
    return total / jnp.maximum(jnp.sum(scored, axis=-1), 1).astype(total.dtype) if length_normalised else total
