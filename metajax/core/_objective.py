"""The outer objective of one task."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from metajax.core import _inner, _keys, _tree
from metajax.core._types import Aux, Episode, InnerLosses, Learner, Params


def outer_objective(
    learner: Learner,
    meta_params: Params,
    episode: Episode,
    *,
    key: Any = None,
    num_steps: int | None = None,
    frozen: Params = None,
    loop: _inner.Loop | None = None,
    weights: tuple[float, ...] | None = None,
) -> tuple[jax.Array, Aux]:
    """Computes the outer loss of a task, and its `Aux`, as a function of the meta-parameters.

    Estimators differentiate this function. The learner adapts to the support set; the outer loss then evaluates the
    result, the inner losses, or both.

    Args:
      learner: any learner.
      meta_params: its meta-parameters, or the part of them that is differentiated.
      episode: one task.
      key: PRNG key of the task; None is deterministic.
      num_steps: number of inner steps; None is the learner's own number.
      frozen: the rest of the meta-parameters, if they are split.
      loop: runs and differentiates the inner loop; by default JAX differentiates it.
      weights: weights of the outer loss after each inner step; None for only the loss after the last step.

    Returns:
      The loss and an `Aux`, with the inner losses if there is an inner loop.

    Raises:
      ValueError: a part of the learner is missing; the number of weights is not the number of inner steps; the learner
        has no inner loop and `num_steps` is given; or the outer loss does not return a scalar and an `Aux`.

    >>> import jax.numpy as jnp, optax, metajax
    >>> learner = metajax.learners.maml(metajax.models.mlp(outputs=2), inner=optax.sgd(0.1), num_steps=3)
    >>> examples = metajax.Examples(jnp.eye(4), jnp.array([0, 0, 1, 1]), jnp.ones(4, bool))
    >>> episode = metajax.Episode(examples, examples)
    >>> params = learner.init(jax.random.key(0), examples.inputs)
    >>> loss, aux = outer_objective(learner, params, episode)
    >>> aux.outputs.shape, aux.inner_losses.values.shape
    ((4, 2), (3,))
    """
    keys, full, problem = _keys.of_task(key), _tree.fill(meta_params, frozen), learner.problem
    if problem is None:
        adapted = learner.adapt(full, episode.support, num_steps=num_steps, key=keys.adapt)
        return judge(learner, adapted, full, episode, keys.outer)
    visit: _inner.Visit | None = None
    if weights is not None:
        if learner.objective != "query":
            raise ValueError(
                f"step_weights must be None for an objective of inner losses, {learner.objective!r}, got {weights}"
            )
        if len(weights) != problem.num_steps:
            raise ValueError(f"step_weights must have one for each of {problem.num_steps} inner steps, got {weights}")
        visit = _weighted(learner, weights, keys)
    result = _inner.unroll(
        problem, meta_params, episode.support, key=keys.adapt, num_steps=num_steps, frozen=frozen, loop=loop,
        visit=visit, query=None if weights is None else episode.query,
    )  # fmt: skip
    outer_key = _keys.fold(keys.outer, problem.num_steps if num_steps is None else num_steps)
    loss, aux = judge(learner, result.adapted, full, episode, outer_key, result.losses)
    return loss if weights is None else result.visits.sum(), aux


def _weighted(learner: Learner, weights: tuple[float, ...], keys: _keys.TaskKeys) -> _inner.Visit:
    """Returns a visit that computes the weighted outer loss after each inner step."""
    problem = learner.problem
    assert problem is not None
    adapt_keys = _keys.of_adaptation(keys.adapt)

    def visit(params: Params, carry: Any, arguments: _inner.Arguments, taken: jax.Array) -> jax.Array:
        adapted = _inner.finalize(problem, params, carry, arguments, adapt_keys, taken)
        key = _keys.fold(keys.outer, taken)
        loss, _ = learner.outer_loss(adapted, arguments.full, arguments.query, key=key)
        return jnp.asarray(weights, loss.dtype)[taken - 1] * loss

    return visit


def judge(
    learner: Learner, adapted: Any, full: Params, episode: Episode, key: Any, losses: InnerLosses | None = None
) -> tuple[jax.Array, Aux]:
    """Computes the outer loss of an adapted learner.

    Raises:
      ValueError: the outer loss does not return a scalar and an `Aux`.
    """
    more = {} if learner.objective == "query" else {"inner_losses": losses}
    found = learner.outer_loss(adapted, full, episode.query, key=key, **more)
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], Aux):
        raise ValueError(f"outer_loss must return (loss, metajax.Aux(...)), got {type(found).__name__} {found!r}")
    loss, aux = found
    if jnp.shape(loss) != ():
        raise ValueError(f"outer_loss must return a scalar loss, got shape {jnp.shape(loss)}")
    return loss, aux if losses is None else aux._replace(inner_losses=losses)
