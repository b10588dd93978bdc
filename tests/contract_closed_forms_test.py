"""The estimators of the contract table where hypergradients are known: squared error of a linear model.

Its inner loop and hypergradient are products of matrices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

import metajax
from metajax import hypergrad

pytestmark = pytest.mark.usefixtures("x64")


LINEAR = metajax.Model(lambda key, x: jnp.zeros([x.shape[-1], 1]), lambda w, x: x @ w)


QUADRATIC = [
    (estimator, proximal)
    for estimator in worlds.ESTIMATORS
    for proximal in (0.0, 0.7)
    if proximal or estimator not in ("implicit", "sama")  # which refuse a loss that does not depend on the start
]


@pytest.mark.parametrize(("estimator", "proximal"), worlds.few_by_default(QUADRATIC, lambda _, proximal: proximal > 0))
def test_quadratic(estimator, proximal):
    episode, (hessian, query_hessian), (slope, query_slope), start = worlds.quadratic()
    rate, steps = 0.2, 4
    weights, jacobian = start, np.eye(3)
    for _ in range(steps):
        weights = weights - rate * (hessian @ weights - slope + proximal * (weights - start))
        jacobian = (np.eye(3) - rate * (hessian + proximal * np.eye(3))) @ jacobian + rate * proximal * np.eye(3)
    outer = query_hessian @ weights - query_slope
    expected = {
        "first_order": outer,
        "displacement": start - weights,
        "implicit": proximal * np.linalg.solve(hessian + (proximal + 1) * np.eye(3), outer),
        "finite_difference": outer - rate * hessian @ outer,
        "sama": rate * proximal * outer,
    }.get(estimator, jacobian.T @ outer)

    learner = metajax.learners.maml(LINEAR, optax.sgd(rate), steps, proximal=proximal, loss=metajax.core.squared_error)
    _, grads = hypergrad.value_and_grad(learner, worlds.ESTIMATORS[estimator])(jnp.array(start), episode)
    np.testing.assert_allclose(grads, expected, rtol=1e-12)


def meta_sgd():
    """A problem of a user's own: learned rates, a learned start, a learned ridge, and a fixed offset."""

    def loss(params, meta_params, support, step, key):
        del step, key
        error = support.inputs @ params["w"] + meta_params["offset"] - support.targets
        return jnp.mean(error**2) + jnp.exp(meta_params["ridge"]) * jnp.sum(params["w"] ** 2)

    problem = metajax.InnerProblem(
        init=lambda meta_params, support, key: {"w": meta_params["start"]},
        loss=loss,
        optimizer=lambda meta: optax.stateless(lambda grads, _: {"w": -jnp.exp(meta["rate"]) * grads["w"]}),
        num_steps=3,
        finalize=lambda params, meta_params, support, key: (params, meta_params["offset"]),
    )

    def adapt(meta_params, support, *, num_steps=None, key=None):
        return metajax.core._inner.unroll(problem, meta_params, support, key=key, num_steps=num_steps).adapted

    def predict(adapted, inputs, *, mask=None, key=None):
        return inputs @ adapted[0]["w"] + adapted[1]

    def outer_loss(adapted, meta_params, query, *, key=None):
        outputs = predict(adapted, query.inputs)
        return jnp.mean((outputs - query.targets) ** 2), metajax.Aux(outputs)

    return metajax.Learner(None, adapt, predict, outer_loss, problem)


@pytest.mark.parametrize("estimator", worlds.ESTIMATORS)
def test_what_the_inner_rule_and_loss_learn(estimator):
    learner, (episode, _, _, start) = meta_sgd(), worlds.quadratic()
    params = {"start": start, "rate": np.full([3, 1], -2.0), "ridge": np.array(-1.0), "offset": np.array(0.3)}
    params = jax.tree.map(jnp.array, params)
    _, grads = hypergrad.value_and_grad(learner, worlds.ESTIMATORS[estimator])(params, episode)
    x, y, query_x, query_y = (np.asarray(leaf) for part in episode for leaf in part[:2])

    def last(point, stopped_at=None):
        """The inner loop in NumPy; with `stopped_at` its gradients are taken there, whatever the point."""
        w, seen, grads_seen = point["start"], None if stopped_at is None else iter(stopped_at), []
        for _ in range(3):
            slope = 2 * x.T @ (x @ w + point["offset"] - y) / 7 + 2 * np.exp(point["ridge"]) * w
            grads_seen.append(slope)
            w = w - np.exp(point["rate"]) * (slope if seen is None else next(seen, slope))
        return w, grads_seen

    numpy_params = jax.tree.map(np.asarray, params)
    if estimator == "displacement":
        expected = {**jax.tree.map(np.zeros_like, numpy_params), "start": start - last(numpy_params)[0]}
        assert worlds.relative_distance(grads, expected) < 1e-12
        return
    if estimator in ("implicit", "sama"):
        w, slopes = last(numpy_params)
        errors = query_x @ w + params["offset"] - query_y
        outer, ridge = 2 * query_x.T @ errors / 7, np.exp(params["ridge"])
        rate = np.exp(numpy_params["rate"])
        vector = -rate * outer  # what the mixed product meets, with its sign
        if estimator == "implicit":
            vector = -np.linalg.solve(2 * x.T @ x / 7 + (2 * ridge + 1) * np.eye(3), outer)
        expected = {
            "start": np.zeros_like(start),
            "rate": np.zeros_like(rate) if estimator == "implicit" else -rate * slopes[-1] * outer,
            "ridge": 2 * ridge * np.sum(w * vector),
            "offset": 2 * np.mean(errors) + 2 * np.mean(x @ vector),
        }
        assert worlds.relative_distance(grads, jax.tree.map(np.asarray, expected)) < 1e-9
        return
    kept = {"first_order": 3, "finite_difference": 2}.get(estimator)  # how many slopes count as constants
    stopped = None if kept is None else last(numpy_params)[1][:kept]

    def objective(point):
        w = last(point, stopped)[0]
        return np.mean((query_x @ w + point["offset"] - query_y) ** 2)

    for seed in range(4):
        direction = worlds.random_direction(numpy_params, seed)
        expected = worlds.finite_difference(objective, numpy_params, direction, step=1e-4)
        np.testing.assert_allclose(worlds.dot(grads, direction), expected, rtol=1e-8)
    if estimator == "first_order":
        assert float(grads["ridge"]) == 0  # only the inner gradient depends on it
        assert float(jnp.min(jnp.abs(grads["rate"]))) > 0
