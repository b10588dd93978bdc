"""Rules that divide by the root of a mean of squared gradients: Adam, AdamW, RMSprop."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from metajax.inner import _options
from metajax.inner._roots import safe_sqrt


def adam(
    rate: Any, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8, *, nesterov: bool = False
) -> optax.GradientTransformation:
    """Adam with finite second-order gradients: the same steps as `optax.adam`, without its NaN.

    If the gradient of a parameter has been exactly zero, as for a dead input, the derivative of `optax.adam` is
    infinity times zero. Its `eps_root` prevents this but changes the steps; this rule takes the same steps.

    The derivative at a zero gradient is the true one, `-rate / eps` in a first step. For a dead input it does not
    matter: its gradient is zero for all parameter values. If the gradient is zero but depends on the parameters
    (below a layer that starts at zero), the exact hypergradient is that large: use a larger `eps` in this case.

    Args:
      rate: a number, a schedule, or a scalar array such as a meta-parameter.
      b1: decay of the mean of gradients, in `[0, 1)`. This and the following numbers may also be scalar arrays.
      b2: decay of the mean of squared gradients, in `[0, 1)`.
      eps: added to the root, above 0.
      nesterov: whether to use NAdam, as in `optax.nadam`.

    Raises:
      ValueError: a number is out of range.

    Source: Kingma and Ba 2015, arXiv:1412.6980; NAdam: Dozat 2016.

    >>> import jax, jax.numpy as jnp, optax, metajax
    >>> first_step = lambda gradient, rule: rule.update(gradient, rule.init(gradient))[0]
    >>> rules = optax.adam(0.5), metajax.inner.adam(0.5, eps=0.25)
    >>> [round(float(jax.grad(first_step)(0.0, rule)), 3) for rule in rules]
    [nan, -2.0]
    """
    return optax.chain(_scale_by_adam(b1, b2, eps, nesterov), _descend(rate))


def adamw(
    rate: Any, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8, *, weight_decay: Any = 1e-4, mask: Any = None,
    nesterov: bool = False,
) -> optax.GradientTransformation:  # fmt: skip
    """`adam` with decoupled weight decay: the same steps as `optax.adamw`.

    Args:
      rate: as for `adam`, like `b1`, `b2`, `eps` and `nesterov`.
      weight_decay: a step shrinks the parameters by `rate * weight_decay`; a number of at least 0, or a scalar array.
      mask: a tree of bools, or a function of the parameters that returns one: True for the parameters that decay. None
        decays all parameters.

    Raises:
      ValueError: a number is out of range.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101.

    >>> import jax.numpy as jnp, metajax
    >>> rule, weights = metajax.inner.adamw(0.5, weight_decay=0.5), jnp.ones(2)
    >>> rule.update(jnp.zeros(2), rule.init(weights), weights)[0].tolist()
    [-0.25, -0.25]
    """
    decay = optax.add_decayed_weights(_options.non_negative("weight_decay", weight_decay), mask)
    return optax.chain(_scale_by_adam(b1, b2, eps, nesterov), decay, _descend(rate))


def rmsprop(rate: Any, decay: Any = 0.9, eps: Any = 1e-8) -> optax.GradientTransformation:
    """RMSprop with `eps` outside of the root, as in PyTorch: same steps as `optax.rmsprop(..., eps_in_sqrt=False)`.

    With `eps` in the root, the default of `optax.rmsprop`, the optax rule is already finite. The notes of `adam` on
    zero gradients apply here too.

    Args:
      rate: as for `adam`.
      decay: decay of the mean of squared gradients, in `[0, 1)`.
      eps: added to the root, above 0.

    Raises:
      ValueError: a number is out of range.

    Source: Tieleman and Hinton 2012, Neural Networks for Machine Learning, lecture 6.5.

    >>> import jax.numpy as jnp, metajax
    >>> rule = metajax.inner.rmsprop(0.5, decay=0.75)
    >>> rule.update(jnp.array([4.0, 0.0]), rule.init(jnp.zeros(2)))[0].tolist()
    [-1.0, -0.0]
    """
    _options.in_unit_interval("decay", decay)
    _options.positive("eps", eps)

    def init(params: Any) -> optax.ScaleByRmsState:
        return optax.ScaleByRmsState(optax.tree.zeros_like(params))

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        square = optax.tree.update_moment_per_elem_norm(grads, state.nu, decay, 2)
        # multiplies by a reciprocal, to round in the same way as optax
        updates = jax.tree.map(lambda g, v: 1 / (safe_sqrt(v) + eps) * g, grads, square)
        return updates, optax.ScaleByRmsState(square)

    return optax.chain(optax.GradientTransformation(init, update), _descend(rate))


def _descend(rate: Any) -> optax.GradientTransformation:
    return optax.scale_by_learning_rate(_options.learning_rate("rate", rate))


def _scale_by_adam(b1: Any, b2: Any, eps: Any, nesterov: bool) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with a safe root. Uses the state of optax, so that code that searches for it finds it."""
    _options.in_unit_interval("b1", b1)
    _options.in_unit_interval("b2", b2)
    _options.positive("eps", eps)

    def init(params: Any) -> optax.ScaleByAdamState:
        mean, square = (optax.tree.zeros_like(params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mean, square)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        mean = optax.tree.update_moment(grads, state.mu, b1, 1)
        square = optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2)
        count = optax.safe_increment(state.count)
        updates = jax.tree.map(
            lambda m, v: m / (safe_sqrt(v) + eps),
            _options.corrected_mean(grads, mean, b1, count, nesterov), optax.tree.bias_correction(square, b2, count),
        )  # fmt: skip
        return updates, optax.ScaleByAdamState(count, mean, square)

    return optax.GradientTransformation(init, update)
