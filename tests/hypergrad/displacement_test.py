"""Reptile's estimator: refusals, and the published rule as an outer SGD step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

import metajax
from metajax import hypergrad


@pytest.mark.parametrize("name", worlds.WITHOUT_PROBLEM)
def test_needs_an_inner_problem(name, x64):
    with pytest.raises(ValueError, match=r"hypergrad: displacement\(\) needs a learner with an inner problem"):
        worlds.trace(name, hypergrad.displacement())


def test_outer_sgd_moves_towards_the_mean_of_the_adapted_weights(x64):
    """`phi + rate * mean(W_i - phi)`, equation 2 of the paper over a batch."""
    row = worlds.LEARNERS["reptile"]
    params, tasks = worlds.parameters(row), [worlds.episode(row, seed) for seed in range(3)]
    outer = metajax.outer_update(row.learner, optax.sgd(0.25), hypergrad=hypergrad.displacement(), before=False)
    state, _ = jax.jit(outer.update)(outer.init(jax.random.key(0), tasks[0], params=params), worlds.stack(tasks))
    adapted = [worlds.by_hand("reptile", seed=seed)[0] for seed in range(3)]
    expected = jax.tree.map(lambda start, *ends: start + 0.25 * (sum(ends) / 3 - start), params, *adapted)
    assert worlds.relative_distance(state.params, expected) < 1e-12


def test_pulled_back_through_the_start(x64):
    """Fast weights that are a linear function of the meta-parameters: the displacement times its transpose."""
    matrix = jnp.array(np.random.default_rng(0).normal(size=(3, 2)))
    problem = metajax.InnerProblem(
        lambda meta, support, key: matrix @ meta,
        lambda params, meta, support, step, key: jnp.sum((params - support.targets) ** 2),
        lambda meta: optax.sgd(0.1), 2, lambda params, meta, support, key: params,
    )  # fmt: skip
    outer_loss = lambda adapted, meta, query, key=None: (jnp.sum(adapted**2), metajax.Aux(adapted))  # noqa: E731
    learner = metajax.Learner(None, None, None, outer_loss, problem)
    examples = metajax.Examples(jnp.zeros(3), jnp.array([1.0, 2.0, 3.0]), jnp.ones(3, bool))
    meta = jnp.array([0.5, -1.0])
    fn = hypergrad.value_and_grad(learner, hypergrad.displacement())
    (loss, _), grads = fn(meta, metajax.Episode(examples, examples))
    start, target = np.asarray(matrix @ meta), np.array([1.0, 2.0, 3.0])
    end = target + 0.8**2 * (start - target)
    np.testing.assert_allclose(grads, np.asarray(matrix).T @ (start - end), rtol=1e-12)
    np.testing.assert_allclose(loss, np.sum(end**2), rtol=1e-12)
