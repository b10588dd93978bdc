"""Matching networks against NumPy: attention by cosines, and full context embeddings step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metajax
from metajax import learners, models

IDENTITY = metajax.Model(lambda key, x: {}, lambda params, x: x)
RNG = np.random.default_rng(0)


def examples(inputs, labels, mask=None, ways=3):
    mask = np.ones(len(labels), bool) if mask is None else np.array(mask)
    return metajax.Examples(jnp.asarray(inputs, jnp.float32), jnp.array(labels), jnp.array(mask), jnp.ones(ways, bool))


def softmax(scores):
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def by_hand(queries, known, labels, scale):
    return softmax(scale * unit(queries) @ unit(known).T) @ np.eye(3)[labels]


def test_a_query_takes_the_labels_it_attends_to():
    known, labels, queries = RNG.normal(size=(5, 4)), np.array([0, 1, 1, 2, 0]), RNG.normal(size=(3, 4))
    learner = learners.matching(IDENTITY, scale=3.0)
    found = jnp.exp(learner.predict(learner.adapt({}, examples(known, labels)), jnp.asarray(queries, jnp.float32)))
    np.testing.assert_allclose(found, by_hand(queries, known, labels, 3.0), rtol=1e-5)
    padded = examples([*known, [np.nan] * 4], [*labels, 2], [True] * 5 + [False])
    again = jnp.exp(learner.predict(learner.adapt({}, padded), jnp.asarray(queries, jnp.float32)))
    np.testing.assert_allclose(again, found, rtol=1e-6)


def _lstm(cell, memory, hidden, inputs):
    """A step as the equations say: gates of the inputs without a bias, of the hidden state with one."""
    gates = {}
    for gate in "ifgo":
        fresh = inputs @ np.asarray(cell["if_" if gate == "f" else f"i{gate}"]["kernel"])
        gates[gate] = fresh + hidden @ np.asarray(cell[f"h{gate}"]["kernel"]) + np.asarray(cell[f"h{gate}"]["bias"])
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    memory = sigmoid(gates["f"]) * memory + sigmoid(gates["i"]) * np.tanh(gates["g"])
    return memory, sigmoid(gates["o"]) * np.tanh(memory)


def _read(cell, features):
    memory = hidden = np.zeros(features.shape[1])
    states = []
    for row in features:
        memory, hidden = _lstm(cell, memory, hidden, row)
        states.append(hidden)
    return np.array(states)


def test_full_context_embeddings_step_by_step():
    known, labels, queries = RNG.normal(size=(5, 4)), np.array([0, 1, 1, 2, 0]), RNG.normal(size=(3, 4))
    learner = learners.matching(IDENTITY, scale=2.0, full_context=True, steps=3)
    support = examples(known, labels)
    params = learner.init(jax.random.key(0), support.inputs)
    found = jnp.exp(learner.predict(learner.adapt(params, support), jnp.asarray(queries, jnp.float32)))
    cells = {name: params[name]["cell"] for name in ("forward", "backward", "query")}
    context = known + _read(cells["forward"], known) + _read(cells["backward"], known[::-1])[::-1]
    memory, hidden = np.zeros((3, 4)), queries
    for _ in range(3):
        read = softmax(hidden @ context.T) @ context
        memory, hidden = _lstm(cells["query"], memory, hidden, np.concatenate([queries, read], axis=1))
        hidden = hidden + queries
    np.testing.assert_allclose(found, by_hand(hidden, context, labels, 2.0), rtol=1e-4)
    padded = examples([*known[:2], [np.nan] * 4, *known[2:]], [*labels[:2], 0, *labels[2:]], [1, 1, 0, 1, 1, 1])
    again = jnp.exp(learner.predict(learner.adapt(params, padded), jnp.asarray(queries, jnp.float32)))
    np.testing.assert_allclose(again, found, rtol=1e-5)


def test_it_learns_and_a_config_reaches_it():
    config = metajax.run.complete({"model": {"name": "mlp", "hidden": (8,)}}, "learner=matching")
    assert set(config.learner) == {"name", "scale", "full_context", "steps", "loss"}
    config.learner.full_context = True
    learner = metajax.run.build(config, metajax.run.Facts(metajax.tasks.classification, 3)).learner
    params = jax.eval_shape(learner.init, jax.random.key(0), jnp.zeros([2, 4]))
    assert sorted(params) == ["backbone", "backward", "forward", "query"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale must be a finite number above 0, got 0.0"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"model": 3}, "model must be of type Model"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        learners.matching(**{"model": models.mlp(4), **options})
