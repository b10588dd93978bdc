"""The Bayesian learner: the divergence, a known posterior, the limit that is MAML, draws, adapters, the config."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

import metajax
from experiments.configs import maml_lora_decoder
from metajax import adapters, hypergrad, learners, models
from metajax.core import _tree

LINEAR = metajax.Model(lambda key, x: jnp.zeros(x.shape[-1]), lambda w, x: x @ w)
KEY = jax.random.key(0)


def half_square(outputs, targets):
    """The negative log-likelihood of noise of variance 1, but for a constant."""
    return 0.5 * jnp.square(outputs - targets)


def regression(seed=0, count=6):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(count, 3)) @ np.array([[1.0, 0.5, 0], [0, 1, 0.3], [0, 0, 1]]), rng.normal(size=count)
    return metajax.Examples(jnp.array(x), jnp.array(y), jnp.ones(count, bool)), x, y


def gaussian(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=3), rng.normal(size=3)


def test_the_divergence_is_that_of_two_gaussians(x64):
    """Against the formula for full covariances, in the inner and in the outer loss."""
    (p_mean, p_log), (q_mean, q_log) = gaussian(1), gaussian(2)
    p, q = np.diag(np.exp(2 * p_log)), np.diag(np.exp(2 * q_log))
    away, inverse = q_mean - p_mean, np.linalg.inv(p)
    volume = np.linalg.slogdet(p)[1] - np.linalg.slogdet(q)[1]
    expected = 0.5 * (np.trace(inverse @ q) + away @ inverse @ away - 3 + volume)

    examples, x, y = regression()
    prior, posterior = (
        {"mean": jnp.array(m), "log_scale": jnp.array(s)} for m, s in ((p_mean, p_log), (q_mean, q_log))
    )
    learner = learners.bayesian(LINEAR, optax.sgd(0.1), beta=0.7, loss=half_square)
    plain = 0.5 * np.mean((x @ q_mean - y) ** 2)
    inner = learner.problem.loss(posterior, prior, examples, 0, None)
    np.testing.assert_allclose(inner, plain + 0.7 * expected, rtol=1e-12)
    adapted = learner.problem.finalize(posterior, prior, examples, None)
    np.testing.assert_allclose(learner.outer_loss(adapted, prior, examples)[0], plain + 0.7 * expected, rtol=1e-12)

    # and gamma adds -log of N(mean; 0, 1) and of Gamma(precision; 1, 0.01), but for constants
    learner = learners.bayesian(LINEAR, optax.sgd(0.1), beta=0.0, gamma=0.3, loss=half_square)
    hyper = 0.5 * np.sum(p_mean**2) + 0.01 * np.sum(np.exp(-2 * p_log))
    np.testing.assert_allclose(learner.outer_loss(adapted, prior, examples)[0], plain + 0.3 * hyper, rtol=1e-12)


def test_many_steps_end_at_the_best_posterior_of_independent_weights(x64):
    """Linear regression with known noise: the mean of the exact posterior, and one over the diagonal of its precision.

    That is the minimum of the divergence from it among Gaussians of independent weights; beta = 1 / n is the evidence.
    """
    examples, x, y = regression()
    prior_mean, prior_log = gaussian(3)
    precision = x.T @ x + np.diag(np.exp(-2 * prior_log))
    mean = np.linalg.solve(precision, x.T @ y + np.exp(-2 * prior_log) * prior_mean)
    assert np.abs(np.diag(np.linalg.inv(precision)) * np.diag(precision) - 1).max() > 0.1, "weights are correlated"

    rule = optax.sgd(optax.cosine_decay_schedule(0.3, 1500))
    learner = learners.bayesian(LINEAR, rule, 1500, beta=1 / 6, samples=64, loss=half_square)
    prior = {"mean": jnp.array(prior_mean), "log_scale": jnp.array(prior_log)}
    posterior = jax.jit(learner.adapt)(prior, examples, key=KEY).params
    np.testing.assert_allclose(posterior["mean"], mean, atol=0.01)
    np.testing.assert_allclose(jnp.exp(posterior["log_scale"]), np.diag(precision) ** -0.5, rtol=0.01)


@pytest.mark.slow
def test_without_divergence_and_scale_it_is_maml(x64):
    row, params, episode = worlds.world("anil")
    maml = row.learner
    learner = learners.bayesian(row.model, row.rule, 2, adapts="head", beta=0.0, scale=1e-9, samples=2)
    prior = {**learner.init(KEY, episode.support.inputs), "mean": params}
    adapted = jax.jit(learner.adapt)(prior, episode.support, key=KEY)
    expected = jax.jit(maml.adapt)(params, episode.support)
    assert worlds.relative_distance(adapted.params["mean"], expected.params) < 1e-8
    found = jax.jit(hypergrad.value_and_grad(learner, hypergrad.mixed_mode()))(prior, episode, key=KEY)
    (loss, _), grads = worlds.compiled("anil", "mixed_mode")(params, episode)
    np.testing.assert_allclose(found[0][0], loss, rtol=1e-8)
    assert worlds.relative_distance(found[1]["mean"], grads) < 1e-7
    log_probabilities = jax.jit(learner.predict)(adapted, episode.query.inputs, key=KEY)
    outputs = jax.nn.log_softmax(maml.predict(expected, episode.query.inputs))
    np.testing.assert_allclose(log_probabilities[:, : worlds.PRESENT], outputs[:, : worlds.PRESENT], atol=1e-6)
    assert np.all(log_probabilities[:, worlds.PRESENT :] < -1e8)
    assert np.all(np.isfinite(log_probabilities))


def test_the_hypergradient_of_the_drawn_loss_is_its_slope(x64):
    row, params, episode = worlds.world("bayesian")
    learner = learners.bayesian(row.model, row.rule, 2, adapts="head", beta=0.2, gamma=0.1, samples=3)
    value_and_grad = jax.jit(hypergrad.value_and_grad(learner, hypergrad.mixed_mode()))
    _, grads = value_and_grad(params, episode, key=KEY)
    direction = worlds.random_direction(params, 0)
    slope = worlds.finite_difference(lambda at: value_and_grad(at, episode, key=KEY)[0][0], params, direction)
    np.testing.assert_allclose(worlds.dot(grads, direction), slope, rtol=1e-6)


def test_predictions_average_probabilities_and_without_a_key_take_the_mean(x64):
    """A logit that is Gaussian: the expected probability by Gauss-Hermite quadrature."""
    model = metajax.Model(lambda key, x: jnp.zeros(3), lambda w, x: jnp.stack([x @ w, jnp.zeros(len(x))], axis=-1))
    x = np.random.default_rng(0).normal(size=(4, 3))
    mean, log_scale = gaussian(4)
    examples = metajax.Examples(jnp.array(x), jnp.zeros(4, jnp.int32), jnp.ones(4, bool))
    learner = learners.bayesian(model, optax.sgd(0.1), predict_samples=20_000)
    prior = {"mean": jnp.array(mean), "log_scale": jnp.array(log_scale)}
    adapted = learner.adapt(prior, examples, num_steps=0)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    spread = np.sqrt(x**2 @ np.exp(2 * log_scale))
    logits = (x @ mean)[:, None] + spread[:, None] * nodes
    expected = (1 / (1 + np.exp(-logits))) @ weights / weights.sum()
    found = np.exp(learner.predict(adapted, examples.inputs, key=KEY))
    np.testing.assert_allclose(found[:, 0], expected, atol=0.01)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)
    certain = 1 / (1 + np.exp(-x @ mean))
    assert np.abs(certain - expected).max() > 0.05, "as good as no variance"
    np.testing.assert_allclose(learner.predict(adapted, examples.inputs)[:, 0], x @ mean, rtol=1e-12)

    # regression: the outputs themselves; the outer loss is the mean of the losses, which is above the loss of the mean
    learner = learners.bayesian(LINEAR, optax.sgd(0.1), samples=20_000, predict_samples=20_000, loss=half_square)
    targets = examples._replace(targets=jnp.zeros(4))
    np.testing.assert_allclose(learner.predict(adapted, examples.inputs, key=KEY), x @ mean, atol=0.06)
    loss, _ = learner.outer_loss(adapted, prior, targets, key=KEY)
    np.testing.assert_allclose(loss, 0.5 * np.mean((x @ mean) ** 2 + spread**2), rtol=0.02)


@pytest.mark.slow
def test_low_rank_adapters_share_the_frozen_base():
    model = adapters.lora(models.decoder(7, width=8, depth=1, heads=2), rank=2)
    tokens = jnp.array(np.random.default_rng(0).integers(0, 7, size=(3, 2, 5)))
    examples = metajax.Examples(tokens, jnp.roll(tokens, -1, axis=2), jnp.ones((3, 2), bool))
    episodes = metajax.Episode(examples, examples)
    learner = learners.bayesian(model, optax.sgd(0.1), 2, adapts="lora", samples=2)
    outer = metajax.outer_update(
        learner, optax.adam(1e-2), hypergrad=hypergrad.first_order(), trainable="lora", before=False
    )
    start = jax.jit(outer.init)(KEY, jax.tree.map(lambda leaf: leaf[0], episodes))
    is_lora = lambda tree: [path.split("/")[-1].startswith("lora") for path in _tree.paths(tree)]  # noqa: E731
    assert all(is_lora(start.params["log_scale"]))
    assert not all(is_lora(start.params["mean"]))

    # out_axes=None is refused for what differs between tasks
    axes = {
        part: _tree.map_with_path(lambda path, _: 0 if "lora" in path else None, tree)
        for part, tree in start.params.items()
    }
    adapt = jax.vmap(lambda prior, support: learner.adapt(prior, support, key=KEY).params, (None, 0), axes)
    posteriors = jax.jit(adapt)(start.params, episodes.support)

    after, metrics = jax.jit(outer.update)(start, episodes)
    assert np.isfinite(metrics["loss"])
    for found in (posteriors, after.params):
        changed = jax.tree.map(
            lambda new, old: not np.array_equal(np.broadcast_to(old, new.shape), new), found, start.params
        )
        assert jax.tree.leaves(changed) == is_lora(changed)


def test_a_config_names_it():
    given = maml_lora_decoder.get_config()
    inner = {"name": "sgd", "learning_rate": 0.1}
    given["learner"] = {"name": "bayesian", "adapts": "lora", "beta": 1e-3, "samples": 2, "inner": inner}
    config = metajax.run.complete(given)
    config.model.update(width=8, depth=1, heads=2)
    config.wrap.lora.rank = 2
    facts = metajax.run.Facts(metajax.tasks.next_token_prediction)
    learner = metajax.run.build(config, facts).learner
    prior = jax.jit(learner.init)(KEY, jnp.zeros([2, 5], jnp.int32))
    np.testing.assert_allclose(prior["log_scale"]["blocks"]["query"]["lora_a"], np.log(0.1), rtol=1e-6)
    config.learner.scale = 0.0
    with pytest.raises(ValueError, match=r"learner.scale must be a finite number above 0, got 0\.0"):
        metajax.run.build(config, facts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        ({"samples": 0}, "samples must be an integer of at least 1, got 0"),
        ({"predict_samples": 1.5}, "predict_samples must be an integer of at least 1, got 1.5"),
        ({"beta": -1.0}, "beta must be a finite number of at least 0, got -1.0"),
        ({"gamma": float("inf")}, "gamma must be a finite number of at least 0, got inf"),
        ({"scale": 0}, "scale must be a finite number above 0, got 0"),
        ({"average": "logits"}, "average must be one of 'probabilities', 'outputs', got 'logits'"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        learners.bayesian(LINEAR, optax.sgd(0.1), **arguments)
