"""Estimators that differentiate through the inner loop: exact in two forms, and first order.

They run the same loop and differ in the gradient of the inner loss. Where a learner has no inner problem, its
adaptation is differentiated directly and all three agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from metajax.core import _inner, _rng, _tree
from metajax.core._types import Episode, Hypergrad, Learner, Params

_INNER_GRADS = "inner_grads"
_KEEP_INNER_GRADS = jax.checkpoint_policies.save_only_these_names(_INNER_GRADS)


def unrolled(*, remat: bool = False) -> Hypergrad:
    """Exact hypergradient by reverse-mode differentiation through the inner loop (Finn et al. 2017).

    Memory grows with the activations of every inner step; `remat=True` recomputes the step instead, which keeps
    the fast weights and the optimizer state of each step only.

    Source: Finn, Abbeel and Levine 2017, Model-Agnostic Meta-Learning, arXiv:1703.03400.

    >>> import metajax
    >>> metajax.hypergrad.unrolled(remat=True).init(None, None, None, None)
    ()
    """
    return _explicit(_inner.plain_gradient, jax.checkpoint if remat else _as_it_is)


def mixed_mode() -> Hypergrad:
    """Exact hypergradient with forward-over-reverse products in the backward pass (Kemaev et al. 2025).

    The backward pass of an inner step needs a Hessian-vector product and a mixed product. Here both come from
    one Jacobian-vector product of the inner gradient, which keeps no second set of activations. Steps are
    recomputed from the kept fast weights, optimizer state and inner gradient.

    The support set is taken as data: no gradient flows to it. Forward-mode differentiation (`jax.jvp`) through
    this estimator raises a TypeError; use `unrolled` there.

    Source: Kemaev et al. 2025, Scalable Meta-Learning via Mixed-Mode Differentiation, arXiv:2505.00793.

    >>> import metajax
    >>> metajax.hypergrad.mixed_mode().init(None, None, None, None)
    ()
    """
    return _explicit(mixed_gradient, lambda step: jax.checkpoint(step, policy=_KEEP_INNER_GRADS))


def first_order() -> Hypergrad:
    """First-order MAML: the inner gradient counts as a constant (Finn et al. 2017).

    The gradient is exact at zero inner curvature. Learned inner rates still get their gradient, since only the
    inner gradient is stopped, not the update rule.

    Source: Finn, Abbeel and Levine 2017, arXiv:1703.03400, section 5.2.

    >>> import metajax
    >>> metajax.hypergrad.first_order().init(None, None, None, None)
    ()
    """
    return _explicit(stopped_gradient, _as_it_is)


def _as_it_is(step: Callable[..., Any]) -> Callable[..., Any]:
    return step


def stopped_gradient(loss: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, Params]]:
    """The inner gradient as a constant."""
    gradient = jax.value_and_grad(loss)
    return lambda *arguments: jax.lax.stop_gradient(gradient(*arguments))


def mixed_gradient(loss: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, Params]]:
    """The inner gradient with a forward-over-reverse backward pass."""

    @jax.custom_vjp
    def gradient(params: Params, meta_params: Params, *data: Any) -> tuple[jax.Array, Params]:
        return jax.value_and_grad(loss)(params, meta_params, *data)

    def forward(*arguments: Any) -> tuple[Any, Any]:
        return gradient(*arguments), arguments

    def backward(arguments: Any, cotangents: Any) -> tuple[Any, ...]:
        params, meta_params, *data = arguments
        _, vector = cotangents  # the loss is a metric: nothing differentiates it

        def both(params: Params) -> tuple[Params, Params]:
            return jax.grad(loss, argnums=(0, 1))(params, meta_params, *data)

        _, (hessian_product, mixed_product) = jax.jvp(both, (params,), (vector,))
        return hessian_product, mixed_product, *([None] * len(data))

    gradient.defvjp(forward, backward)

    def named(*arguments: Any) -> tuple[jax.Array, Params]:
        value, grads = gradient(*arguments)
        return jax.lax.stop_gradient(value), checkpoint_name(grads, _INNER_GRADS)

    return named


def _explicit(gradient: _inner.Gradient, wrap: Callable[..., Any]) -> Hypergrad:
    def init(learner: Learner, meta_params: Params, episode: Episode, key: Any) -> tuple[()]:
        del learner, meta_params, episode, key
        return ()

    def value_and_grad(
        learner: Learner, meta_params: Params, state: Any, episode: Episode, *, key: Any = None, frozen: Params = None
    ) -> tuple[Any, Params, Any]:
        adapt_key, loss_key = _rng.split(key, 2)

        def objective(meta_params: Params) -> tuple[jax.Array, dict[str, Any]]:
            full = _tree.merge(meta_params, frozen)
            if learner.problem is None:
                adapted, inner = learner.adapt(full, episode.support, key=adapt_key), {}
            else:
                result = _inner.unroll(
                    learner.problem, meta_params, episode.support,
                    key=adapt_key, frozen=frozen, gradient=gradient, wrap=wrap,
                )  # fmt: skip
                adapted, inner = result.adapted, {"inner_loss": result.losses}
            loss, aux = learner.outer_loss(adapted, full, episode.query, key=loss_key)
            return loss, {**aux, **inner}

        value, grads = jax.value_and_grad(objective, has_aux=True)(meta_params)
        return value, grads, state

    return Hypergrad(init, value_and_grad)
