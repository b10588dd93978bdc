"""Bilevel problems as learners: closed forms of their hypergradients, and what is asked of the user."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

import metajax
from metajax import hypergrad, learners

RNG = np.random.default_rng(0)
TRUTH = RNG.normal(size=3)
INPUTS, OUTER_INPUTS = RNG.normal(size=(2, 8, 3))
TARGETS, OUTER_TARGETS = (inputs @ TRUTH + 0.3 * RNG.normal(size=8) for inputs in (INPUTS, OUTER_INPUTS))


def examples(inputs, targets, mask=None):
    return metajax.Examples(
        jnp.asarray(inputs), jnp.asarray(targets), jnp.ones(len(inputs), bool) if mask is None else mask
    )


def episode():
    return metajax.Episode(examples(INPUTS, TARGETS), examples(OUTER_INPUTS, OUTER_TARGETS))


def squares(weights, examples):
    return (examples.inputs @ weights - examples.targets) ** 2


def validation(weights, meta_params, query, *, key=None):
    return jnp.mean(squares(weights, query))


def problem(loss, num_steps, rate=0.1, start=lambda meta_params: jnp.zeros(3)):
    return metajax.InnerProblem(
        lambda meta_params, support, key: start(meta_params),
        lambda params, meta_params, support, step, key: loss(params, meta_params, support),
        lambda meta_params: optax.sgd(rate), num_steps, lambda params, meta_params, support, key: params,
    )  # fmt: skip


def gradient(learner, meta_params, estimator, task=None):
    return jax.jit(hypergrad.value_and_grad(learner, estimator))(meta_params, task or episode())


def test_a_penalty_has_the_hypergradient_of_ridge_regression(x64):
    """Where the inner loop has converged: weights (A + penalty)^-1 b, differentiated in NumPy."""
    loss = lambda weights, penalty, support: jnp.mean(squares(weights, support)) + penalty * weights @ weights  # noqa: E731
    learner = learners.bilevel(problem(loss, 300), validation)
    for estimator in (hypergrad.unrolled(), hypergrad.mixed_mode()):
        (value, _), found = gradient(learner, jnp.array(0.4), estimator)
        inverse = np.linalg.inv(INPUTS.T @ INPUTS / 8 + 0.4 * np.eye(3))
        weights = inverse @ INPUTS.T @ TARGETS / 8
        errors = OUTER_INPUTS @ weights - OUTER_TARGETS
        np.testing.assert_allclose(value, np.mean(errors**2), rtol=1e-10)
        np.testing.assert_allclose(found, 2 * errors @ OUTER_INPUTS @ (-inverse @ weights) / 8, rtol=1e-8)


def test_weights_of_examples_have_the_hypergradient_of_ren(x64):
    """One step from weights of zero: minus the rate times the products of example gradients with the outer one."""
    loss = lambda params, meta_params, support: jnp.sum(meta_params["weigh"] * squares(params, support))  # noqa: E731
    learner = learners.bilevel(problem(loss, 1, 0.1, lambda meta_params: meta_params["start"]), validation)
    start = RNG.normal(size=3)
    meta_params = {"weigh": jnp.zeros(8), "start": jnp.array(start)}
    _, found = gradient(learner, meta_params, hypergrad.mixed_mode())
    each = 2 * (INPUTS @ start - TARGETS)[:, None] * INPUTS
    outer = 2 * (OUTER_INPUTS @ start - OUTER_TARGETS) @ OUTER_INPUTS / 8
    np.testing.assert_allclose(found["weigh"], -0.1 * each @ outer, rtol=1e-10)
    np.testing.assert_allclose(found["start"], outer, rtol=1e-10)


def test_a_learned_loss_against_finite_differences(x64):
    """The loss is a network of error and target; the rate of the update rule is learned as well."""
    net = metajax.models.mlp(1, hidden=(4,))

    def loss(weights, meta_params, support):
        seen = jnp.stack([support.inputs @ weights - support.targets, support.targets], axis=1)
        return jnp.mean(jax.nn.softplus(net.apply(meta_params["net"], seen)))

    base = problem(loss, 3)._replace(optimizer=lambda meta_params: metajax.inner.adam(jnp.exp(meta_params["rate"])))
    learner = learners.bilevel(base, validation)
    net_params = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), net.init(jax.random.key(0), jnp.ones([1, 2])))
    meta_params = {"net": net_params, "rate": jnp.array(-2.0)}
    _, found = gradient(learner, meta_params, hypergrad.mixed_mode())
    value = jax.jit(lambda meta: validation(learner.adapt(meta, episode().support), meta, episode().query))
    for seed in range(3):
        direction = worlds.random_direction(meta_params, seed)
        expected = worlds.finite_difference(value, meta_params, direction, 1e-4)
        np.testing.assert_allclose(worlds.dot(found, direction), expected, rtol=1e-6)


WEIGHED = problem(lambda params, weigh, support: jnp.mean(jax.nn.sigmoid(weigh) * squares(params, support)), 20)


def test_it_trains_and_finds_the_wrong_targets():
    """Two of eight targets are wrong: their weights fall below all others'."""
    learner = learners.bilevel(WEIGHED, validation, init=lambda key, inputs: jnp.zeros(len(inputs)))
    outer = metajax.outer_update(learner, optax.adam(0.3), hypergrad=hypergrad.mixed_mode())
    clean = examples(OUTER_INPUTS, OUTER_INPUTS @ TRUTH)
    task = metajax.Episode(examples(INPUTS, (INPUTS @ TRUTH) + 3.0 * (np.arange(8) < 2)), clean)
    state, update = outer.init(jax.random.key(0), task), jax.jit(outer.update)
    losses = []
    for _ in range(40):
        state, metrics = update(state, jax.tree.map(lambda leaf: leaf[None], task))
        losses.append(float(metrics["loss"]))
    assert sorted(metrics) == ["grad_norm", "inner_loss", "loss", "loss_before"]
    assert losses[-1] < 0.2 * losses[0]
    assert float(state.params[:2].max()) < float(state.params[2:].min())


def test_targets_and_inputs_may_be_any_trees():
    """No targets at all, inputs in a dictionary, two tasks; a task without kept outer data weighs nothing."""

    def loss(params, meta_params, support):
        return jnp.mean((support.inputs["x"] @ params - support.inputs["y"]) ** 2) + meta_params * params @ params

    def outer_loss(params, meta_params, query, *, key=None):
        return jnp.mean((query.inputs["x"] @ params - query.inputs["y"]) ** 2), metajax.Aux(
            metrics={"size": params @ params}
        )

    learner = learners.bilevel(problem(loss, 5), outer_loss, init=lambda key, inputs: jnp.array(0.1))
    outer = metajax.outer_update(learner, optax.sgd(1.0), hypergrad=hypergrad.unrolled(), task_batching="vmap")

    def task(seed, counts=True):
        rng = np.random.default_rng(seed)
        inputs = {"x": jnp.array(rng.normal(size=(8, 3)), jnp.float32), "y": jnp.array(rng.normal(size=8), jnp.float32)}
        return metajax.Episode(*[metajax.Examples(inputs, None, jnp.full(8, counts))] * 2)

    state = outer.init(jax.random.key(0), task(0))
    update = jax.jit(outer.update)
    one, _ = update(state, worlds.stack([task(0), task(1, counts=False)]))
    alone, _ = update(state, worlds.stack([task(0), task(0)]))
    np.testing.assert_allclose(one.params, alone.params, rtol=1e-6)
    assert float(one.params) != float(state.params)


LABELS = metajax.Episode(*[examples(np.float32(INPUTS), np.int32(TARGETS > 0))] * 2)


def logistic(params, inputs):
    return jnp.stack([jnp.zeros(len(inputs)), inputs @ params], axis=1)


def test_outputs_bring_accuracy():
    def cost(params, examples):
        return jnp.mean(metajax.core.cross_entropy(logistic(params, examples.inputs), examples.targets))

    def plain(params, penalty, query, *, key=None):
        return cost(params, query)

    def told(params, penalty, query, *, key=None):
        return cost(params, query), metajax.Aux(-logistic(params, query.inputs))

    base = problem(lambda params, penalty, support: cost(params, support) + penalty * params @ params, 5)
    found = []
    for outer_loss, predict in ((plain, logistic), (told, None), (told, logistic)):
        learner = learners.bilevel(base, outer_loss, predict=predict, task=metajax.tasks.classification)
        outer = metajax.outer_update(learner, optax.sgd(0.1), hypergrad=hypergrad.unrolled(), before=False)
        state = outer.init(jax.random.key(0), LABELS, jnp.array(0.1))
        found.append(float(jax.jit(outer.update)(state, worlds.stack([LABELS]))[1]["accuracy"]))
    assert found[0] > 0.8
    np.testing.assert_allclose(found[1:], 1 - found[0], rtol=1e-5)  # what outer_loss says of itself comes first
    alone = learners.bilevel(base, plain, predict=logistic)  # no task type: no metric
    outer = metajax.outer_update(alone, optax.sgd(0.1), hypergrad=hypergrad.unrolled(), before=False)
    state = outer.init(jax.random.key(0), LABELS, jnp.array(0.1))
    assert "accuracy" not in jax.jit(outer.update)(state, worlds.stack([LABELS]))[1]


def test_adapt_and_predict():
    learner = learners.bilevel(WEIGHED, validation, predict=lambda params, inputs: inputs @ params)
    support = episode().support
    still = learner.adapt(jnp.zeros(8), support, num_steps=0)
    np.testing.assert_array_equal(still, np.zeros(3))
    adapted = learner.adapt(jnp.zeros(8), support)
    expected = np.zeros(3)
    for _ in range(20):
        expected -= 0.1 * 0.5 * 2 * (INPUTS @ expected - TARGETS) @ INPUTS / 8
    np.testing.assert_allclose(adapted, expected, rtol=1e-4)
    np.testing.assert_allclose(learner.predict(adapted, INPUTS, mask=np.ones(8, bool)), INPUTS @ expected, rtol=1e-4)


def test_a_key_reaches_both_losses():
    seen = {}

    def outer_loss(params, meta_params, query, *, key=None):
        seen["outer"] = key
        return jnp.sum(params)

    def inner_loss(params, meta_params, support, step, key):
        seen["inner"] = key
        return jnp.sum(params)

    learner = learners.bilevel(WEIGHED._replace(loss=inner_loss), outer_loss)
    fn = hypergrad.value_and_grad(learner, hypergrad.unrolled())
    fn(jnp.zeros(8), episode())
    assert seen == {"outer": None, "inner": None}
    fn(jnp.zeros(8), episode(), key=jax.random.key(0))
    assert seen["outer"] is not None
    assert seen["inner"] is not None


def test_nan_in_the_inner_loop_shows():
    task = episode()
    task = task._replace(support=task.support._replace(targets=task.support.targets.at[0].set(jnp.nan)))
    (value, aux), grads = gradient(learners.bilevel(WEIGHED, validation), jnp.zeros(8), hypergrad.unrolled(), task)
    assert np.isnan(value)
    assert np.all(np.isnan(aux.metrics["inner_loss"]))
    assert np.any(np.isnan(grads))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: learners.bilevel(None, validation), "inner_problem must be of type InnerProblem, got None"),
        (
            lambda: learners.bilevel(WEIGHED._replace(num_steps=0), validation),
            "num_steps must be an integer of at least",
        ),
        (
            lambda: learners.bilevel(WEIGHED, None),
            "outer_loss must be a function but for objective 'prequential', got None for 'query'",
        ),
        (lambda: learners.bilevel(WEIGHED, validation, init=3), "init must be a function or None, got 3"),
        (lambda: learners.bilevel(WEIGHED, validation, predict="x"), "predict must be a function or None, got 'x'"),
        (
            lambda: learners.bilevel(WEIGHED, validation).init(None, None),
            r"init must be given to bilevel\(\), or params",
        ),
        (
            lambda: learners.bilevel(WEIGHED, validation).predict(None, None),
            r"predict must be given to bilevel\(\)",
        ),
    ],
)
def test_refusals(make, text):
    with pytest.raises(ValueError, match=text):
        make()
