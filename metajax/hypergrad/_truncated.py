"""Estimators that differentiate the last inner steps only: of a whole inner loop, or of one that outer steps share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from metajax.core import _inner, _rng, _tree, _validate
from metajax.core._inner import Arguments, InnerState
from metajax.core._types import Episode, Hypergrad, InnerProblem, Learner, Params
from metajax.hypergrad._checks import checking
from metajax.hypergrad._explicit import explicit, outer_objective
from metajax.hypergrad._mixed import mixed_loop
from metajax.hypergrad._parts import inner_problem, watch

Start = Literal["identity", "constant"]


def truncated(k: int, *, start: Start = "identity", step_weights: Sequence[float] | None = None) -> Hypergrad:
    """Hypergradient through the last `k` inner steps (Shaban et al. 2019).

    These are differentiated exactly, as by `mixed_mode`: through the fast weights and through what their inner losses
    and update rules read of the meta-parameters. The steps before them only run, so that memory does not grow with
    their number. With `a` the contraction of an inner step, the bias falls as `a**k`.

    Where the inner loop starts from the meta-parameters (MAML), the dependence on the start lies in the truncated
    steps, and the paper's estimator is zero. `start` says what these steps count as.

    Args:
      k: how many of the last steps. With `num_steps` or more nothing is truncated.
      start: "identity": the truncated steps pass a change of the start on as it is, which is first-order MAML for
        them and exact for the rest. "constant": they pass on nothing, as in the paper. Both are the same where the
        start does not depend on the meta-parameters.
      step_weights: as for `unrolled`; 0 for the steps that are truncated.

    Raises:
      ValueError: an argument is not as above; or (when used) there are not as many weights as inner steps, the start is
        "constant" and the hypergradient zero by construction, or a case below.

    | case | result |
    |---|---|
    | zero inner steps, or an update rule that cannot be differentiated (`optax.adam` without `eps_root`) | refused |
    | the meta-parameters are only the start (MAML) | "constant" is refused |
    | some are only the start (the head in ANIL) | "constant" gives these a zero gradient |
    | NaN in an inner step, truncated or not | loss and gradient are NaN |
    | a learner without an inner problem | differentiated directly: exact |

    Sources: Shaban, Cheng, Hatch and Boots 2019, Truncated Back-propagation for Bilevel Optimization,
    arXiv:1810.10667. The identity for a long inner loop: Shin, Lee, Gong and Hwang 2021, arXiv:2102.07215.

    >>> import metajax
    >>> metajax.hypergrad.truncated(5).init(None, None, None, None)
    ()
    """
    _validate.positive_int("k", k)
    _check_start(start)
    if step_weights is not None and any(step_weights[:-k]):
        raise ValueError(f"step_weights must be 0 before the last {k} inner steps, got {tuple(step_weights)}")
    estimator = explicit(_last_steps(k, start, mixed_loop()), step_weights)
    # mixed mode cannot be differentiated forwards; which of the exact loops runs makes no difference here
    plain = _last_steps(k, start, _inner.scan_loop())

    def value_and_grad(
        learner: Learner, meta_params: Params, state: Any, episode: Episode, *, key: Any = None, frozen: Params = None
    ) -> tuple[Any, Params, Any]:
        if start == "constant" and learner.problem is not None and learner.problem.num_steps > k:
            _refuse_zero(
                f"truncated({k})",
                lambda meta_params: outer_objective(
                    learner, meta_params, episode, key=key, frozen=frozen, loop=plain
                )[0],
                meta_params,
            )  # fmt: skip
        return estimator.value_and_grad(learner, meta_params, state, episode, key=key, frozen=frozen)

    return checking(Hypergrad(estimator.init, value_and_grad))


def _check_start(start: str) -> None:
    _validate.one_of("start", start, ("identity", "constant"))


def _last_steps(k: int, start: Start, last: _inner.Loop) -> _inner.Loop:
    """A loop whose last `k` steps are run by `last`, and whose other steps are not differentiated."""

    def loop(
        problem: InnerProblem, begin: InnerState, arguments: Arguments, num_steps: int,
        visit: _inner.Visit | None = None,
    ) -> tuple[InnerState, tuple[jax.Array, Any]]:  # fmt: skip
        before = num_steps - k
        if before <= 0:
            return last(problem, begin, arguments, num_steps, visit)
        fixed = arguments._replace(meta_params=jax.lax.stop_gradient(arguments.meta_params))
        state, (first, _) = _inner.scan_loop()(problem, jax.lax.stop_gradient(begin), fixed, before)
        if start == "identity":
            state = state._replace(params=_pass_on(begin.params, state.params))
        state, (values, visits) = last(problem, state, arguments, k, visit)
        if visit is not None:
            visits = jnp.concatenate([jnp.zeros([before], visits.dtype), visits])
        return state, (jnp.concatenate([first, values]), visits)

    return loop


def _pass_on(start: Params, params: Params) -> Params:
    """`params`, with the derivatives of `start`."""
    return jax.tree.map(lambda now, first: now + (first - jax.lax.stop_gradient(first)), params, start)


def _refuse_zero(name: str, function: Callable[[Params], jax.Array], meta_params: Params) -> None:
    """Refuses a hypergradient that is zero by construction. Nothing is computed."""
    watched, reached = watch()
    jax.eval_shape(lambda point: jax.jvp(lambda point: watched(function(point)), (point,), (point,)), meta_params)
    if not reached:
        raise ValueError(
            f'start must be "identity" where the meta-parameters are only the start of the inner loop: the '
            f'hypergradient of {name} would be zero, got "constant"'
        )


class Carried(NamedTuple):
    """What a persistent estimator keeps of a task from one outer step to the next.

    Attributes:
      inner: where the inner loop stands.
      episode: the episode that it runs on, `()` where each outer step brings its own.
      started: bool scalar, False before the first outer step.
    """

    inner: InnerState
    episode: Any
    started: jax.Array


def persistent_truncation(k: int, *, start: Start = "identity", reset: bool = True, stream: bool = False) -> Hypergrad:
    """Truncation with carried inner state: each outer step runs `k` more inner steps and differentiates these only.

    Made for inner problems that last over many outer steps (hyper-parameters tuned while a model trains). The outer
    loss is that after the `k` steps. Where an outer step starts an inner loop, the start is differentiated too.

    The state of a task is its inner state and its episode; `outer_update(...).init(..., num_tasks=...)` makes one for
    each task of a batch. For few-shot learning this means that an episode stays at its place in the batch for
    `num_steps / k` outer steps while those passed for this place are not looked at, and that its fast weights
    started from older meta-parameters. `aux["episode"]` is the episode that loss and outputs speak of.

    Args:
      k: inner steps of each outer step.
      start: what the steps before these count as, see `truncated`.
      reset: whether a new inner loop starts, on a new episode, when `problem.num_steps` are done; else it lasts for
        ever.
      stream: whether each outer step brings new data of the same inner problem (minibatches of one data set), so that
        no episode is kept.

    Raises:
      ValueError: an argument is not as above; or (when used) the learner has no inner problem, `k` does not divide
        `num_steps` with `reset`, the start is "constant" and the hypergradient zero by construction, or a case below.

    | case | result |
    |---|---|
    | zero inner steps, or an update rule that cannot be differentiated | refused |
    | the meta-parameters are only the start (MAML) | "constant" is refused, unless each outer step starts anew |
    | NaN in an inner step | loss and gradient are NaN until the inner loop starts anew |
    | a learner without an inner problem | refused |

    `aux["inner_loss"]` is `[k]`.

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

    def init(learner: Learner, meta_params: Params, episode: Episode, key: Any) -> Carried:
        return carry(name, learner, meta_params, episode, key, stream=stream)

    def value_and_grad(
        learner: Learner, meta_params: Params, state: Carried, episode: Episode, *, key: Any = None,
        frozen: Params = None,
    ) -> tuple[Any, Params, Any]:  # fmt: skip
        problem = inner_problem(name, learner)
        if reset:
            check_horizon("k", k, problem)
        restart, episode = resume(problem, state, episode, reset=reset)

        def objective(meta_params: Params, loop: _inner.Loop, restart: Any) -> tuple[jax.Array, Any]:
            return segment(
                problem, learner.outer_loss, meta_params, frozen, state.inner, episode, key,
                restart=restart, num_steps=k, loop=loop, start=start,
            )  # fmt: skip

        if start == "constant" and not (reset and problem.num_steps == k):
            _refuse_zero(name, lambda meta_params: objective(meta_params, _inner.scan_loop(), False)[0], meta_params)
        value, grads = jax.value_and_grad(objective, has_aux=True)(meta_params, loop, restart)
        loss, (aux, inner) = value
        return (loss, aux), grads, Carried(inner, () if stream else episode, jnp.ones_like(state.started))

    return checking(Hypergrad(init, value_and_grad))


def check_horizon(argument: str, steps: int, problem: InnerProblem) -> None:
    """An inner loop must end with a segment."""
    if problem.num_steps < 1 or problem.num_steps % steps:
        raise ValueError(f"{argument} must divide the number of inner steps {problem.num_steps}, got {steps}")


def carry(name: str, learner: Learner, meta_params: Params, episode: Episode, key: Any, *, stream: bool) -> Carried:
    """The state before the first outer step, which gives the shapes."""
    inner = _inner.inner_init(inner_problem(name, learner))(meta_params, episode.support, key=key)
    kept = () if stream else jax.tree.map(jnp.asarray, episode)
    return Carried(inner, kept, jnp.zeros([], bool))


def resume(problem: InnerProblem, state: Carried, episode: Episode, *, reset: bool) -> tuple[jax.Array, Episode]:
    """Whether a new inner loop starts, and the episode that the next inner steps run on."""
    restart = ~state.started
    if reset:
        restart |= state.inner.step >= problem.num_steps
    return restart, episode if state.episode == () else select(restart, episode, state.episode)


def select(condition: jax.Array, yes: Any, no: Any) -> Any:
    """One of two trees."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def segment(
    problem: InnerProblem,
    outer_loss: Callable[..., tuple[jax.Array, dict[str, Any]]],
    meta_params: Params,
    frozen: Params,
    inner: InnerState,
    episode: Episode,
    key: Any,
    *,
    restart: jax.Array | Literal[False],
    num_steps: int,
    loop: _inner.Loop,
    start: Start = "constant",
) -> tuple[jax.Array, tuple[dict[str, Any], InnerState]]:
    """Some more inner steps and the outer loss after them: `(loss, (aux, where the inner loop stands))`."""
    full = _tree.merge(meta_params, frozen)
    init_key, loop_key, finish_key, loss_key = _rng.split(key, 4)
    fresh = _inner.inner_init(problem)(full, episode.support, key=init_key)
    if start == "identity":
        inner = inner._replace(params=_pass_on(fresh.params, inner.params))
    if restart is not False:
        inner = select(restart, fresh, inner)
    arguments = Arguments(meta_params, frozen, episode.support, loop_key)
    end, (losses, _) = loop(problem, inner, arguments, num_steps)
    adapted = problem.finish(end.params, full, episode.support, finish_key)
    loss, aux = outer_loss(adapted, full, episode.query, key=loss_key)
    return loss, ({**aux, "inner_loss": losses, "episode": episode}, end)
