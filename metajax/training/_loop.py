"""The training loop."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metajax.core import _tree, _validate
from metajax.core._types import Episode, MetaState, OuterUpdate, Params
from metajax.tasks import require_same

# called with (step, state, metrics) after each step; a callback must copy what it needs before it returns
Callback = Callable[[int, MetaState, dict[str, Any]], None]


class NonFiniteError(ValueError):
    """Raised if the loss or the meta-parameters are NaN or infinite.

    >>> issubclass(NonFiniteError, ValueError)
    True
    """


def fit(
    outer: OuterUpdate | Callable[..., Any],
    state: MetaState,
    episodes: Iterable[Episode],
    *,
    steps: int,
    frozen: Params = None,
    callbacks: Sequence[Callback] = (),
) -> MetaState:
    """Takes meta steps until `state.step` is `steps`.

    The update is compiled once and the state is donated. The loss of a step is checked after the next step is
    dispatched, so that the accelerator never waits for the host.

    Args:
      outer: an `OuterUpdate`, or an update function `(state, episodes) -> (state, metrics)`.
      state: the initial state, which is consumed.
      episodes: batches of episodes, the first for step `state.step`. The batch of the next step is taken after the
        callbacks of this step, so callbacks can save `episodes.position` as the position from which to resume.
      steps: the total number of steps, including those that `state` has already taken.
      frozen: the frozen base, or None; it is never donated.
      callbacks: called in order after each step as `callback(step, state, metrics)`, where `step` is the number of
        steps taken so far. If a callback has a method `close`, it is called at the end, also after an error.

    Returns:
      The state after `steps` steps.

    Raises:
      NonFiniteError: the loss of a step is not finite and `skip_nonfinite` did not skip the step. The error names the
        step. Checkpoints and logs of the callbacks are kept.
      ValueError: `steps` is below 1, the episodes end early, or their task type differs from that of the learner.

    >>> import jax, jax.numpy as jnp, optax, metajax
    >>> learner = metajax.learners.maml(metajax.models.mlp(outputs=2), inner=optax.sgd(0.1))
    >>> outer = metajax.outer_update(learner, optax.adam(1e-2), hypergrad=metajax.hypergrad.mixed_mode())
    >>> examples = metajax.Examples(jnp.eye(4), jnp.array([0, 0, 1, 1]), jnp.ones(4, bool))
    >>> episode = metajax.Episode(examples, examples)
    >>> batch = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), episode)
    >>> losses = []
    >>> state = metajax.training.fit(outer, outer.init(jax.random.key(0), episode), [batch] * 3, steps=3,
    ...                              callbacks=[lambda step, state, metrics: losses.append(metrics["loss"])])
    >>> int(state.step), bool(losses[-1] < losses[0])
    (3, True)
    """
    _validate.positive_int("steps", steps)
    of_episodes, of_learner = (getattr(part, "task", None) for part in (episodes, outer))
    require_same(of_episodes, of_learner, name="episodes", other_name="learner")
    update = jax.jit(update_of(outer), donate_argnums=0)
    taken = int(state.step)
    before: tuple[int, dict[str, Any]] | None = None
    with closing(callbacks):
        stream = itertools.islice(iter(episodes), max(steps - taken, 0))
        for step, batch in enumerate(stream, start=taken + 1):
            state, metrics = update(state, batch, *_tree.given(frozen))
            if before is not None:
                require_finite_loss(*before)
            before = step, metrics
            for callback in callbacks:
                callback(step, state, metrics)
        if before is not None:
            require_finite_loss(*before)
    if int(state.step) < steps:
        raise ValueError(f"episodes must last for {steps} steps, got {int(state.step)}")
    return state


def update_of(outer: OuterUpdate | Callable[..., Any]) -> Callable[..., Any]:
    """Returns the update function of an `OuterUpdate`, or the argument if it is an update function."""
    return outer.update if isinstance(outer, OuterUpdate) else outer


@contextlib.contextmanager
def closing(callbacks: Sequence[Callback]) -> Iterator[list[Callback]]:
    """Calls the `close` methods of the callbacks on exit, in order, even after an error or if another `close` fails.

    Yields:
      Callbacks without `close`, for nested loops.

    >>> with closing([print]) as callbacks:
    ...     callbacks[0]("a step")
    a step
    """
    with contextlib.ExitStack() as stack:
        for callback in reversed(callbacks):
            if hasattr(callback, "close"):
                stack.callback(callback.close)
        yield [lambda *seen, call=callback: call(*seen) for callback in callbacks]


def require_finite_loss(step: int, metrics: dict[str, Any]) -> None:
    """Raises a NonFiniteError that names the step if its loss is not finite, unless the step was skipped."""
    loss = float(metrics["loss"])
    if not np.isfinite(loss) and not bool(metrics.get("skipped", False)):
        raise NonFiniteError(f"the loss is {loss} at step {step}: lower the outer or inner rate, or clip the gradient")


def require_finite_params(step: int, state: MetaState) -> None:
    """Raises a NonFiniteError that names the step if a meta-parameter is not finite."""
    # checked on their devices: parameters that are spread over processes cannot be copied to one process
    if not bool(_all_finite(state.params)):
        raise NonFiniteError(f"a meta-parameter is not finite after step {step}")


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
