"""Estimators that differentiate only the last inner steps: of a whole inner loop, or of one that outer steps share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from metajax.core import _inner, _keys, _tree, _validate
from metajax.core._inner import Arguments, InnerState, Steps
from metajax.core._objective import judge, outer_objective
from metajax.core._types import Aux, Episode, Hypergrad, InnerProblem, Learner, Params
from metajax.hypergrad._checks import checking
from metajax.hypergrad._explicit import explicit
from metajax.hypergrad._mixed import mixed_loop
from metajax.hypergrad._parts import inner_problem, watch, with_inner_loss

Start = Literal["identity", "constant"]


def truncated(
    k: int,
    *,
    start: Start = "identity",
    losses: Start = "identity",
    step_weights: Sequence[float] | None = None,
) -> Hypergrad:
    """Hypergradient through the last `k` inner steps (Shaban et al. 2019).

    These steps are differentiated exactly, as in `mixed_mode`: through the fast weights and through the meta-parameters
    that their inner losses and update rules read. The steps before them are only run, so that memory does not grow with
    their number. If an inner step is a contraction with factor `a`, the bias decreases as `a**k`.

    If the inner loop starts from the meta-parameters (MAML), the dependence on the start lies in the truncated steps,
    and the estimator of the paper is zero. `start` defines the derivative of the truncated steps.

    Args:
      k: number of last steps to differentiate. With `num_steps` or more nothing is truncated.
      start: "identity": the truncated steps pass on a change of the start unchanged, which is first-order MAML for
        them and exact for the rest. "constant": they pass on nothing, as in the paper. Both are the same if the start
        does not depend on the meta-parameters.
      losses: derivative of the inner losses of the truncated steps, if they are terms of the objective. "identity":
        each loss is differentiated with respect to its fast weights, which depend on the meta-parameters as `start`
        defines, and with respect to the meta-parameters that it reads. This takes one more inner loss and a copy of the
        state per step. "constant": the losses are not differentiated.
      step_weights: as for `unrolled`; 0 for the steps that are truncated.

    Raises:
      ValueError: an argument is invalid; or (when used) the number of weights is not the number of inner steps, the
        start is "constant" and the hypergradient is zero by construction, or a case below.

    | case | result |
    |---|---|
    | zero inner steps, or an update rule that cannot be differentiated (`optax.adam` without `eps_root`) | refused |
    | the meta-parameters are only the start (MAML) | "constant" is refused |
    | some meta-parameters are only the start (the head in ANIL) | "constant" gives these a zero gradient |
    | NaN in an inner step, truncated or not | loss and gradient are NaN |
    | a learner without an inner problem | differentiated directly: exact |

    Sources: Shaban, Cheng, Hatch and Boots 2019, Truncated Back-propagation for Bilevel Optimization,
    arXiv:1810.10667. The identity for a long inner loop: Shin, Lee, Gong and Hwang 2021, arXiv:2102.07215.

    >>> import metajax
    >>> metajax.hypergrad.truncated(5).init(None, None, None, None)
    ()
    """
    _validate.positive_int("k", k)
    for name, value in (("start", start), ("losses", losses)):
        _check_start(value, name)
    if step_weights is not None and any(step_weights[:-k]):
        raise ValueError(f"step_weights must be 0 before the last {k} inner steps, got {tuple(step_weights)}")

    def value_and_grad(
        learner: Learner, meta_params: Params, state: Any, episode: Episode, *, key: Any = None, frozen: Params = None
    ) -> tuple[Any, Params, Any]:
        scored: Start = "constant" if learner.objective == "query" else losses
        if start == "constant" and learner.problem is not None and learner.problem.num_steps > k:
            # mixed mode does not support forward-mode differentiation; here any exact loop gives the same answer
            plain = _last_steps(k, start, scored, _inner.scan_loop())
            _refuse_zero(
                f"truncated({k})",
                lambda meta_params: outer_objective(
                    learner, meta_params, episode, key=key, frozen=frozen, loop=plain
                )[0],
                meta_params,
            )  # fmt: skip
        estimator = explicit(_last_steps(k, start, scored, mixed_loop()), step_weights)
        return estimator.value_and_grad(learner, meta_params, state, episode, key=key, frozen=frozen)

    checked = explicit(mixed_loop(), step_weights)  # raises for invalid weights
    return checking(Hypergrad(checked.init, value_and_grad))


def _check_start(start: str, name: str = "start") -> None:
    _validate.one_of(name, start, ("identity", "constant"))


def _last_steps(k: int, start: Start, losses: Start, last: _inner.Loop) -> _inner.Loop:
    """Returns a loop that runs its last `k` steps with `last` and does not differentiate the other steps."""

    def loop(
        problem: InnerProblem, begin: InnerState, arguments: Arguments, steps: Steps, num_steps: int,
        visit: _inner.Visit | None = None,
    ) -> tuple[InnerState, tuple[jax.Array, Any]]:  # fmt: skip
        before = num_steps - k
        if before <= 0:
            return last(problem, begin, arguments, steps, num_steps, visit)
        first = jax.tree.map(lambda leaf: leaf[:before], steps)
        rest = jax.tree.map(lambda leaf: leaf[before:], steps)
        fixed = arguments._replace(
            meta_params=jax.lax.stop_gradient(arguments.meta_params), context=jax.lax.stop_gradient(arguments.context)
        )
        constant, begin_constant = jax.lax.stop_gradient((first, begin))
        if losses == "constant":
            state, (early, _) = _inner.scan_loop()(problem, begin_constant, fixed, constant, before)
        else:
            loss, gradient = _inner.step_loss(problem), _inner.plain_gradient(_inner.step_loss(problem))

            @jax.checkpoint  # keeps only the state of each step
            def step(
                state: InnerState, inputs: tuple[Steps, Steps], begin: InnerState, arguments: Arguments
            ) -> tuple[InnerState, jax.Array]:
                moving, constant = inputs
                (_, carry), (grads, told) = gradient(*_inner.loss_inputs(state, fixed, constant))
                after = _inner.apply_gradient(problem, state, grads, told, carry, fixed, constant.valid)
                params = _pass_on(begin.params, state.params) if start == "identity" else state.params
                value, _ = loss(*_inner.loss_inputs(state._replace(params=params), arguments, moving))
                return jax.lax.stop_gradient(after), value

            state, early = jax.lax.scan(
                lambda state, inputs: step(state, inputs, begin, arguments), begin_constant, (first, constant)
            )
        if start == "identity":
            state = state._replace(params=_pass_on(begin.params, state.params))
        state, (values, visits) = last(problem, state, arguments, rest, k, visit)
        if visit is not None:
            visits = jnp.concatenate([jnp.zeros([before], visits.dtype), visits])
        return state, (jnp.concatenate([early, values]), visits)

    return loop


def _pass_on(start: Params, params: Params) -> Params:
    """Returns the values of `params` with the derivatives of `start`."""
    return jax.tree.map(lambda now, first: now + (first - jax.lax.stop_gradient(first)), params, start)


def _refuse_zero(name: str, function: Callable[[Params], jax.Array], meta_params: Params) -> None:
    """Raises a ValueError if a hypergradient is zero by construction. Only traces, without computing anything."""
    watched, reached = watch()
    jax.eval_shape(lambda point: jax.jvp(lambda point: watched(function(point)), (point,), (point,)), meta_params)
    if not reached:
        raise ValueError(
            f'start must be "identity" where the meta-parameters are only the start of the inner loop: the '
            f'hypergradient of {name} would be zero, got "constant"'
        )


class Carried(NamedTuple):
    """State that a persistent estimator keeps for a task between outer steps.

    Attributes:
      inner: current state of the inner loop.
      episode: the episode of the inner loop, `()` if each outer step provides its own.
      key: key data of the inner loop, `()` without a key. The steps have the same keys as in a single loop.
      started: bool scalar, False before the first outer step.
    """

    inner: InnerState
    episode: Any
    key: Any
    started: jax.Array


def persistent_truncation(
    k: int, *, start: Start = "identity", reset: bool = True, fresh_data: bool = False
) -> Hypergrad:
    """Truncation with carried inner state: each outer step runs and differentiates only `k` more inner steps.

    Use it for inner problems that last over many outer steps (hyper-parameters that are tuned while a model trains).
    The outer loss is the loss after the `k` steps. If an outer step starts an inner loop, the start is differentiated
    too.

    The state of a task consists of its inner state and its episode; `outer_update(...).init(..., num_tasks=...)`
    creates one state for each task of a batch. In few-shot learning, an episode therefore stays at its index in the
    batch for `num_steps / k` outer steps, new episodes at this index are ignored during that time, and its fast weights
    started from older meta-parameters. `aux.episode` is the episode that loss and outputs belong to. Segment s reads
    the data of the steps `s k` to `(s + 1) k - 1` from a stream. The carry is passed from segment to segment, and the
    objective reads the inner losses of the segment.

    Args:
      k: number of inner steps in each outer step.
      start: derivative of the steps before these, see `truncated`.
      reset: whether a new inner loop starts, on a new episode, after `problem.num_steps` steps; otherwise the inner
        loop never ends.
      fresh_data: whether each outer step provides new data of the same inner problem (minibatches of one data set), so
        that no episode is kept; a stream then has the data of `k` steps.

    Raises:
      ValueError: an argument is invalid; or (when used) the learner has no inner problem, `k` does not divide
        `num_steps` with `reset`, the start is "constant" and the hypergradient is zero by construction, or a case
        below.

    | case | result |
    |---|---|
    | zero inner steps, or an update rule that cannot be differentiated | refused |
    | the meta-parameters are only the start (MAML) | "constant" is refused, unless each outer step starts a new loop |
    | NaN in an inner step | loss and gradient are NaN until a new inner loop starts |
    | a learner without an inner problem | refused |

    `aux.metrics["inner_loss"]` is `[k]`.

    Source: truncated backpropagation through time (Williams and Peng 1990), as Vicol, Metz and Sohl-Dickstein 2021,
    arXiv:2112.13835, describe it for inner problems.

    >>> import jax.numpy as jnp, optax, metajax
    >>> model = metajax.Model(lambda key, x: jnp.zeros([3, 2]), lambda w, x: x @ w)
    >>> learner = metajax.learners.maml(model, inner=optax.sgd(0.1), num_steps=6)
    >>> examples = metajax.Examples(jnp.eye(3)[:2], jnp.array([0, 1]), jnp.ones(2, bool))
    >>> episode, params = metajax.Episode(examples, examples), jnp.zeros([3, 2])
    >>> estimator = metajax.hypergrad.persistent_truncation(2)
    >>> state = estimator.init(learner, params, episode, None)
    >>> for _ in range(2):
    ...     (loss, aux), grads, state = estimator.value_and_grad(learner, params, state, episode)
    >>> int(state.inner.step)
    4
    """
    _validate.positive_int("k", k)
    _check_start(start)
    name, loop = f"persistent_truncation({k})", mixed_loop()

    def init(learner: Learner, meta_params: Params, episode: Episode, key: Any, *, frozen: Params = None) -> Carried:
        return carry(name, learner, meta_params, episode, key, frozen, fresh_data=fresh_data)

    def value_and_grad(
        learner: Learner, meta_params: Params, state: Carried, episode: Episode, *, key: Any = None,
        frozen: Params = None,
    ) -> tuple[Any, Params, Any]:  # fmt: skip
        problem = inner_problem(name, learner)
        if reset:
            check_horizon("k", k, problem)
        restart, episode, loop_key = resume(name, problem, state, episode, key, reset=reset)

        def objective(meta_params: Params, loop: _inner.Loop, restart: Any) -> tuple[jax.Array, Any]:
            return segment(
                learner, meta_params, frozen, state.inner, episode, loop_key,
                restart=restart, num_steps=k, loop=loop, start=start, fresh_data=fresh_data,
            )  # fmt: skip

        if start == "constant" and not (reset and problem.num_steps == k):
            _refuse_zero(name, lambda meta_params: objective(meta_params, _inner.scan_loop(), False)[0], meta_params)
        value, grads = jax.value_and_grad(objective, has_aux=True)(meta_params, loop, restart)
        loss, (aux, inner) = value
        return (loss, aux), grads, carry_on(inner, episode, loop_key, fresh_data=fresh_data)

    return checking(Hypergrad(init, value_and_grad))


def check_horizon(argument: str, steps: int, problem: InnerProblem) -> None:
    """Raises a ValueError unless the inner loop consists of whole segments."""
    if problem.num_steps < 1 or problem.num_steps % steps:
        raise ValueError(f"{argument} must divide the number of inner steps {problem.num_steps}, got {steps}")


def carry(
    name: str, learner: Learner, meta_params: Params, episode: Episode, key: Any, frozen: Params, *, fresh_data: bool
) -> Carried:
    """Returns the state before the first outer step, which defines the shapes."""
    full, problem = _tree.fill(meta_params, frozen), inner_problem(name, learner)
    inner = _inner.inner_init(problem)(full, episode.support, key=_keys.of_task(key).adapt)
    return carry_on(inner, jax.tree.map(jnp.asarray, episode), key, fresh_data=fresh_data)._replace(
        started=jnp.zeros([], bool)
    )


def carry_on(inner: InnerState, episode: Any, key: Any, *, fresh_data: bool) -> Carried:
    """Returns the state that is kept after an outer step."""
    data = () if key is None else jax.random.key_data(key)
    return Carried(inner, () if fresh_data else episode, data, jnp.ones([], bool))


def resume(
    name: str, problem: InnerProblem, state: Carried, episode: Episode, key: Any, *, reset: bool
) -> tuple[jax.Array, Episode, Any]:
    """Returns whether a new inner loop starts, and the episode and the key of the next inner steps.

    Raises:
      ValueError: there is a key but the state has none, or the other way around.
    """
    restart = ~state.started
    if reset:
        restart |= state.inner.step >= problem.num_steps
    if (key is None) != (isinstance(state.key, tuple)):
        raise ValueError(
            f"hypergrad: {name} needs a key in init and in value_and_grad or in neither, got key={key!r} with a state "
            f"{'without' if isinstance(state.key, tuple) else 'with'} one"
        )
    if key is not None:
        data = _inner.select(restart, jax.random.key_data(key), state.key)
        key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
    return restart, episode if state.episode == () else _inner.select(restart, episode, state.episode), key


def segment(
    learner: Learner,
    meta_params: Params,
    frozen: Params,
    inner: InnerState,
    episode: Episode,
    key: Any,
    *,
    restart: jax.Array | Literal[False],
    num_steps: int,
    loop: _inner.Loop,
    fresh_data: bool,
    start: Start = "constant",
) -> tuple[jax.Array, tuple[Aux, InnerState]]:
    """Runs more inner steps and computes the outer loss after them: `(loss, (aux, state of the inner loop))`."""
    problem, full, keys = learner.problem, _tree.fill(meta_params, frozen), _keys.of_task(key)
    assert problem is not None
    adapt_keys, support = _keys.of_adaptation(keys.adapt), _inner.without_padding(episode.support)
    context = _inner.context_of(problem, full, support, adapt_keys)
    fresh = _inner.start_of(problem, full, support, adapt_keys, context)
    if start == "identity":
        inner = inner._replace(params=_pass_on(fresh.params, inner.params))
    if restart is not False:
        inner = _inner.select(restart, fresh, inner)
    length = num_steps if fresh_data else problem.num_steps
    steps = _inner.steps_of(problem, full, support, adapt_keys, length)
    if not fresh_data:  # the steps of the segment; an inner loop that never ends restarts its stream
        first = inner.step % length
        steps = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, num_steps), steps)
    arguments = Arguments(meta_params, frozen, support, adapt_keys.step, context)
    end, (values, _) = loop(problem, inner, arguments, steps, num_steps)
    adapted = _inner.finalize(problem, end.params, end.carry, arguments, adapt_keys, end.step)
    losses = _inner.inner_losses(values, steps)
    loss, aux = judge(learner, adapted, full, episode, _keys.fold(keys.outer, end.step), losses)
    return loss, (with_inner_loss(aux)._replace(episode=episode), end)
