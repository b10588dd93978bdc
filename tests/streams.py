"""An inner problem that has everything: a stream, a context and a carry; and the same loop written by hand.

The stream and the context depend on the meta-parameters, the carry on fast weights, data and meta-parameters, and the
update rule on learned rates. Tests import it by name (`tests/conftest.py` puts this folder on the path).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metajax

STEPS, SIZE, WIDTH = 7, 4, 3
OBJECTIVES = ("query", "prequential", "both")
RULES = {"sgd": optax.sgd, "adam": lambda rate: optax.adam(rate, eps_root=1e-6)}


def parameters(seed: int = 0, dtype: Any = np.float64) -> dict[str, Any]:
    """Meta-parameters, each of which reaches the objective in another way."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(0.5 * rng.normal(size=shape), dtype)  # noqa: E731
    return {
        "start": draw(WIDTH), "mix": draw(WIDTH, WIDTH), "embed": draw(WIDTH, WIDTH), "scale": draw(WIDTH),
        "rate": jnp.asarray(-1.5, dtype),
    }  # fmt: skip


def episode(seed: int = 0, *, steps: int = STEPS, padding: tuple[int, ...] = (), dtype: Any = np.float64) -> Any:
    """A task whose support set holds what the stream gives out, `[steps, SIZE, WIDTH]`.

    Of the steps in `padding` all examples are padding; of the others, the last one is.
    """
    rng = np.random.default_rng(seed)
    inputs, targets = rng.normal(size=(steps, SIZE, WIDTH)), rng.normal(size=(steps, SIZE))
    mask = np.broadcast_to(np.arange(SIZE) < SIZE - 1, (steps, SIZE)).copy()
    mask[list(padding)] = False
    support = metajax.Examples(jnp.asarray(inputs, dtype), jnp.asarray(targets, dtype), jnp.asarray(mask))
    query = metajax.Examples(
        jnp.asarray(rng.normal(size=(5, WIDTH)), dtype), jnp.asarray(rng.normal(size=5), dtype), jnp.ones(5, bool)
    )
    return metajax.Episode(support, query)


def predictions(params: Any, inputs: Any) -> Any:
    """Of a model of one layer."""
    return jnp.tanh(inputs @ params)


def _context(meta: Any, support: Any, key: Any) -> Any:
    del key
    return jnp.tanh(support.inputs[0, 0] @ meta["embed"])


def _stream(meta: Any, support: Any, key: Any) -> metajax.Examples:
    del key
    return support._replace(inputs=support.inputs * jnp.exp(meta["scale"]))


def _first_carry(meta: Any, support: Any, key: Any, *, context: Any) -> Any:
    del support, key
    return {"memory": context * meta["start"], "steps": jnp.zeros([], jnp.int32)}


def _loss(params: Any, meta: Any, data: metajax.Examples, carry: Any, context: Any) -> tuple[Any, Any]:
    seen = predictions(params + meta["mix"] @ carry["memory"], data.inputs)
    kept = data.mask.astype(seen.dtype)
    value = jnp.sum(kept * (seen - data.targets) ** 2) / jnp.maximum(kept.sum(), 1) + 0.1 * jnp.sum(params * context)
    # of fast weights, data and meta-parameters
    memory = 0.5 * carry["memory"] + jnp.tanh(meta["mix"].T @ params + (kept[:, None] * data.inputs).mean(axis=0))
    return value, {"memory": memory, "steps": carry["steps"] + 1}


def _end(params: Any, carry: Any, context: Any) -> Any:
    return params + 0.3 * carry["memory"] + 0.2 * context


def _judge(objective: str, adapted: Any, query: Any, losses: Any, valid: Any) -> Any:
    total = 0.0
    if objective != "prequential":
        total += jnp.mean((predictions(adapted, query.inputs) - query.targets) ** 2)
    if objective != "query":
        total += jnp.sum(jnp.where(valid, losses, 0)) / jnp.maximum(jnp.sum(valid), 1)
    return total


def learner(
    objective: str, *, rule: str = "sgd", steps: int = STEPS, carry: bool = True, learned: bool = True
) -> metajax.Learner:
    """The learner of the stream; without `learned`, its update rule reads no meta-parameters."""

    def loss(params: Any, meta: Any, support: Any, step: Any, key: Any, **parts: Any) -> Any:
        del support, step, key
        if carry:
            return _loss(params, meta, **parts)
        return _loss(params, meta, carry={"memory": meta["start"], "steps": 0}, **parts)[0]

    def finalize(params: Any, meta: Any, support: Any, key: Any, **parts: Any) -> Any:
        del support, key
        return _end(params, **{"carry": {"memory": meta["start"]}, **parts})

    def outer_loss(adapted: Any, meta: Any, query: Any, *, key: Any = None, inner_losses: Any = None) -> Any:
        del meta, key
        losses = (None, None) if inner_losses is None else inner_losses
        return _judge(objective, adapted, query, *losses)

    problem = metajax.InnerProblem(
        init=lambda meta, support, key, *, context: meta["start"] + 0.4 * context, loss=loss,
        optimizer=lambda meta: RULES[rule](jnp.exp(meta["rate"]) if learned else 0.2), num_steps=steps,
        finalize=finalize, stream=_stream, context=_context, carry=_first_carry if carry else None,
    )  # fmt: skip
    return metajax.learners.bilevel(
        problem, outer_loss, init=lambda key, inputs: parameters(), predict=predictions, objective=objective
    )


def by_hand(
    objective: str, meta: Any, task: Any, *, rule: str = "sgd", carry: bool = True, learned: bool = True,
    first: int = 0, last: int | None = None, stop: Any = lambda step, part, value: value,
) -> Any:  # fmt: skip
    """The objective through a loop in Python, for plain `jax.grad`; steps of padding are left out.

    Args:
      objective: one of `OBJECTIVES`.
      meta: meta-parameters.
      task: an episode.
      rule: as for `learner`.
      carry: likewise.
      learned: likewise.
      first: the first step that is scored.
      last: the step behind the last one.
      stop: `(step, part, value) -> value` of the parts "gradient", "loss", "start" and "meta", where an estimator stops
        derivatives.
    """
    context = _context(meta, task.support, None)
    params = meta["start"] + 0.4 * context
    memory = _first_carry(meta, task.support, None, context=context) if carry else {"memory": meta["start"], "steps": 0}
    data = _stream(meta, task.support, None)
    optimizer = RULES[rule](jnp.exp(meta["rate"]) if learned else 0.2)
    opt_state = optimizer.init(params)
    losses = []
    for step in range(len(data.mask) if last is None else last):
        if not np.asarray(task.support.mask[step]).any():
            continue
        kept = np.asarray(task.support.mask[step])
        chunk = metajax.Examples(data.inputs[step], jnp.where(kept, data.targets[step], 0), jnp.asarray(kept))
        chunk = chunk._replace(inputs=jnp.where(kept[:, None], chunk.inputs, 0))
        (value, after), grads = jax.value_and_grad(_loss, has_aux=True)(params, meta, chunk, memory, context)
        if step >= first:
            losses.append(stop(step, "loss", value))
        updates, opt_state = optimizer.update(stop(step, "gradient", grads), opt_state, params)
        params = optax.apply_updates(params, updates)
        memory = after if carry else memory
    adapted = _end(params, memory, context)
    losses = jnp.stack(losses) if losses else jnp.zeros(1)
    return _judge(objective, adapted, task.query, losses, jnp.ones(len(losses), bool))
