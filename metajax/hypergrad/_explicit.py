"""Estimators that differentiate through the inner loop: two exact ones, and first order.

They differ in the loop that they run (`metajax.core._inner.Loop`). If a learner has no inner problem, its
adaptation is differentiated directly and all three agree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from metajax.core import _inner, _validate
from metajax.core._objective import outer_objective
from metajax.core._types import Aux, Episode, Hypergrad, Learner, Params
from metajax.hypergrad._checks import checking
from metajax.hypergrad._mixed import EVERY, mixed_loop
from metajax.hypergrad._parts import stateless, with_inner_loss

Remat = bool | Callable[..., Any]


def unrolled(
    *, remat: Remat = False, block: int = 1, step_weights: Sequence[float] | None = None, unroll: int = 1
) -> Hypergrad:
    """Exact hypergradient by reverse-mode differentiation through the inner loop (Finn et al. 2017).

    Memory grows with the activations of every inner step. With `remat` the backward pass recomputes the steps.

    Args:
      remat: False keeps everything; True keeps the fast weights and the optimizer state between steps; a policy of
        `jax.checkpoint_policies` selects what is also kept within a step.
      block: with `remat`, the number of steps between kept states. The square root of the number of inner steps needs
        the least memory, at the cost of computing each step once more. Models recompute blocks of a network themselves.
      step_weights: weights of the outer loss after each inner step (Antoniou et al. 2019). By default only the loss
        after the last step counts, with weight 1. Metrics describe the predictions after the last step.
      unroll: number of inner steps that are unrolled in the program: the compiler can optimise across them, but
        compilation takes longer.

    Raises:
      ValueError: an argument is invalid, or (when used) the number of weights is not the number of inner steps, there
        is no inner step, or the inner update rule cannot be differentiated (`optax.adam` without `eps_root`: use
        `metajax.inner.adam`).

    Source: Finn, Abbeel and Levine 2017, Model-Agnostic Meta-Learning, arXiv:1703.03400.

    >>> import metajax
    >>> metajax.hypergrad.unrolled(remat=True).init(None, None, None, None)
    ()
    """
    _validate.positive_int("block", block)
    _validate.positive_int("unroll", unroll)
    if not isinstance(remat, bool) and not callable(remat):
        raise ValueError(f"remat must be True, False or a policy of jax.checkpoint_policies, got {remat!r}")
    if block > 1 and remat is False:
        raise ValueError(f"block must be 1 without remat, got {block}")
    if remat is False:
        return checking(explicit(_inner.scan_loop(unroll=unroll), step_weights))
    wrap = functools.partial(jax.checkpoint, policy=None if remat is True else remat)
    return checking(explicit(_inner.scan_loop(wrap=wrap, block=block, unroll=unroll), step_weights))


def mixed_mode(*, every: int = EVERY, step_weights: Sequence[float] | None = None, unroll: int = 1) -> Hypergrad:
    """Exact hypergradient with forward-over-reverse products in the backward pass (Kemaev et al. 2025).

    The backward pass of an inner step needs a Hessian-vector product and a mixed product. This estimator computes both
    with one Jacobian-vector product of the inner gradient, which keeps no second set of activations. It keeps the inner
    gradient of each step and replays fast weights and optimizer state from the gradients, without running the model.

    The support set counts as data: no gradient flows to it. Everything else is differentiated: fast weights,
    optimizer state, the carry and the context of the inner problem, a stream that depends on the meta-parameters, and
    the inner losses, both as terms of the objective and as inputs of an optimizer that reads the loss value.

    Args:
      every: number of steps between kept states. Each step costs the memory of 1 + n/every copies of the fast weights,
        where n counts the parameters and the optimizer states of the same size (3 for Adam), and (every - 1)/2 more
        updates of the optimizer alone. A carry is kept at the same interval and recomputed for the steps between,
        which takes one more inner loss per step. With 1 nothing is replayed.
      step_weights: as for `unrolled`.
      unroll: as for `unrolled`.

    Raises:
      ValueError: as for `unrolled`.

    Source: Kemaev et al. 2025, Scalable Meta-Learning via Mixed-Mode Differentiation, arXiv:2505.00793. The paper
    keeps the states; the replay is an addition of metajax.

    >>> import metajax
    >>> metajax.hypergrad.mixed_mode().init(None, None, None, None)
    ()
    """
    _validate.positive_int("every", every)
    _validate.positive_int("unroll", unroll)
    return checking(explicit(mixed_loop(every, unroll), step_weights))


def first_order(*, step_weights: Sequence[float] | None = None) -> Hypergrad:
    """First-order MAML: the inner gradient counts as a constant (Finn et al. 2017).

    The gradient is exact at zero inner curvature. Learned inner rates still receive a gradient, because the gradient
    stops at the values that the update rule reads from the inner loss, not at the rule. The carry is differentiated,
    and so are inner losses that are terms of the objective.

    Args:
      step_weights: as for `unrolled`.

    Raises:
      ValueError: as for `unrolled`.

    Source: Finn, Abbeel and Levine 2017, arXiv:1703.03400, section 5.2.

    >>> import metajax
    >>> metajax.hypergrad.first_order().init(None, None, None, None)
    ()
    """
    plain, scored = (explicit(_inner.scan_loop(stopped_gradient(recorded)), step_weights) for recorded in (False, True))

    def value_and_grad(learner: Learner, *arguments: Any, **keywords: Any) -> tuple[Any, Params, Any]:
        # if the objective does not read the inner losses, their activations are not kept
        estimator = plain if learner.objective == "query" else scored
        return estimator.value_and_grad(learner, *arguments, **keywords)

    return Hypergrad(plain.init, value_and_grad)


def stopped_gradient(recorded: bool) -> _inner.Gradient:
    """Returns the inner gradient and the loss for the update rule as constants.

    With `recorded`, the loss in the result of the step is differentiated.
    """

    def gradient(loss: Callable[..., Any]) -> Callable[..., Any]:
        run = _inner.plain_gradient(loss)

        def stopped(*inputs: Any) -> Any:
            (value, carry), told = run(*inputs)
            return (value if recorded else jax.lax.stop_gradient(value), carry), jax.lax.stop_gradient(told)

        return stopped

    return gradient


def explicit(loop: _inner.Loop, step_weights: Sequence[float] | None = None) -> Hypergrad:
    """Returns the estimator that differentiates the outer loss through `loop`, which defines its own derivative."""
    weights = checked_weights(step_weights)

    def value_and_grad(
        learner: Learner, meta_params: Params, state: Any, episode: Episode, *, key: Any = None, frozen: Params = None
    ) -> tuple[Any, Params, Any]:
        def objective(meta_params: Params) -> tuple[jax.Array, Aux]:
            return outer_objective(learner, meta_params, episode, key=key, frozen=frozen, loop=loop, weights=weights)

        (loss, aux), grads = jax.value_and_grad(objective, has_aux=True)(meta_params)
        return (loss, with_inner_loss(aux)), grads, state

    return stateless(value_and_grad)


def checked_weights(step_weights: Sequence[float] | None) -> tuple[float, ...] | None:
    """Returns the weights of the outer losses after each inner step, None for only the last one."""
    if step_weights is None:
        return None
    weights = tuple(_validate.non_negative_float("a weight of step_weights", weight) for weight in step_weights)
    if not any(weights):
        raise ValueError(f"step_weights must hold a positive number, got {weights}")
    return weights
