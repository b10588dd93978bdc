"""Averages of parameters, over several solutions or over one training run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metajax.core import _tree, _validate
from metajax.core._types import MetaState, OuterUpdate, Params, PartialSums, PerTask


def soup(solutions: Sequence[Params], weights: Sequence[float] | None = None) -> Params:
    """Returns the weighted average of several solutions, such as one model fine-tuned on several tasks.

    Averaging is meaningful only for solutions that start from the same parameters.

    Args:
      solutions: trees with the same structure, at least one.
      weights: one weight for each solution, not negative and not all 0. None computes the mean.

    Returns:
      A tree with the same structure and dtypes. Leaves that are not floating-point must be equal in all solutions and
      are returned unchanged.

    Raises:
      ValueError: there is no solution, structures or shapes differ, there are too few or too many weights, a weight is
        negative or all are 0, or leaves that are not floating-point differ.

    Source: Wortsman et al. 2022, Model soups, arXiv:2203.05482.

    >>> soup([{"w": jnp.array([0.0, 4.0])}, {"w": jnp.array([2.0, 0.0])}], weights=[3, 1])["w"].tolist()
    [0.5, 3.0]
    """
    shapes = [jax.tree.map(lambda leaf: (np.shape(leaf), jnp.result_type(leaf)), solution) for solution in solutions]
    if not solutions or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"solutions must be trees of one structure, shapes and dtypes, got {shapes}")
    weights = [1.0] * len(solutions) if weights is None else list(weights)
    if len(weights) != len(solutions) or not sum(_validate.non_negative_float("weights", weight) for weight in weights):
        raise ValueError(f"weights must be {len(solutions)} numbers, one of them above 0, got {weights}")
    shares = jnp.array(weights, float) / sum(weights)

    def average(*leaves: Any) -> Any:
        stacked = jnp.stack([jnp.asarray(leaf) for leaf in leaves])
        if jnp.issubdtype(stacked.dtype, jnp.floating):
            return jnp.tensordot(shares, stacked, axes=1).astype(stacked.dtype)  # at least in the dtype of `shares`
        if any(not np.array_equal(leaf, leaves[0]) for leaf in leaves):
            raise ValueError(f"solutions must agree in what is no floating-point number, got {leaves}")
        return leaves[0]

    return jax.tree.map(average, *solutions)


def greedy_soup(solutions: Sequence[Params], score: Callable[[Params], float]) -> tuple[Params, tuple[int, ...]]:
    """Averages the best solution with every other solution that does not lower the score, tried in order of score.

    Args:
      solutions: as for `soup`.
      score: returns the score of parameters on held-out data; higher is better.

    Returns:
      The average, which scores at least as high as the best solution, and the indices of the solutions in it.

    Raises:
      ValueError: as for `soup`, or a score is NaN.

    Source: Wortsman et al. 2022, arXiv:2203.05482, recipe 1.

    >>> found, kept = greedy_soup([jnp.array(0.0), jnp.array(4.0), jnp.array(9.0)], lambda x: -abs(float(x) - 2.5))
    >>> float(found), kept
    (2.0, (1, 0))
    """
    soup(solutions)  # validates the solutions
    scores = [float(score(solution)) for solution in solutions]
    if any(np.isnan(scores)):
        raise ValueError(f"score must give numbers, got {scores}")
    first, *others = sorted(range(len(solutions)), key=lambda place: -scores[place])
    kept, best, found = [first], scores[first], solutions[first]
    for place in others:
        tried = soup([solutions[one] for one in (*kept, place)])
        if (value := float(score(tried))) >= best:
            kept, best, found = [*kept, place], value, tried
    return found, tuple(kept)


class Averaged(NamedTuple):
    """The optimizer state of `averaged`.

    Attributes:
      inner: the optimizer state of the wrapped meta step.
      params: the average of the meta-parameters.

    >>> Averaged._fields
    ('inner', 'params')
    """

    inner: Any
    params: Params


def averaged(outer: OuterUpdate, decay: float = 0.999) -> OuterUpdate:
    """Keeps an exponential moving average of the meta-parameters in the state, for evaluation.

    At step t the old average has weight min(decay, (1 + t) / (10 + t)), so that the initial parameters are soon
    forgotten. `averaged_params(state)` returns the average. It does not affect training.

    Args:
      outer: any meta step. If `metajax.parallel.shard` accepts `outer`, it accepts the result too.
      decay: weight of the old average in each step, at least 0 and below 1.

    Returns:
      An `OuterUpdate` with the same signature, whose state holds an `Averaged` as `opt_state`.

    Raises:
      ValueError: `outer` is not an `OuterUpdate`, or `decay` is out of range.

    Source: Polyak and Juditsky 1992, Acceleration of Stochastic Approximation by Averaging, SIAM J. Control Optim. 30.

    >>> import jax, jax.numpy as jnp, metajax
    >>> def update(state, episodes):
    ...     return state._replace(params=state.params + 1, step=state.step + 1), {}
    >>> start = metajax.MetaState(jnp.zeros(1), (), (), jnp.zeros([], jnp.int32), jax.random.key(0))
    >>> outer = metajax.training.averaged(metajax.OuterUpdate(lambda key, episode: start, update), decay=0.5)
    >>> state, _ = outer.update(outer.init(None, None), None)
    >>> state.params.tolist(), averaged_params(state).round(3).tolist()
    ([1.0], [0.8180000185966492])
    """
    _validate.instance("outer", outer, OuterUpdate)
    _validate.below_one("decay", decay)

    def init(*arguments: Any, **options: Any) -> MetaState:
        state = outer.init(*arguments, **options)
        # a copy, because both may be donated
        return state._replace(opt_state=Averaged(state.opt_state, jax.tree.map(jnp.array, state.params)))

    def bare(state: MetaState) -> MetaState:
        return state._replace(opt_state=state.opt_state.inner)

    def with_average(new: MetaState, old: MetaState) -> MetaState:
        kept = jnp.minimum(decay, (1 + new.step) / (10 + new.step))
        average = jax.tree.map(
            lambda now, before: optax.incremental_update(now, before, (1 - kept).astype(now.dtype))
            if jnp.issubdtype(now.dtype, jnp.floating) else now,
            new.params, old.opt_state.params,
        )  # fmt: skip
        return new._replace(opt_state=Averaged(new.opt_state, average))

    def update(state: MetaState, episodes: Any, frozen: Params = None) -> tuple[MetaState, dict[str, Any]]:
        new, metrics = outer.update(bare(state), episodes, *_tree.given(frozen))
        return with_average(new, state), metrics

    if outer.partial_sums is None or outer.apply_updates is None:
        return outer.wrapped(init, update)
    inner_apply = outer.apply_updates

    def apply_updates(
        state: MetaState, total: PartialSums, per_task: PerTask, frozen: Params = None
    ) -> tuple[MetaState, dict[str, Any]]:
        new, metrics = inner_apply(bare(state), total, per_task, frozen)
        return with_average(new, state), metrics

    return outer._replace(init=init, update=update, apply_updates=apply_updates)


def averaged_params(state: MetaState) -> Params:
    """Returns the average of the meta-parameters in a state of `averaged`.

    Raises:
      ValueError: the state was made by another meta step.

    >>> averaged_params(MetaState(2.0, Averaged((), 1.5), (), jnp.array(0), jax.random.key(0)))
    1.5
    """
    return _validate.instance("state.opt_state", state.opt_state, Averaged).params
