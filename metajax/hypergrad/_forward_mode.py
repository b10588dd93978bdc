"""Exact hypergradients for few meta-parameters, by tangents through the inner loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from metajax.core import _inner, _tree, _validate
from metajax.core._objective import outer_objective
from metajax.core._types import Aux, Episode, Hypergrad, Learner, Params
from metajax.hypergrad._checks import check_rule
from metajax.hypergrad._explicit import checked_weights
from metajax.hypergrad._parts import stateless, with_inner_loss


def forward_mode(
    *, chunk: int | None = None, max_params: int = 1024, step_weights: Sequence[float] | None = None
) -> Hypergrad:
    """Exact hypergradient by forward-mode differentiation, for few meta-parameters (Franceschi et al. 2017).

    Use it for rates, schedules and loss weights. For each trained scalar, a tangent of the fast weights and of the
    optimizer state is pushed through the inner loop. Memory and time grow with the number of trained scalars; memory
    does not grow with the number of inner steps. Use `trainable` of `outer_update` to select the trained parameters.

    Args:
      chunk: number of tangents that are pushed through the inner loop together, to bound memory; the loop then runs
        once for each chunk and once more. None pushes all together.
      max_params: largest accepted number of trained scalars.
      step_weights: as for `unrolled`.

    Raises:
      ValueError: an argument is invalid; or (when used) there are more trained scalars than `max_params`, or the number
        of weights is not the number of inner steps; or a case below.

    | case | result |
    |---|---|
    | zero inner steps, or an update rule that cannot be differentiated (`optax.adam` without `eps_root`) | refused |
    | NaN in the inner loop | loss and gradient are NaN |
    | a learner without an inner problem | its adaptation is differentiated, also in forward mode |
    | a function with a reverse-mode rule of its own (`jax.custom_vjp`) in a model or loss | JAX raises a TypeError |

    Source: Franceschi, Donini, Frasconi and Pontil 2017, Forward and Reverse Gradient-Based Hyperparameter
    Optimization, arXiv:1703.01785.

    >>> import metajax
    >>> metajax.hypergrad.forward_mode(chunk=16).init(None, None, None, None)
    ()
    """
    if chunk is not None:
        _validate.positive_int("chunk", chunk)
    _validate.positive_int("max_params", max_params)
    weights = checked_weights(step_weights)

    def value_and_grad(
        learner: Learner, meta_params: Params, state: Any, episode: Episode, *, key: Any = None, frozen: Params = None
    ) -> tuple[Any, Params, Any]:
        count = sum(jnp.size(leaf) for leaf in jax.tree.leaves(meta_params))
        if count > max_params:
            raise ValueError(
                f"max_params must be at least the number of trained meta-parameters, {count}, got {max_params}: "
                "choose fewer with trainable, or an estimator in reverse mode"
            )
        check_rule(learner.problem, _tree.fill(meta_params, frozen), episode.support)
        flat, unravel = ravel_pytree(meta_params)
        indices, axes = jnp.arange(count), _tree.varying_axes(meta_params)

        def objective(meta_params: Params) -> tuple[jax.Array, Aux]:
            return outer_objective(
                learner, meta_params, episode, key=key, frozen=frozen, loop=_inner.scan_loop(), weights=weights
            )

        def push(index: jax.Array) -> tuple[jax.Array, jax.Array, Aux]:
            tangent = _tree.vary(unravel((indices == index).astype(flat.dtype)), axes)
            return jax.jvp(objective, (meta_params,), (tangent,), has_aux=True)

        if chunk is None or chunk >= count:
            loss, slopes, aux = jax.vmap(push, out_axes=(None, 0, None))(indices)
        else:
            loss, aux = objective(meta_params)
            slopes = jax.lax.map(lambda index: push(index)[1], indices, batch_size=chunk)
        return (loss, with_inner_loss(aux)), unravel(slopes.astype(flat.dtype)), state

    return stateless(value_and_grad)
