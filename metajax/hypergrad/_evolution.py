"""Evolution strategies: hypergradients computed only from values of the outer loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metajax.core import _chunks, _inner, _tree, _validate
from metajax.core._inner import InnerState
from metajax.core._objective import outer_objective
from metajax.core._types import Aux, Episode, Hypergrad, Learner, Params
from metajax.hypergrad._parts import inner_problem, stateless, with_inner_loss
from metajax.hypergrad._truncated import Carried, carry, carry_on, check_horizon, resume, segment


def evolution(*, sigma: float, pairs: int, antithetic: bool = True, chunk: int | None = None) -> Hypergrad:
    """Hypergradient by evolution strategies: only the inner loss is differentiated (Metz et al. 2019).

    Computes the mean over `pairs` random directions `e` of `e (L(p + sigma e) - L(p - sigma e)) / (2 sigma)`, an
    unbiased estimate of the gradient of the outer loss, smoothed by a normal distribution with standard deviation
    `sigma`. Supports any inner rule, and any number of inner steps with the memory of one step. The variance grows with
    the number of trained scalars.

    Loss and `aux` belong to the unperturbed meta-parameters, which takes one more inner loop. All inner loops of a task
    share their key, so that minibatches and dropout do not add to the differences.

    Args:
      sigma: standard deviation of the perturbations.
      pairs: number of directions.
      antithetic: whether each direction is evaluated on both sides. Otherwise the other side is the value at `p`: this
        takes half the inner loops, but even terms of the loss remain in each difference as noise.
      chunk: number of directions that run together (vmapped); a divisor of `pairs`. None runs all together.

    Raises:
      ValueError: an argument is invalid, or (when used) there is no key.

    | case | result |
    |---|---|
    | zero inner steps | as any other number |
    | NaN in one of the inner loops | the gradient is NaN; the loss only if it is NaN without perturbation |
    | a learner without an inner problem | its adaptation and outer loss are evaluated the same way |
    | `key=None` | refused: directions that are the same in each outer step never cover the other directions |
    | `sigma` below the precision of a meta-parameter (1/256 of it in bfloat16) | rounded away: no slope |

    Sources: Metz et al. 2019, Understanding and Correcting Pathologies in the Training of Learned Optimizers,
    arXiv:1810.10180; Salimans et al. 2017, arXiv:1703.03864.

    >>> import jax, jax.numpy as jnp, optax, metajax
    >>> model = metajax.Model(lambda key, x: jnp.zeros([3, 2]), lambda w, x: x @ w)
    >>> learner = metajax.learners.maml(model, inner=optax.sgd(0.1))
    >>> examples = metajax.Examples(jnp.eye(3)[:2], jnp.array([0, 1]), jnp.ones(2, bool))
    >>> fn = jax.jit(metajax.hypergrad.value_and_grad(learner, metajax.hypergrad.evolution(sigma=0.1, pairs=4)))
    >>> (loss, aux), grads = fn(jnp.zeros([3, 2]), metajax.Episode(examples, examples), key=jax.random.key(0))
    >>> grads.shape
    (3, 2)
    """
    _check(sigma, pairs, chunk)

    def value_and_grad(
        learner: Learner, meta_params: Params, state: Any, episode: Episode, *, key: Any = None, frozen: Params = None
    ) -> tuple[Any, Params, Any]:
        noise_key, task_key = _split("evolution()", key)

        def objective(meta_params: Params) -> tuple[jax.Array, Aux]:
            return outer_objective(learner, meta_params, episode, key=task_key, frozen=frozen, loop=_inner.scan_loop())

        loss, aux = objective(meta_params)

        def one(key: jax.Array) -> tuple[Params, tuple[()]]:
            noise = _draw(key, meta_params)
            if antithetic:
                values = jax.vmap(lambda side: objective(_shift(meta_params, side, noise))[0])(_sides(sigma))
                slope = (values[0] - values[1]) / (2 * sigma)
            else:
                slope = (objective(_shift(meta_params, sigma, noise))[0] - loss) / sigma
            return _times(noise, slope), ()

        grads, _ = _mean_over_pairs(one, (jax.random.split(noise_key, pairs),), meta_params, pairs, chunk)
        return (loss, with_inner_loss(aux)), grads, state

    return stateless(value_and_grad)


class Population(NamedTuple):
    """State that persistent evolution keeps for a task.

    Attributes:
      carried: the unperturbed inner loop, and the episode.
      inner: perturbed inner loops, leaves `[pairs, 2, ...]`.
      noise: key data from which the perturbations since the start of the inner loop are drawn (again).
    """

    carried: Carried
    inner: InnerState
    noise: jax.Array


def persistent_evolution(
    *, sigma: float, pairs: int, steps: int, chunk: int | None = None, fresh_data: bool = False
) -> Hypergrad:
    """Persistent evolution strategies: unbiased estimates from segments of an inner loop (Vicol et al. 2021).

    Each outer step runs `steps` more inner steps of a population that keeps its inner states, with new perturbations,
    and weights the difference of a pair by the sum of all perturbations that were applied to the pair. In expectation
    this is the derivative of the (smoothed) outer loss after the segment, through all steps since the start;
    truncation differentiates only the steps of the segment. While the meta-parameters do not change, the
    `num_steps / steps` estimates of an inner loop sum to the hypergradient of the sum of its losses. The variance grows
    with the number of estimates.

    The unperturbed inner loop is carried too. It gives the loss and `aux` after the segment, and
    `aux.metrics["inner_loss"]` is `[steps]`. For the kept episode, streams and carries see `persistent_truncation`.

    Args:
      sigma: standard deviation of a perturbation.
      pairs: number of antithetic pairs.
      steps: number of inner steps in each outer step; a divisor of the number of inner steps, after which a new inner
        loop starts.
      chunk: number of pairs that run together (vmapped); a divisor of `pairs`. None runs all together.
      fresh_data: whether each outer step provides new data of the same inner problem, so that no episode is kept.

    Raises:
      ValueError: an argument is invalid; or (when used) there is no key, the learner has no inner problem, or
        `steps` does not divide `num_steps`.

    | case | result |
    |---|---|
    | zero inner steps | refused |
    | NaN in one perturbed inner loop | the gradient is NaN until a new inner loop starts |
    | a learner without an inner problem | refused |
    | `key=None` | refused, as in `evolution` |

    Source: Vicol, Metz and Sohl-Dickstein 2021, Unbiased Gradient Estimation in Unrolled Computation Graphs with
    Persistent Evolution Strategies, arXiv:2112.13835. Perturbations are drawn again from their key instead of kept.

    >>> import jax, jax.numpy as jnp, optax, metajax
    >>> model = metajax.Model(lambda key, x: jnp.zeros([3, 2]), lambda w, x: x @ w)
    >>> learner = metajax.learners.maml(model, inner=optax.sgd(0.1), num_steps=6)
    >>> examples = metajax.Examples(jnp.eye(3)[:2], jnp.array([0, 1]), jnp.ones(2, bool))
    >>> episode, params, key = metajax.Episode(examples, examples), jnp.zeros([3, 2]), jax.random.key(0)
    >>> estimator = metajax.hypergrad.persistent_evolution(sigma=0.1, pairs=4, steps=2)
    >>> state = estimator.init(learner, params, episode, key)
    >>> step = jax.jit(lambda state: estimator.value_and_grad(learner, params, state, episode, key=key))
    >>> _, grads, state = step(state)
    >>> grads.shape, state.inner.params.shape
    ((3, 2), (4, 2, 3, 2))
    """
    _check(sigma, pairs, chunk)
    _validate.positive_int("steps", steps)
    name = "persistent_evolution()"

    def init(learner: Learner, meta_params: Params, episode: Episode, key: Any, *, frozen: Params = None) -> Population:
        noise_key, task_key = _split(name, key)
        carried = carry(name, learner, meta_params, episode, task_key, frozen, fresh_data=fresh_data)
        inner = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (pairs, 2, *leaf.shape)), carried.inner)
        return Population(carried, inner, jax.random.key_data(noise_key))

    def value_and_grad(
        learner: Learner, meta_params: Params, state: Population, episode: Episode, *, key: Any = None,
        frozen: Params = None,
    ) -> tuple[Any, Params, Any]:  # fmt: skip
        noise_key, task_key = _split(name, key)
        problem = inner_problem(name, learner)
        check_horizon("steps", steps, problem)
        restart, episode, loop_key = resume(name, problem, state.carried, episode, task_key, reset=True)
        noise = jnp.where(restart, jax.random.key_data(noise_key), state.noise)
        population_key = jax.random.wrap_key_data(noise, impl=jax.random.key_impl(key))
        number = jnp.where(restart, 0, state.carried.inner.step // steps)

        def run(meta_params: Params, inner: InnerState) -> tuple[jax.Array, tuple[Aux, InnerState]]:
            return segment(
                learner, meta_params, frozen, inner, episode, loop_key,
                restart=restart, num_steps=steps, loop=_inner.scan_loop(), fresh_data=fresh_data,
            )  # fmt: skip

        def one(pair: jax.Array, inner: InnerState) -> tuple[Params, InnerState]:
            pair_key = jax.random.fold_in(population_key, pair)
            draw = lambda number: _draw(jax.random.fold_in(pair_key, number), meta_params)  # noqa: E731
            new = draw(number)
            every = jax.lax.fori_loop(0, number, lambda i, total: jax.tree.map(jnp.add, total, draw(i)), new)
            values, (_, ends) = jax.vmap(lambda side, inner: run(_shift(meta_params, side, new), inner))(
                _sides(sigma), inner
            )
            return _times(every, (values[0] - values[1]) / (2 * sigma)), ends

        loss, (aux, end) = run(meta_params, state.carried.inner)
        grads, inner = _mean_over_pairs(one, (jnp.arange(pairs), state.inner), meta_params, pairs, chunk)
        carried = carry_on(end, episode, loop_key, fresh_data=fresh_data)
        return (loss, aux), grads, Population(carried, inner, noise)

    return Hypergrad(init, value_and_grad)


def _check(sigma: float, pairs: int, chunk: int | None) -> None:
    _validate.positive_float("sigma", sigma)
    _validate.positive_int("pairs", pairs)
    if chunk is not None and pairs % _validate.positive_int("chunk", chunk):
        raise ValueError(f"chunk must divide the number of pairs {pairs}, got {chunk}")


def _split(name: str, key: Any) -> tuple[jax.Array, jax.Array]:
    if key is None:
        raise ValueError(f"hypergrad: {name} draws perturbations and needs a key, got key=None")
    noise_key, task_key = jax.random.split(key)
    return noise_key, task_key


def _sides(sigma: float) -> jax.Array:
    return jnp.array([sigma, -sigma])


def _draw(key: jax.Array, like: Params) -> Params:
    """Draws standard normal numbers in the shapes of a tree."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    draws = [
        jax.random.normal(key, jnp.shape(leaf), jnp.result_type(leaf)) for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, draws)


def _shift(params: Params, distance: Any, noise: Params) -> Params:
    return jax.tree.map(lambda leaf, part: leaf + (distance * part).astype(part.dtype), params, noise)


def _times(noise: Params, slope: jax.Array) -> Params:
    return jax.tree.map(lambda leaf: leaf * slope, noise)  # in the precision of the loss, if that is higher


def _mean_over_pairs(
    one: Callable[..., tuple[Params, Any]], arguments: Any, like: Params, pairs: int, chunk: int | None
) -> tuple[Params, Any]:
    """Returns the mean over pairs of the first output of `one`, and its second outputs, stacked."""
    total, rest = _chunks.sum_in_chunks(one, arguments, chunk or pairs, _tree.varying_axes((like, arguments)))
    return jax.tree.map(lambda leaf, part: (part / pairs).astype(jnp.result_type(leaf)), like, total), rest
