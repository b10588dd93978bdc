"""Change points: estimates how long the current regime has lasted, and adapts only to its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metajax.core import _validate
from metajax.core._types import Examples, Learner, Params
from metajax.online._online import Online, no_steps, push

LogLikelihood = Callable[[jax.Array, jax.Array], jax.Array]  # (outputs [n, ...], targets [n, ...]) -> [n]


def run_length_init(longest: int) -> jax.Array:
    """Returns the belief before a stream begins: the current regime has no steps yet.

    Args:
      longest: the largest run length, at least 1; it also stands for all longer runs.

    Returns:
      float32 `[longest + 1]` log-probabilities of 0, 1, ... `longest` and more steps.

    Raises:
      ValueError: `longest` is below 1.

    >>> run_length_init(2).tolist()
    [0.0, -inf, -inf]
    """
    _validate.positive_int("longest", longest)
    return jnp.full([longest + 1], -jnp.inf).at[0].set(0.0)


def run_length_update(belief: jax.Array, log_likelihoods: jax.Array, *, hazard: float) -> tuple[jax.Array, jax.Array]:
    """Performs one step of Bayesian online change-point detection (Adams and MacKay 2007).

    Each run length r predicts the step from the last r steps. The belief is weighted by the likelihoods of these
    predictions and then advanced: the regime ends with the probability `hazard`, or all runs become one step longer.

    Args:
      belief: `[longest + 1]` log-probabilities of the run lengths before the step.
      log_likelihoods: `[longest + 1]`, log-likelihoods of the step under the prediction of each run length.
      hazard: probability of a change at a step, above 0 and below 1.

    Returns:
      The belief before the next step, and the log-probability of this step under the mixture of all runs.

    Raises:
      ValueError: the shapes differ, or `hazard` is out of its range.

    Source: Adams and MacKay 2007, Bayesian Online Changepoint Detection, arXiv:0710.3742.

    >>> belief, evidence = run_length_update(run_length_init(2), jnp.log(jnp.array([0.5, 1.0, 1.0])), hazard=0.25)
    >>> jnp.exp(belief).tolist(), round(float(jnp.exp(evidence)), 6)
    ([0.25, 0.75, 0.0], 0.5)
    """
    check_hazard(hazard)
    if belief.ndim != 1 or belief.shape != log_likelihoods.shape or belief.shape[0] < 2:
        raise ValueError(
            f"log_likelihoods must be a line of one number for each of the run lengths of belief {belief.shape}, got "
            f"the shape {log_likelihoods.shape}"
        )
    joint = belief + log_likelihoods
    evidence = jax.nn.logsumexp(joint)
    weighed = joint - evidence
    longer = weighed[:-1].at[-1].set(jnp.logaddexp(weighed[-2], weighed[-1])) + jnp.log1p(-hazard)
    return jnp.concatenate([jnp.log(jnp.array([hazard], belief.dtype)), longer]), evidence


def check_hazard(hazard: Any) -> None:
    """Raises a ValueError if `hazard` is not a probability above 0 and below 1."""
    _validate.positive_float("hazard", hazard)
    if hazard >= 1:
        raise ValueError(f"hazard must be a number above 0 and below 1, got {hazard!r}")


class ChangeState(NamedTuple):
    """The state of `change_points`.

    Attributes:
      params: meta-parameters.
      support: the last `longest` steps in order of time, with padding in front if there were fewer.
      belief: `[longest + 1]` log-probabilities of how many of them belong to the current regime.
      evidence: scalar, log-probability of the last step before it was observed; 0 at the beginning.

    >>> ChangeState._fields
    ('params', 'support', 'belief', 'evidence')
    """

    params: Params
    support: Examples
    belief: jax.Array
    evidence: jax.Array


def change_points(learner: Learner, *, longest: int, hazard: float, log_likelihood: LogLikelihood) -> Online:
    """Adapts to the steps since the last change, which is unannounced (after MOCA, Harrison et al. 2020).

    Every run length is a hypothesis: the learner adapted to the last r steps predicts the next one, and Bayesian
    online change-point detection weights the hypotheses by their predictive log-likelihoods. The most likely hypothesis
    is used. MOCA uses learners with a closed-form posterior. This function accepts any learner and adapts it to
    `longest + 1` support sets side by side at each step.

    Items are `Examples` of one step, `[n, ...]`, without a class mask.

    Args:
      learner: the learner that adapts, meta-trained with support sets of 0 to `longest` steps.
      longest: number of steps that are remembered, at least 1.
      hazard: probability of a change at a step, above 0 and below 1.
      log_likelihood: `(outputs [n, ...], targets [n, ...]) -> [n]`, such as
        `lambda outputs, targets: -metajax.core.cross_entropy(outputs, targets)`.

    Returns:
      An `Online` whose `adapt` takes only the state, and whose meta-parameters do not change.

    Raises:
      ValueError: an argument has another type, `longest` is below 1, or `hazard` is out of its range.

    Source: Harrison et al. 2020, Continuous Meta-Learning without Tasks, arXiv:1912.08866.

    >>> import optax, metajax
    >>> learner = metajax.learners.maml(metajax.models.mlp(1), optax.sgd(0.1), loss=metajax.core.squared_error)
    >>> online = change_points(learner, longest=4, hazard=0.1,
    ...                        log_likelihood=lambda outputs, targets: -jnp.sum((outputs - targets) ** 2, -1))
    >>> item = metajax.Examples(jnp.ones([1, 1]), jnp.ones([1, 1]), jnp.ones(1, bool))
    >>> state = online.observe(online.init(jax.random.key(0), item), item)
    >>> round(float(jnp.exp(state.belief[0])), 6)
    0.1
    """
    _validate.instance("learner", learner, Learner)
    _validate.positive_int("longest", longest)
    check_hazard(hazard)
    if not callable(log_likelihood):
        raise ValueError(f"log_likelihood must be a function, got {log_likelihood!r}")

    def init(key: jax.Array, item: Examples, params: Params | None = None) -> ChangeState:
        params = learner.init(key, item.inputs) if params is None else params
        return ChangeState(params, no_steps(item, longest), run_length_init(longest), jnp.zeros([]))

    def last(support: Examples, length: jax.Array) -> Examples:
        """Returns the support set of the last `length` steps."""
        rows = support.mask.shape[0]
        return support._replace(mask=support.mask & (jnp.arange(rows) >= rows - length * (rows // longest)))

    def adapt(state: ChangeState) -> Any:
        return learner.adapt(state.params, last(state.support, jnp.argmax(state.belief)))

    def loss(state: ChangeState, item: Examples) -> jax.Array:
        return learner.outer_loss(adapt(state), state.params, item)[0]

    def observe(state: ChangeState, item: Examples) -> ChangeState:
        def judged(length: jax.Array) -> jax.Array:
            adapted = learner.adapt(state.params, last(state.support, length))
            outputs = learner.predict(adapted, item.inputs, mask=item.mask)
            return jnp.sum(jnp.where(item.mask, log_likelihood(outputs, item.targets), 0))

        likelihoods = jax.vmap(judged)(jnp.arange(longest + 1))
        belief, evidence = run_length_update(state.belief, likelihoods, hazard=hazard)
        return ChangeState(state.params, push(state.support, item), belief, evidence)

    return Online(init, adapt, loss, observe, lambda state: (state, {}))
