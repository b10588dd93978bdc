"""MAML and its variants: what adapts, edge cases, statistics of the support set, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

import metajax
from metajax import learners, models

LINEAR = metajax.Model(lambda key, x: jnp.zeros([4, 4]), lambda w, x: x @ w)


@pytest.mark.parametrize("name", [name for name, row in worlds.LEARNERS.items() if row.learner.problem is not None])
def test_adaptation_is_the_loop_written_out(name, x64):
    row = worlds.LEARNERS[name]
    params, episode = worlds.parameters(row), worlds.episode(row)
    adapted = jax.jit(row.learner.adapt)(params, episode.support)
    expected, _, _ = worlds.by_hand(name)
    assert worlds.relative_distance(adapted.params, expected) < 1e-10


def test_another_number_of_steps_and_none(x64):
    row = worlds.LEARNERS["maml"]
    params, episode = worlds.parameters(row), worlds.episode(row)
    for steps in (0, 1, 5):
        adapted = row.learner.adapt(params, episode.support, num_steps=steps)
        expected = worlds.by_hand("maml", steps)[0]
        assert worlds.relative_distance(adapted.params, expected) < 1e-10
    still = row.learner.adapt(params, episode.support, num_steps=0).params
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (still, params)), strict=True))


def test_anil_adapts_the_head_and_shares_the_body():
    row = worlds.LEARNERS["anil"]
    params, episode = worlds.parameters(row, dtype=np.float32), worlds.episode(row, dtype=np.float32)
    adapted = row.learner.adapt(params, episode.support)
    assert adapted.params["layer_0"]["kernel"] is params["layer_0"]["kernel"]  # not even copied
    assert worlds.relative_distance(adapted.params["head"], params["head"]) > 1e-3
    state = metajax.inner_init(row.learner.problem)(params, episode.support)
    assert len(jax.tree.leaves(state.params)) == 2


def test_a_predicate_picks_what_adapts():
    params, episode = (f(worlds.LEARNERS["maml"], dtype=np.float32) for f in (worlds.parameters, worlds.episode))
    model = models.mlp(worlds.WAYS, hidden=(6,))
    by_regex = learners.maml(model, optax.sgd(0.3), 2, adapts="bias$").adapt(params, episode.support)
    by_predicate = learners.maml(model, optax.sgd(0.3), 2, adapts=lambda path: path.endswith("bias"))
    assert worlds.relative_distance(by_predicate.adapt(params, episode.support).params, by_regex.params) == 0
    np.testing.assert_array_equal(by_regex.params["head"]["kernel"], params["head"]["kernel"])


def test_the_proximal_term_holds_back(x64):
    params, episode = (f(worlds.LEARNERS["maml"]) for f in (worlds.parameters, worlds.episode))
    model = models.mlp(worlds.WAYS, hidden=(6,))
    moved = []
    for weight in (0.0, 1.0, 3.0):
        adapted = learners.maml(model, optax.sgd(0.1), 20, proximal=weight).adapt(params, episode.support)
        moved.append(worlds.relative_distance(adapted.params, params))
    assert moved[0] > 1.2 * moved[1] > 1.2**2 * moved[2] > 0


@pytest.mark.slow
def test_support_statistics_are_those_of_the_adapted_network(x64):
    row = worlds.LEARNERS["maml_support_statistics"]
    params, episode = worlds.parameters(row), worlds.episode(row)
    adapted = jax.jit(row.learner.adapt)(params, episode.support)
    kept = episode.support.inputs[:6]
    _, expected = row.model.apply(adapted.params, kept, mask=None, stats=None)
    for found, value in zip(*map(jax.tree.leaves, (adapted.stats, expected)), strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-10)
    # inductive: one query image is predicted the same alone and among others
    together = row.learner.predict(adapted, episode.query.inputs)
    np.testing.assert_allclose(row.learner.predict(adapted, episode.query.inputs[:1]), together[:1], rtol=1e-10)


def test_one_shot_of_one_class():
    learner = learners.maml(LINEAR, optax.sgd(0.5), 3)
    one = metajax.Examples(jnp.ones([1, 4]), jnp.array([2]), jnp.ones(1, bool))
    outputs = learner.predict(learner.adapt(jnp.zeros([4, 4]), one), one.inputs)
    assert outputs.argmax() == 2
    assert np.all(np.isfinite(outputs))


def test_nothing_kept_nothing_adapts():
    learner = learners.maml(LINEAR, optax.adam(0.5), 3)
    none = metajax.Examples(jnp.full([2, 4], jnp.nan), jnp.array([1, 9]), jnp.zeros(2, bool))
    np.testing.assert_array_equal(learner.adapt(jnp.ones([4, 4]), none).params, 1)


def test_a_kept_nan_shows():
    learner = learners.maml(LINEAR, optax.sgd(0.5))
    examples = metajax.Examples(jnp.full([2, 4], jnp.nan), jnp.array([1, 0]), jnp.array([True, False]))
    assert np.all(np.isnan(learner.adapt(jnp.ones([4, 4]), examples).params))


def test_a_model_that_draws_noise_is_deterministic_without_a_key():
    def apply(w, x, key):
        return x @ w + (0 if key is None else jax.random.normal(key, [x.shape[0], 4]))

    learner = learners.maml(metajax.Model(LINEAR.init, apply, ("key",)), optax.sgd(0.5), 2)
    support = worlds.examples(0, 6, 0, dtype=np.float32)
    silent = learners.maml(LINEAR, optax.sgd(0.5), 2).adapt(jnp.zeros([4, 4]), support).params
    np.testing.assert_array_equal(learner.adapt(jnp.zeros([4, 4]), support).params, silent)
    first, again, other = (learner.adapt(jnp.zeros([4, 4]), support, key=jax.random.key(k)).params for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_targets_that_are_left_out():
    """Positions with a negative target have no part in the loss, as if they were not there."""
    model = metajax.Model(lambda key, x: jnp.zeros([3, 4]), lambda w, x: x @ w)
    learner = learners.maml(model, optax.sgd(0.5), 2)
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(2, 5, 3)).astype(np.float32), np.array([[0, 1, 2, -1, -1], [3, -1, -1, -1, -1]])
    params = jnp.array(rng.normal(size=(3, 4)), jnp.float32)
    found = learner.adapt(params, metajax.Examples(jnp.array(inputs), jnp.array(targets), jnp.ones(2, bool)))
    inputs[targets < 0] = 1e3
    other = learner.adapt(params, metajax.Examples(jnp.array(inputs), jnp.array(targets), jnp.ones(2, bool)))
    np.testing.assert_allclose(found.params, other.params, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        ({"num_steps": 2.0}, "num_steps must be an integer of at least 1, got 2.0"),
        ({"proximal": -0.1}, "proximal must be a finite number of at least 0, got -0.1"),
        ({"proximal": float("nan")}, "proximal must be a finite number of at least 0, got nan"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        learners.maml(LINEAR, optax.sgd(0.1), **arguments)


def test_refusals_when_the_task_is_seen():
    support = worlds.examples(0, 6, 0, dtype=np.float32)
    params = worlds.parameters(worlds.LEARNERS["maml"], dtype=np.float32)
    nothing = learners.maml(models.mlp(worlds.WAYS, hidden=(6,)), optax.sgd(0.1), adapts="tail")
    with pytest.raises(ValueError, match="adapts must pick at least one leaf, got 'tail'; paths: head/bias"):
        nothing.adapt(params, support)
    with pytest.raises(ValueError, match="ways must be at most 4, the number of outputs of the model, got 6"):
        learners.maml(LINEAR, optax.sgd(0.1)).adapt(jnp.zeros([4, 4]), support._replace(class_mask=jnp.ones(6, bool)))
    unknown = metajax.Model(LINEAR.init, LINEAR.apply, ("train",))
    with pytest.raises(ValueError, match="needs must be among 'mask', 'key' and 'stats', got 'train'"):
        learners.maml(unknown, optax.sgd(0.1)).adapt(jnp.zeros([4, 4]), support)
