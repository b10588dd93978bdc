"""Transfer learning: from `pretrain` to `finetune`, edge cases, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

import metajax
from metajax import hypergrad, learners, models

MODEL = models.mlp(6, hidden=(8,))
IDENTITY = metajax.Model(lambda key, x: {}, lambda params, x: x)


def clouds(seed, classes, each):
    """Classes far apart on the axes of an 8-dimensional space."""
    rng = np.random.default_rng(seed)
    labels = np.tile(classes, each)
    inputs = 3 * np.eye(8)[labels] + 0.3 * rng.normal(size=(len(labels), 8))
    return metajax.Examples(jnp.array(inputs, jnp.float32), jnp.array(labels), jnp.ones(len(labels), bool))


@pytest.mark.parametrize("head", worlds.few_by_default(["linear", "cosine"], lambda head: head == "linear"))
def test_what_pretrain_learned_serves_finetune(head):
    """Trained on classes 0 to 4 with global labels; a head for classes 5 to 7, relabelled 0 to 2."""
    base = learners.pretrain(MODEL, 5, head=head)
    outer = metajax.outer_update(base, optax.adam(0.03), hypergrad=hypergrad.unrolled())
    batch = clouds(0, [0, 1, 2, 3, 4], 8)
    episode = metajax.Episode(batch, batch)
    state = outer.init(jax.random.key(0), episode)
    update = jax.jit(outer.update)
    for _ in range(60):
        state, metrics = update(state, jax.tree.map(lambda leaf: leaf[None], episode))
    assert metrics["accuracy"] > 0.95
    assert sorted(state.params) == ["backbone", "head"]
    learner = learners.finetune(MODEL, optax.sgd(0.1), 50, head=head)
    support, query = clouds(1, [5, 6, 7], 2), clouds(2, [5, 6, 7], 10)
    adapted = learner.adapt(state.params, support._replace(targets=support.targets - 5))
    outputs = learner.predict(adapted, query.inputs)
    assert outputs.shape == (30, 3)
    assert np.mean(outputs.argmax(1) == query.targets - 5) > 0.6  # the axes of these classes were never trained
    assert adapted.params["head"]["kernel"] is state.params["backbone"]["head"]["kernel"]  # the backbone is shared


def test_a_linear_head_of_no_steps_knows_nothing_and_a_cosine_head_its_class_means():
    support = metajax.Examples(jnp.array([[1.0, 0.0], [0.0, 2.0], [2.0, 0.0]]), jnp.array([0, 1, 0]), jnp.ones(3, bool))
    linear = learners.finetune(IDENTITY, optax.sgd(0.1))
    adapted = linear.adapt({"backbone": {}}, support, num_steps=0)
    np.testing.assert_array_equal(linear.predict(adapted, support.inputs), 0)
    cosine = learners.finetune(IDENTITY, optax.sgd(0.1), head="cosine")
    adapted = cosine.adapt({"backbone": {}}, support, num_steps=0)
    np.testing.assert_allclose(adapted.head["kernel"], [[1.5, 0.0], [0.0, 2.0]])
    np.testing.assert_allclose(cosine.predict(adapted, support.inputs), [[10, 0], [0, 10], [10, 0]], atol=1e-5)


@pytest.mark.parametrize("head", worlds.few_by_default(["linear", "cosine"], lambda head: head == "cosine"))
def test_one_shot_absent_classes_and_nothing_kept(head):
    learner = learners.finetune(IDENTITY, optax.sgd(0.1), 10, head=head)
    one = metajax.Examples(
        jnp.ones([1, 2]), jnp.array([1]), jnp.ones(1, bool), class_mask=jnp.array([False, True, False])
    )
    outputs = learner.predict(learner.adapt({"backbone": {}}, one), one.inputs)
    assert np.all(np.isfinite(outputs))
    np.testing.assert_array_equal(outputs[0, [0, 2]], -1e9)
    nothing = learner.adapt({"backbone": {}}, one._replace(mask=jnp.zeros(1, bool), inputs=jnp.full([1, 2], jnp.nan)))
    np.testing.assert_array_equal(nothing.head["kernel"], 0)


def test_the_backbone_sees_the_support_set_once():
    calls = []

    def apply(params, x):
        calls.append(x.shape)
        return x

    learner = learners.finetune(metajax.Model(lambda key, x: {}, apply), optax.sgd(0.1), 100)
    learner.adapt({"backbone": {}}, clouds(0, [0, 1], 2))
    assert calls == [(4, 8)]


def test_ways_under_jit():
    learner = learners.finetune(IDENTITY, optax.sgd(0.1), 2)
    support = clouds(0, [0, 1], 2)
    with pytest.raises(ValueError, match="the number of ways is unknown"):
        jax.jit(learner.adapt)({"backbone": {}}, support)
    wide = learners.finetune(IDENTITY, optax.sgd(0.1), 2, ways=5)
    assert jax.jit(wide.adapt)({"backbone": {}}, support).head["kernel"].shape == (5, 8)


def test_pretrain_ignores_the_support_set():
    learner = learners.pretrain(MODEL, 3)
    params = learner.init(jax.random.key(0), jnp.ones([1, 8]))
    outputs = [learner.predict(learner.adapt(params, clouds(seed, [0, 1], 2)), jnp.ones([2, 8])) for seed in (0, 1)]
    np.testing.assert_array_equal(*outputs)
    assert outputs[0].shape == (2, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: learners.pretrain(MODEL, 0), "num_classes must be an integer of at least 1, got 0"),
        (lambda: learners.pretrain(MODEL, 5, head="svm"), "head must be one of 'linear', 'cosine', got 'svm'"),
        (lambda: learners.finetune(MODEL, optax.sgd(0.1), head="svm"), "head must be one of .* got 'svm'"),
        (lambda: learners.finetune(MODEL, optax.sgd(0.1), 0), "num_steps must be an integer of at least 1, got 0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
