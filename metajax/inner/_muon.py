"""Muon: orthogonalised momentum."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metajax.core import _validate
from metajax.inner import _options
from metajax.inner._adaptive import adamw
from metajax.inner._roots import safe_norm

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Jordan's quintic iteration


class _MuonState(NamedTuple):
    step: jax.Array
    mu: Any


def muon(
    rate: Any,
    beta: Any = 0.95,
    eps: Any = 1e-8,
    *,
    steps: int = 5,
    weight_decay: Any = 0.0,
    adam_rate: Any = None,
) -> optax.GradientTransformation:
    """Muon with finite second-order gradients: same steps as `optax.contrib.muon` with its defaults, without its NaN.

    A matrix takes a step along its Nesterov momentum, with all singular values set to approximately one; all other
    parameters take a step of `adam` with `nesterov=True`. `optax.contrib.muon` returns NaN if the gradient of a whole
    matrix has been zero, and, without `adam_eps_root`, if a single number in the gradient of another parameter has been
    zero. The derivative at a zero matrix is the true one, a few hundred times `rate / eps`: the notes of `adam` apply
    here too.

    Args:
      rate: a number, a schedule, or a scalar array such as a meta-parameter.
      beta: decay of the momentum, in `[0, 1)`; may be a scalar array, like `eps` and `weight_decay`.
      eps: added to the norm by which a matrix is divided, and to the root in Adam; above 0.
      steps: number of Newton-Schulz iterations, at least 1.
      weight_decay: weight decay of matrices, at least 0: a step shrinks them by `rate * weight_decay`.
      adam_rate: rate of all other parameters; None uses `rate`.

    Raises:
      ValueError: a number is out of range.

    Source: Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks.

    >>> import jax.numpy as jnp, metajax
    >>> rule, weights = metajax.inner.muon(0.5), jnp.zeros([2, 2])
    >>> step, _ = rule.update(jnp.diag(jnp.array([3.0, 4.0])), rule.init(weights), weights)
    >>> bool(jnp.all(jnp.abs(jnp.diag(step) + 0.5) < 0.2))
    True
    """
    _options.in_unit_interval("beta", beta)
    _options.positive("eps", eps)
    _options.learning_rate("rate", rate)
    _options.non_negative("weight_decay", weight_decay)
    _options.learning_rate("adam_rate", rate if adam_rate is None else adam_rate)
    _validate.positive_int("steps", steps)

    def init(params: Any) -> _MuonState:
        return _MuonState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params))

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, _MuonState]:
        del params
        mean = optax.tree.update_moment(grads, state.mu, beta, 1)
        step = optax.safe_increment(state.step)
        ahead = _options.corrected_mean(grads, mean, beta, step, nesterov=True)
        return jax.tree.map(lambda leaf: _orthogonalised(leaf, steps, eps), ahead), _MuonState(step, mean)

    rules = {
        "matrix": optax.chain(
            optax.GradientTransformation(init, update),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(rate),
        ),
        "other": adamw(rate if adam_rate is None else adam_rate, eps=eps, weight_decay=0.0, nesterov=True),
    }
    return optax.partition(
        rules, lambda params: jax.tree.map(lambda leaf: "matrix" if leaf.ndim == 2 else "other", params)
    )


def _orthogonalised(matrix: jax.Array, steps: int, eps: Any) -> jax.Array:
    """Sets the singular values of a matrix to approximately one, times `sqrt(columns / rows)` if that is above one."""
    rows, columns = matrix.shape
    x = matrix.T if rows > columns else matrix
    x = x / (safe_norm(x) + eps)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if rows > columns else x) * max(1, columns / rows) ** 0.5
