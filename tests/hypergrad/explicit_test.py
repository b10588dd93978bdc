"""What the explicit estimators promise beyond the contract table."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

import metajax
from metajax import hypergrad

EXPLICIT = [*worlds.EXACT, "first_order"]
WITHOUT_PROXIMAL = [name for name in worlds.ESTIMATORS if name not in ("implicit", "sama")]  # which refuse plain MAML


SPLITS = [(estimator, trained) for estimator in WITHOUT_PROXIMAL for trained in ("head", "layer_0")]


# what adapts, and what does not: both for one estimator, the harder for the others
@pytest.mark.parametrize(
    ("estimator", "trained"),
    worlds.few_by_default(SPLITS, lambda estimator, trained: trained == "layer_0" or estimator == "mixed_mode"),
)
def test_the_frozen_part_is_not_differentiated_and_changes_nothing_else(estimator, trained, x64):
    row = worlds.LEARNERS["anil"]
    params, episode = worlds.parameters(row), worlds.episode(row)
    whole = worlds.compiled("anil", estimator)(params, episode)[1]
    kept = {name: value if name == trained else jax.tree.map(lambda _: None, value) for name, value in params.items()}
    frozen = {name: jax.tree.map(lambda _: None, value) if name == trained else value for name, value in params.items()}
    entry = worlds.ESTIMATORS[estimator]
    _, grads, _ = jax.jit(
        lambda kept, frozen: entry.value_and_grad(row.learner, kept, (), episode, frozen=frozen)
    )(kept, frozen)  # fmt: skip
    assert jax.tree.structure(grads) == jax.tree.structure(kept)
    assert worlds.relative_distance(grads[trained], whole[trained]) < 1e-12


# one estimator of each way to differentiate the inner gradient
ONE_OF_EACH = ("mixed_mode", "first_order", "finite_difference")


@pytest.mark.parametrize("estimator", worlds.few_by_default(WITHOUT_PROXIMAL, lambda name: name in ONE_OF_EACH))
def test_a_frozen_table_of_integers(estimator):
    """Integers can be looked at by the loss; they are neither differentiated nor updated."""
    model = metajax.Model(lambda key, x: None, lambda p, x: x[:, p["order"]] @ p["w"])
    learner = metajax.learners.maml(model, optax.sgd(0.1), 2, adapts="w")
    examples = worlds.examples(0, 6, 0, dtype=np.float32)
    weights, order = jnp.ones([4, worlds.WAYS]), jnp.array([3, 1, 0, 2])
    episode, entry = metajax.Episode(examples, examples), worlds.ESTIMATORS[estimator]
    _, grads, _ = jax.jit(
        lambda kept, frozen: entry.value_and_grad(learner, kept, (), episode, frozen=frozen)
    )({"w": weights, "order": None}, {"w": None, "order": order})  # fmt: skip
    moved = examples._replace(inputs=examples.inputs[:, order])
    plain = metajax.learners.maml(metajax.Model(lambda key, x: None, lambda w, x: x @ w), optax.sgd(0.1), 2)
    _, expected = jax.jit(hypergrad.value_and_grad(plain, entry))(weights, metajax.Episode(moved, moved))
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
    grads = [jax.jit(hypergrad.value_and_grad(learner, entry))(weights, episode)[1] for entry in estimators]
    for other in grads[1:]:
        np.testing.assert_allclose(other, grads[0], rtol=1e-12)


def test_the_exact_hypergradient_can_be_differentiated(x64):
    """Forward over mixed mode: the curvature of the outer loss along a direction."""
    row = worlds.LEARNERS["anil"]
    params, episode = worlds.parameters(row), worlds.episode(row)

    def curvature(name):
        grads = lambda params: worlds.ESTIMATORS[name].value_and_grad(row.learner, params, (), episode)[1]  # noqa: E731
        return jax.jit(lambda params: jax.jvp(grads, (params,), (params,))[1])(params)

    assert worlds.relative_distance(curvature("mixed_mode"), curvature("unrolled")) < 1e-10


RULES = {
    "sgd": optax.sgd(0.3),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.05, eps_root=1e-8),
    "scheduled": optax.sgd(optax.linear_schedule(0.3, 0.0, 5)),
}
WEIGHTS = (0.1, 0.0, 0.3, 0.2, 0.4)


# momentum is the cheapest that carries a state from step to step
@pytest.mark.parametrize("rule", worlds.few_by_default(RULES, lambda rule: rule == "momentum"))
def test_exact_estimators_agree_whatever_they_keep(rule, x64):
    learner = metajax.learners.maml(metajax.models.mlp(worlds.WAYS, hidden=()), RULES[rule], 5)  # quick to compile
    row = worlds.Row(learner)
    params, episode = worlds.parameters(row), worlds.episode(row)

    def grads(estimator):
        return jax.jit(hypergrad.value_and_grad(learner, estimator))(params, episode)[1]

    plain, weighted = grads(hypergrad.unrolled()), grads(hypergrad.unrolled(step_weights=WEIGHTS))
    assert worlds.relative_distance(plain, weighted) > 1e-3
    for estimator, expected in (
        (hypergrad.mixed_mode(every=1), plain),
        (hypergrad.mixed_mode(every=2, step_weights=WEIGHTS), weighted),
        (hypergrad.mixed_mode(step_weights=WEIGHTS), weighted),
        (hypergrad.unrolled(remat=True, block=2, step_weights=WEIGHTS), weighted),
        (hypergrad.unrolled(remat=jax.checkpoint_policies.dots_saveable, block=3), plain),
    ):
        assert worlds.relative_distance(grads(estimator), expected) < 1e-12


def test_step_weights_weigh_the_outer_loss_after_each_step(x64):
    row = worlds.LEARNERS["anil"]
    params, episode = worlds.parameters(row), worlds.episode(row)

    def loss(params):
        parts = []
        for steps, weight in ((1, 0.3), (2, 0.7)):
            adapted = row.learner.adapt(params, episode.support, num_steps=steps)
            parts.append(weight * row.learner.outer_loss(adapted, params, episode.query)[0])
        return sum(parts)

    expected, slope = jax.jit(jax.value_and_grad(loss))(params)
    for name in ("unrolled", "mixed_mode", "first_order"):
        estimator = getattr(hypergrad, name)(step_weights=(0.3, 0.7))
        (value, _), grads = jax.jit(hypergrad.value_and_grad(row.learner, estimator))(params, episode)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        if name != "first_order":
            assert worlds.relative_distance(grads, slope) < 1e-12


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: hypergrad.unrolled(remat="step"), "remat must be True, False or a policy"),
        (lambda: hypergrad.unrolled(block=2), "block must be 1 without remat, got 2"),
        (lambda: hypergrad.unrolled(remat=True, block=0), "block must be an integer of at least 1, got 0"),
        (lambda: hypergrad.mixed_mode(every=0), "every must be an integer of at least 1, got 0"),
        (lambda: hypergrad.mixed_mode(step_weights=(1.0, -1.0)), "a weight of step_weights must be"),
        (lambda: hypergrad.first_order(step_weights=(0.0, 0.0)), "step_weights must hold a positive number"),
    ],
)
def test_bad_arguments(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_weights_for_another_number_of_steps():
    row = worlds.LEARNERS["maml"]
    params, episode = worlds.parameters(row, dtype=np.float32), worlds.episode(row, dtype=np.float32)
    with pytest.raises(ValueError, match=r"step_weights must have one for each of 2 inner steps, got \(1.0,\)"):
        hypergrad.value_and_grad(row.learner, hypergrad.mixed_mode(step_weights=[1]))(params, episode)


@pytest.mark.slow  # three large programs
def test_recomputing_estimators_keep_less():
    """Bytes of temporaries as the compiler counts them, for a network whose activations outweigh its weights."""
    model = metajax.models.mlp(worlds.WAYS, hidden=(16,) * 6)
    learner = metajax.learners.maml(model, optax.sgd(0.1), 8)
    examples = worlds.examples(0, 600, 0, dtype=np.float32)
    params = learner.init(jax.random.key(0), examples.inputs)

    def temporaries(name):
        fn = jax.jit(hypergrad.value_and_grad(learner, worlds.ESTIMATORS[name]))
        return worlds.temporary_bytes(fn, params, metajax.Episode(examples, examples))

    plain, remat, mixed = (temporaries(name) for name in worlds.EXACT)
    assert remat < 0.5 * plain
    assert mixed < 0.5 * plain


def test_the_primitive_describes_the_task(x64):
    row = worlds.LEARNERS["reptile"]
    params, episode = worlds.parameters(row), worlds.episode(row)
    (_, aux), _ = worlds.compiled("reptile", "unrolled")(params, episode)
    losses = [worlds.outer_loss("reptile")(params, metajax.Episode(episode.support, episode.support))]
    adapted = row.learner.adapt(params, episode.support)
    np.testing.assert_allclose(aux.outputs, row.learner.predict(adapted, episode.query.inputs), rtol=1e-10)
    before = row.learner.adapt(params, episode.support, num_steps=0)
    value, _ = row.learner.outer_loss(before, params, episode.support)
    np.testing.assert_allclose(aux.metrics["inner_loss"][0], value, rtol=1e-10)
    assert float(losses[0]) < float(value)


@pytest.mark.parametrize("estimator", worlds.few_by_default(WITHOUT_PROXIMAL, lambda name: name in ONE_OF_EACH[:2]))
def test_keys_reach_the_learner(estimator):
    """A learner that draws minibatches: one key twice is the same, two keys differ."""
    model = metajax.models.mlp(worlds.WAYS, hidden=())
    learner = metajax.learners.reptile(model, optax.sgd(0.1), 2, batch_size=2)
    examples = worlds.examples(0, 6, 1, dtype=np.float32)
    params = learner.init(jax.random.key(0), examples.inputs)
    fn = jax.jit(hypergrad.value_and_grad(learner, worlds.ESTIMATORS[estimator]))
    episode = metajax.Episode(examples, examples)
    first, again, other = (fn(params, episode, key=jax.random.key(seed))[1] for seed in (1, 1, 2))
    assert worlds.relative_distance(first, again) == 0
    assert worlds.relative_distance(other, first) > 1e-3


WRITTEN_OUT = [(make, unroll) for make in (hypergrad.unrolled, hypergrad.mixed_mode) for unroll in (2, 5)]


# of two steps: all of them, and more than there are
@pytest.mark.parametrize(
    ("make", "unroll"),
    worlds.few_by_default(WRITTEN_OUT, lambda make, unroll: (make.__name__, unroll) == ("unrolled", 2)),
)
def test_steps_written_out_change_nothing(make, unroll, x64):
    row, params, episode = worlds.world("maml")
    function = hypergrad.value_and_grad(row.learner, make(unroll=unroll))
    (_, expected), (_, found) = (
        worlds.compiled("maml", "unrolled")(params, episode),
        jax.jit(function)(params, episode),
    )
    assert worlds.relative_distance(found, expected) < 1e-12
    with pytest.raises(ValueError, match="unroll must be an integer of at least 1, got 0"):
        make(unroll=0)
