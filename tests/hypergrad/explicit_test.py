"""What the explicit estimators promise beyond the contract table."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

import metajax
from metajax import hypergrad

EXPLICIT = [name for name in worlds.ESTIMATORS if name != "displacement"]


@pytest.mark.parametrize("estimator", worlds.ESTIMATORS)
@pytest.mark.parametrize("trained", ["head", "layer_0"])
def test_the_frozen_part_is_not_differentiated_and_changes_nothing_else(estimator, trained, x64):
    row = worlds.LEARNERS["anil"]
    params, episode = worlds.parameters(row), worlds.episode(row)
    whole = worlds.compiled("anil", estimator)(params, episode)[1]
    kept = {name: value if name == trained else jax.tree.map(lambda _: None, value) for name, value in params.items()}
    frozen = {name: jax.tree.map(lambda _: None, value) if name == trained else value for name, value in params.items()}
    entry = worlds.ESTIMATORS[estimator]
    _, grads, _ = worlds.jit(
        lambda kept, frozen: entry.value_and_grad(row.learner, kept, (), episode, frozen=frozen)
    )(kept, frozen)  # fmt: skip
    assert jax.tree.structure(grads) == jax.tree.structure(kept)
    assert worlds.relative_distance(grads[trained], whole[trained]) < 1e-12


@pytest.mark.parametrize("estimator", worlds.ESTIMATORS)
def test_a_frozen_table_of_integers(estimator):
    """Integers can be looked at by the loss; they are neither differentiated nor updated."""
    model = metajax.Model(lambda key, x: None, lambda p, x: x[:, p["order"]] @ p["w"])
    learner = metajax.learners.maml(model, optax.sgd(0.1), 2, adapts="w")
    examples = worlds.examples(0, 6, 0, dtype=np.float32)
    weights, order = jnp.ones([4, worlds.WAYS]), jnp.array([3, 1, 0, 2])
    episode, entry = metajax.Episode(examples, examples), worlds.ESTIMATORS[estimator]
    _, grads, _ = worlds.jit(
        lambda kept, frozen: entry.value_and_grad(learner, kept, (), episode, frozen=frozen)
    )({"w": weights, "order": None}, {"w": None, "order": order})  # fmt: skip
    moved = examples._replace(inputs=examples.inputs[:, order])
    plain = metajax.learners.maml(metajax.Model(lambda key, x: None, lambda w, x: x @ w), optax.sgd(0.1), 2)
    _, expected = worlds.jit(hypergrad.value_and_grad(plain, entry))(weights, metajax.Episode(moved, moved))
    np.testing.assert_allclose(grads["w"], expected, rtol=1e-5, atol=1e-7)
    assert grads["order"] is None


def test_first_order_is_exact_without_curvature(x64):
    """A linear inner loss: the inner gradient is a constant, so that nothing is lost by taking it for one."""
    linear = lambda outputs, targets: jnp.sum(outputs * targets, axis=-1)  # noqa: E731
    model = metajax.Model(lambda key, x: None, lambda w, x: x @ w)
    learner = metajax.learners.maml(model, optax.sgd(0.3), 3, loss=linear)
    rng = np.random.default_rng(0)
    weights, inputs, targets = (jnp.array(rng.normal(size=size)) for size in ((3, 2), (5, 3), (5, 2)))
    examples = metajax.Examples(inputs, targets, jnp.ones(5, bool))
    episode = metajax.Episode(examples, examples)
    estimators = [worlds.ESTIMATORS[name] for name in EXPLICIT]
    grads = [worlds.jit(hypergrad.value_and_grad(learner, entry))(weights, episode)[1] for entry in estimators]
    for other in grads[1:]:
        np.testing.assert_allclose(other, grads[0], rtol=1e-12)


def test_forward_mode_through_mixed_mode_is_refused():
    row = worlds.LEARNERS["maml"]
    params, episode = worlds.parameters(row, dtype=np.float32), worlds.episode(row, dtype=np.float32)
    loss = lambda params, name: worlds.ESTIMATORS[name].value_and_grad(row.learner, params, (), episode)[1]  # noqa: E731
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda params: loss(params, "mixed_mode"), (params,), (params,))
    jax.eval_shape(lambda params: jax.jvp(lambda params: loss(params, "unrolled"), (params,), (params,)), params)


def test_recomputing_estimators_keep_less():
    """Bytes of temporaries as the compiler counts them, for a network whose activations outweigh its weights."""
    model = metajax.models.mlp(worlds.WAYS, hidden=(16,) * 6)
    learner = metajax.learners.maml(model, optax.sgd(0.1), 8)
    examples = worlds.examples(0, 600, 0, dtype=np.float32)
    params = learner.init(jax.random.key(0), examples.inputs)

    def temporaries(name):
        fn = worlds.jit(hypergrad.value_and_grad(learner, worlds.ESTIMATORS[name]))
        lowered = fn.lower(params, metajax.Episode(examples, examples))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    plain, remat, mixed = (temporaries(name) for name in worlds.EXACT)
    assert remat < 0.5 * plain
    assert mixed < 0.5 * plain


def test_the_primitive_describes_the_task(x64):
    row = worlds.LEARNERS["reptile"]
    params, episode = worlds.parameters(row), worlds.episode(row)
    (_, aux), _ = worlds.compiled("reptile", "unrolled")(params, episode)
    losses = [worlds.outer_loss("reptile")(params, metajax.Episode(episode.support, episode.support))]
    adapted = row.learner.adapt(params, episode.support)
    np.testing.assert_allclose(aux["outputs"], row.learner.predict(adapted, episode.query.inputs), rtol=1e-10)
    before = row.learner.adapt(params, episode.support, num_steps=0)
    value, _ = row.learner.outer_loss(before, params, episode.support)
    np.testing.assert_allclose(aux["inner_loss"][0], value, rtol=1e-10)
    assert float(losses[0]) < float(value)


@pytest.mark.parametrize("estimator", worlds.ESTIMATORS)
def test_keys_reach_the_learner(estimator):
    """A learner that draws minibatches: one key twice is the same, two keys differ."""
    model = metajax.models.mlp(worlds.WAYS, hidden=())
    learner = metajax.learners.reptile(model, optax.sgd(0.1), 2, batch_size=2)
    examples = worlds.examples(0, 6, 1, dtype=np.float32)
    params = learner.init(jax.random.key(0), examples.inputs)
    fn = worlds.jit(hypergrad.value_and_grad(learner, worlds.ESTIMATORS[estimator]))
    episode = metajax.Episode(examples, examples)
    first, again, other = (fn(params, episode, key=jax.random.key(seed))[1] for seed in (1, 1, 2))
    assert worlds.relative_distance(first, again) == 0
    assert worlds.relative_distance(other, first) > 1e-3
