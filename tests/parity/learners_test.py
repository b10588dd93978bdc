"""Every learner against its NumPy reference, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds
from parity import numpy_reference as reference

import metajax
from metajax import hypergrad, learners, models

pytestmark = pytest.mark.usefixtures("x64")
WAYS = 3


def draw(seed, count, *, regression=False):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(count, 4))
    if regression:
        return inputs, np.sin(inputs[:, :2]) + 0.1 * rng.normal(size=(count, 2))
    labels = np.arange(count) % WAYS
    return inputs + 0.7 * labels[:, None], labels


def padded(pair, extra=2):
    """As `Examples`, with rows of rubbish behind, and an absent class where there are classes."""
    inputs, targets = pair
    count = len(inputs)
    inputs = np.concatenate([inputs, np.full((extra, 4), np.nan)])
    targets = np.concatenate([targets, np.full((extra, *targets.shape[1:]), 77, targets.dtype)])
    classes = jnp.array([True] * WAYS + [False]) if targets.ndim == 1 else None
    return metajax.Examples(jnp.array(inputs), jnp.array(targets), jnp.arange(count + extra) < count, classes)


def layers(params):
    """The parameters of `models.mlp` as a list of (kernel, bias)."""
    names = [*sorted(name for name in params if name != "head"), "head"]
    return [(np.asarray(params[name]["kernel"]), np.asarray(params[name]["bias"])) for name in names]


def as_params(pairs):
    names = [*(f"layer_{index}" for index in range(len(pairs) - 1)), "head"]
    return {name: {"kernel": kernel, "bias": bias} for name, (kernel, bias) in zip(names, pairs, strict=True)}


def start(model, seed=0):
    rng = np.random.default_rng(seed)
    params = model.init(jax.random.key(seed), jnp.zeros([1, 4]))
    return jax.tree.map(lambda leaf: jnp.array(leaf + 0.2 * rng.normal(size=leaf.shape)), params)


TASKS = {
    "regression": (
        models.mlp(2, hidden=(5, 6)), metajax.core.squared_error,
        lambda outputs, targets: 2 * (outputs - targets) / outputs.size,
        lambda outputs, targets: np.mean((outputs - targets) ** 2),
    ),
    "classification": (
        models.mlp(WAYS + 1, hidden=(6,)), metajax.core.cross_entropy,
        lambda outputs, labels: np.pad(reference.cross_entropy_slope(outputs[:, :WAYS], labels), ((0, 0), (0, 1))),
        lambda outputs, labels: reference.cross_entropy(outputs[:, :WAYS], labels),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("task", "steps"),
    worlds.few_by_default([(task, steps) for task in TASKS for steps in (1, 5)], lambda _, steps: steps > 1),
)
def test_maml(task, steps):
    """Loss, fast weights and predictions to 1e-10; the hypergradient against differences of the NumPy loop."""
    model, loss, slope, numpy_loss = TASKS[task]
    learner = learners.maml(model, optax.sgd(0.1), steps, loss=loss)
    support, query = (draw(*part, regression=task == "regression") for part in ((1, 6), (2, 7)))
    params = start(model)
    episode = metajax.Episode(padded(support), padded(query))

    def numpy_maml(params):
        return reference.maml(layers(params), support, query, 0.1, steps, slope, numpy_loss)

    expected, adapted_layers = numpy_maml(params)
    adapted = jax.jit(learner.adapt)(params, episode.support)
    (value, _), grads = jax.jit(hypergrad.value_and_grad(learner, hypergrad.mixed_mode()))(params, episode)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    assert worlds.relative_distance(adapted.params, as_params(adapted_layers)) < 1e-10
    ways = 2 if task == "regression" else WAYS
    found = learner.predict(adapted, episode.query.inputs, mask=episode.query.mask)[:7, :ways]
    np.testing.assert_allclose(found, reference.mlp(adapted_layers, query[0])[1][:, :ways], rtol=1e-10)
    for seed in range(3):
        direction = worlds.random_direction(params, seed)
        difference = worlds.finite_difference(lambda point: numpy_maml(point)[0], params, direction)
        np.testing.assert_allclose(worlds.dot(grads, direction), difference, rtol=1e-6)


def test_reptile():
    """Adam without momentum on the inner loop and `phi - W` as gradient, both written out."""
    model, _, slope, _ = TASKS["classification"]
    learner = learners.reptile(model, optax.adam(0.01, b1=0.0, b2=0.99), 4)
    params, support = start(model), draw(1, 6)
    weights = jax.tree.map(np.asarray, params)
    second = jax.tree.map(np.zeros_like, weights)
    for step in range(1, 5):
        slopes = reference.mlp_slope(layers(weights), support[0], lambda outputs: slope(outputs, support[1]))
        second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g**2, second, as_params(slopes))
        weights = jax.tree.map(
            lambda w, g, v, correction=1 - 0.99**step: w - 0.01 * g / (np.sqrt(v / correction) + 1e-8),
            weights, as_params(slopes), second,
        )  # fmt: skip
    episode = metajax.Episode(padded(support), padded(draw(2, 7)))
    (value, _), grads = jax.jit(hypergrad.value_and_grad(learner, hypergrad.displacement()))(params, episode)
    assert worlds.relative_distance(grads, jax.tree.map(lambda a, b: np.asarray(a) - b, params, weights)) < 1e-10
    outputs = reference.mlp(layers(weights), draw(2, 7)[0])[1][:, :WAYS]
    np.testing.assert_allclose(value, reference.cross_entropy(outputs, draw(2, 7)[1]), rtol=1e-10)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_prototypical(distance):
    model = models.mlp(5, hidden=(6,))
    params, support, query = start(model), draw(1, 7), draw(2, 8)
    learner = learners.prototypical(model, distance=distance)
    adapted = jax.jit(learner.adapt)(params, padded(support))
    found = learner.predict(adapted, padded(query).inputs, mask=padded(query).mask)

    def numpy_logits(params):
        features, others = (reference.mlp(layers(params), inputs)[1] for inputs in (support[0], query[0]))
        centres = reference.prototypes(features, support[1], WAYS)
        return {"euclidean": reference.euclidean_logits, "cosine": reference.cosine_logits}[distance](others, centres)

    np.testing.assert_allclose(found[:8, :WAYS], numpy_logits(params), rtol=1e-9)
    assert np.all(np.asarray(found)[:, WAYS] == -1e9)
    episode = metajax.Episode(padded(support), padded(query))
    (value, _), grads = jax.jit(hypergrad.value_and_grad(learner, hypergrad.unrolled()))(params, episode)
    np.testing.assert_allclose(value, reference.cross_entropy(numpy_logits(params), query[1]), rtol=1e-9)
    for seed in range(2):
        direction = worlds.random_direction(params, seed)
        difference = worlds.finite_difference(
            lambda point: reference.cross_entropy(numpy_logits(point), query[1]), params, direction
        )
        np.testing.assert_allclose(worlds.dot(grads, direction), difference, rtol=1e-6)


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_finetune(head):
    """The head after 20 steps of gradient descent on frozen features, and what it predicts."""
    model = models.mlp(5, hidden=(6,))
    params, support, query = start(model), draw(1, 7), draw(2, 8)
    learner = learners.finetune(model, optax.sgd(0.02), 20, head=head)
    adapted = jax.jit(learner.adapt)({"backbone": params}, padded(support))
    found = learner.predict(adapted, padded(query).inputs, mask=padded(query).mask)[:8, :WAYS]
    features, others = (reference.mlp(layers(params), inputs)[1] for inputs in (support[0], query[0]))
    if head == "linear":
        kernel, bias = reference.fit_linear_head(features, support[1], WAYS, 0.02, 20)
        np.testing.assert_allclose(adapted.head["bias"][:WAYS], bias, rtol=1e-9, atol=1e-14)
        expected = others @ kernel.T + bias
    else:
        kernel = reference.fit_cosine_head(features, support[1], WAYS, 0.02, 20)
        expected = reference.cosine_logits(others, kernel)
    np.testing.assert_allclose(adapted.head["kernel"][:WAYS], kernel, rtol=1e-9)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_pretrain(head):
    """Loss and gradient of ordinary supervised training, the linear head's by backpropagation by hand."""
    model = models.mlp(5, hidden=(6,))
    backbone, query = start(model), draw(2, 8)
    learner = learners.pretrain(model, WAYS, head=head)
    kernel = np.random.default_rng(4).normal(size=(WAYS, 5))
    top = {"kernel": jnp.array(kernel)} | ({"bias": jnp.array([0.3, -0.2, 0.1])} if head == "linear" else {})
    params = {"backbone": backbone, "head": top}
    examples = padded(query)._replace(class_mask=None)
    (value, _), grads = jax.jit(hypergrad.value_and_grad(learner, hypergrad.unrolled()))(
        params, metajax.Episode(examples, examples)
    )
    features = reference.mlp(layers(backbone), query[0])[1]
    if head == "cosine":
        np.testing.assert_allclose(
            value, reference.cross_entropy(reference.cosine_logits(features, kernel), query[1]), rtol=1e-10
        )
        return
    logits = features @ kernel.T + np.asarray(top["bias"])
    np.testing.assert_allclose(value, reference.cross_entropy(logits, query[1]), rtol=1e-10)
    slope = reference.cross_entropy_slope(logits, query[1])
    below = reference.mlp_slope(layers(backbone), query[0], lambda outputs: slope @ kernel)
    expected = {"backbone": as_params(below), "head": {"kernel": slope.T @ features, "bias": slope.sum(0)}}
    assert worlds.relative_distance(grads, expected) < 1e-10


def test_pretrain_without_a_head_is_regression():
    model, loss, _, numpy_loss = TASKS["regression"]
    learner, params = learners.pretrain(model, loss=loss), start(model)
    inputs, targets = draw(2, 8, regression=True)
    examples = padded((inputs, targets))
    value, _ = learner.outer_loss(learner.adapt({"backbone": params}, examples), {"backbone": params}, examples)
    np.testing.assert_allclose(value, numpy_loss(reference.mlp(layers(params), inputs)[1], targets), rtol=1e-10)
