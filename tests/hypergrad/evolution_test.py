"""Evolution strategies: unbiased on a quadratic, as a whole and from segments of an inner loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

import metajax
from metajax import hypergrad
from metajax.core import _inner

CURVATURE = np.array([0.5, 1.0, 1.5])
RATE, SIGMA = 0.3, 0.5
DECAY = 1 - RATE * CURVATURE  # of the distance to the target, in an inner step
TARGET = np.array([0.3, 0.2, -0.4])
ORIGIN = np.array([1.0, -1.0, 0.5])  # where the inner loop starts


def quadratic(num_steps, start=lambda meta: ORIGIN, outer=lambda adapted, goal: 0.5 * jnp.sum((adapted - goal) ** 2)):
    """A quadratic about the meta-parameters, which the inner loop starts without."""
    problem = metajax.InnerProblem(
        lambda meta, support, key: jnp.asarray(start(meta), support.inputs.dtype),
        lambda params, meta, support, step, key: 0.5 * jnp.sum(support.inputs * (params - meta) ** 2),
        lambda meta: optax.sgd(RATE), num_steps, lambda params, meta, support, key: params,
    )  # fmt: skip

    def adapt(meta, support, *, num_steps=None, key=None):
        return _inner.unroll(problem, meta, support, key=key, num_steps=num_steps).adapted

    def outer_loss(adapted, meta, query, *, key=None):
        return outer(adapted, query.targets), metajax.Aux(adapted)

    return metajax.Learner(
        lambda key, inputs: jnp.array(TARGET), adapt, None, outer_loss, problem, metajax.tasks.regression
    )


def task(seed=0):
    goal = np.random.default_rng(seed).normal(size=3)
    part = metajax.Examples(jnp.array(CURVATURE), jnp.array(goal), jnp.ones(3, bool))
    return metajax.Episode(part, part)


def end_of(start, target, steps):
    """Where `steps` inner steps lead."""
    return DECAY**steps * start + (1 - DECAY**steps) * target


def loss_of(end, seed=0):
    return 0.5 * np.sum((end - np.asarray(task(seed).query.targets)) ** 2, axis=-1)


def exact(steps):
    """The derivative of the outer loss after `steps` inner steps."""
    away = end_of(ORIGIN, TARGET, steps) - np.asarray(task().query.targets)
    return (1 - DECAY**steps) * away


def mean_and_error(samples):
    samples = np.asarray(samples)
    return samples.mean(axis=0), samples.std(axis=0, ddof=1) / len(samples) ** 0.5


@functools.cache
def samples(estimator, count=4000):
    """Hypergradients of one task under many keys."""
    fn = hypergrad.value_and_grad(quadratic(4), estimator)
    keys = jax.random.split(jax.random.key(0), count)
    return jax.jit(jax.vmap(lambda key: fn(jnp.array(TARGET), task(), key=key)[1]))(keys)


def close(samples, expected):
    """Within four standard errors, which are small enough to mean something."""
    mean, error = mean_and_error(samples)
    assert np.all(error < 0.05 * np.abs(expected).max())
    return bool(np.all(np.abs(mean - expected) < 4 * error))


BOTH = hypergrad.evolution(sigma=SIGMA, pairs=2)
ONE_SIDED = hypergrad.evolution(sigma=SIGMA, pairs=2, antithetic=False)


@pytest.mark.parametrize("estimator", [BOTH, ONE_SIDED], ids=["antithetic", "one-sided"])
def test_unbiased_on_a_quadratic(estimator, x64):
    assert close(samples(estimator), exact(4))
    assert not close(samples(estimator), 1.2 * exact(4))
    assert not close(samples(estimator), exact(3))


def test_antithetic_pairs_vary_less(x64):
    assert np.all(np.var(samples(BOTH), axis=0) < 0.9 * np.var(samples(ONE_SIDED), axis=0))
    more = samples(hypergrad.evolution(sigma=SIGMA, pairs=8), 1000)
    np.testing.assert_allclose(np.var(samples(BOTH), axis=0) / np.var(more, axis=0), 4, rtol=0.25)


def test_value_and_predictions_are_those_without_perturbation(x64):
    meta, key = jnp.array(TARGET), jax.random.key(0)
    (loss, aux), _ = jax.jit(hypergrad.value_and_grad(quadratic(4), BOTH))(meta, task(), key=key)
    end = end_of(ORIGIN, TARGET, 4)
    np.testing.assert_allclose(aux.outputs, end, rtol=1e-12)
    np.testing.assert_allclose(loss, loss_of(end), rtol=1e-12)
    assert aux.metrics["inner_loss"].shape == (4,)


@pytest.mark.parametrize("name", worlds.few_by_default(["anil", "prototypical"], lambda name: name == "anil"))
def test_small_perturbations_follow_the_gradient(name, x64):
    """In the same directions, a linear function with the exact gradient gives the same estimate."""
    row, sigma = worlds.LEARNERS[name], 1e-4
    params, episode = worlds.parameters(row), worlds.episode(row)

    def estimate(learner, chunk=None):
        fn = hypergrad.value_and_grad(learner, hypergrad.evolution(sigma=sigma, pairs=4, chunk=chunk))
        return jax.jit(fn)(params, episode, key=jax.random.key(3))[1]

    grads = estimate(row.learner)
    tangent = linear(row.learner, worlds.compiled(name, "unrolled")(params, episode)[1])
    assert worlds.relative_distance(grads, estimate(tangent)) < 1e-5
    assert worlds.relative_distance(grads, estimate(row.learner, chunk=2)) < 1e-12


def linear(learner, direction):
    """`<direction, meta_params>` as outer loss, whatever is adapted."""

    def outer_loss(adapted, meta, query, *, key=None):
        parts = jax.tree.map(lambda a, b: jnp.sum(a * b), direction, meta)
        return sum(jax.tree.leaves(parts)), metajax.Aux(())

    return learner._replace(outer_loss=outer_loss, problem=None)


def test_an_inner_rule_without_derivative(x64):
    """A start that is rounded: the others see a constant, the smoothed loss has a slope."""
    one = quadratic(0, start=jnp.sign, outer=lambda adapted, goal: jnp.sum(adapted))
    meta = jnp.array([0.3, -0.5, 0.0])
    _, nothing = hypergrad.value_and_grad(one, hypergrad.first_order())(meta, task())
    assert worlds.dot(nothing, nothing) == 0
    fn = hypergrad.value_and_grad(one, hypergrad.evolution(sigma=SIGMA, pairs=20_000))
    _, grads = jax.jit(fn)(meta, task(), key=jax.random.key(1))
    density = np.exp(-0.5 * (np.asarray(meta) / SIGMA) ** 2) / (2 * np.pi) ** 0.5
    np.testing.assert_allclose(grads, 2 * density / SIGMA, rtol=0.06)


def test_only_the_trained_part_is_perturbed(x64):
    row = worlds.LEARNERS["anil"]
    params, episode = worlds.parameters(row), worlds.episode(row)
    picked, rest = metajax.core._tree.split(params, "head")
    (loss, _), grads, _ = jax.jit(
        lambda picked, rest: BOTH.value_and_grad(
            row.learner, picked, (), episode, key=jax.random.key(0), frozen=rest
        )
    )(picked, rest)  # fmt: skip
    assert jax.tree.structure(grads) == jax.tree.structure(picked)
    np.testing.assert_allclose(loss, worlds.outer_loss("anil")(params, episode), rtol=1e-12)


def test_nan_in_one_inner_loop_is_not_hidden(x64):
    """Only meta-parameters that a perturbation moved far give NaN."""
    one = quadratic(2, outer=lambda adapted, goal: jnp.where(adapted[0] > 1.2, jnp.nan, jnp.sum(adapted)))
    for estimator in (hypergrad.evolution(sigma=2.0, pairs=50), persistent(50, 2, sigma=2.0)):
        fn = jax.jit(worlds.first_step(one, estimator))
        (loss, _), grads = fn(jnp.array(TARGET), task(), key=jax.random.key(0))
        assert np.isfinite(loss)
        assert np.isnan(grads).all()


# From segments.


def persistent(pairs, steps, sigma=SIGMA, **options):
    return hypergrad.persistent_evolution(sigma=sigma, pairs=pairs, steps=steps, **options)


def run_segments(estimator, one, count, key, episodes):
    """Loss, gradient and state after each of `count` outer steps that do not move the meta-parameters."""
    meta = jnp.array(TARGET)
    keys = jax.random.split(key, count)

    def step(state, inputs):
        key, episode = inputs
        (loss, aux), grads, state = estimator.value_and_grad(one, meta, state, episode, key=key)
        return state, (loss, grads, state, aux.outputs)

    return jax.lax.scan(step, estimator.init(one, meta, task(99), key), (keys, episodes))[1]


def truncated_evolution(rng, segments, steps, count):
    """Plain evolution of each segment from the unperturbed inner state, in NumPy: sums over the segments."""
    total, start = np.zeros([count, 3]), ORIGIN
    for _ in range(segments):
        noise = rng.normal(size=(count, 3))
        up, down = (loss_of(end_of(start, TARGET + side * SIGMA * noise, steps)) for side in (1, -1))
        total += noise * ((up - down) / (2 * SIGMA))[:, None]
        start = end_of(start, TARGET, steps)
    return total


def test_segments_are_unbiased_where_truncation_is_not(x64):
    """Three segments of two steps, summed: the gradient of the sum of the losses after 2, 4 and 6 steps."""
    expected = exact(2) + exact(4) + exact(6)
    estimator, one, episodes = persistent(4, 2), quadratic(6), worlds.stack([task()] * 3)

    @jax.jit
    @jax.vmap
    def sums(key):
        return run_segments(estimator, one, 3, key, episodes)[1].sum(axis=0)

    found = sums(jax.random.split(jax.random.key(0), 4000))
    assert close(found, expected)
    assert not close(found, 1.2 * expected)
    assert not close(truncated_evolution(np.random.default_rng(0), 3, 2, 16_000), expected)


@pytest.mark.parametrize("chunk", [None, 1])
def test_carried_states_and_perturbations(chunk, x64):
    """Five segments with a new start after three, checked from the inner states alone.

    These are linear in the perturbations, so that they tell which perturbation each segment drew.
    """
    pairs, steps = 3, 2
    episodes = worlds.stack([task(seed) for seed in range(5)])
    run = jax.jit(lambda key: run_segments(persistent(pairs, steps, chunk=chunk), quadratic(6), 5, key, episodes))
    losses, grads, states, outputs = jax.tree.map(np.asarray, run(jax.random.key(0)))
    middle, ends, drawn = ORIGIN, np.broadcast_to(ORIGIN, (pairs, 2, 3)), []
    for number in range(5):
        seed = 0 if number < 3 else 3  # the episode on which the inner loop began
        if number % 3 == 0:
            middle, ends, every = ORIGIN, np.broadcast_to(ORIGIN, (pairs, 2, 3)), 0.0
        before, ends, middle = ends, states.inner.params[number], end_of(middle, TARGET, steps)
        np.testing.assert_allclose(outputs[number], middle, rtol=1e-12)
        np.testing.assert_allclose(losses[number], loss_of(middle, seed), rtol=1e-12)
        np.testing.assert_array_equal(states.inner.step[number], (number % 3 + 1) * steps)
        np.testing.assert_allclose(ends.mean(axis=1), np.broadcast_to(middle, (pairs, 3)), rtol=1e-12)
        moved = (ends - end_of(before, TARGET, steps)) / (1 - DECAY**steps) / SIGMA
        np.testing.assert_allclose(moved[:, 0], -moved[:, 1], rtol=1e-9)
        every = every + moved[:, 0]
        drawn.append(moved[:, 0])
        values = loss_of(ends, seed)
        expected = np.mean(every * ((values[:, 0] - values[:, 1]) / (2 * SIGMA))[:, None], axis=0)
        np.testing.assert_allclose(grads[number], expected, rtol=1e-9)
    distinct = np.array(drawn).reshape(-1)
    assert len(np.unique(distinct.round(9))) == distinct.size  # by pair, by segment and after a new start
    assert 0.7 < distinct.std() < 1.3


@pytest.mark.parametrize(
    ("devices", "fresh_data"), worlds.few_by_default([(1, True), (2, False)], lambda devices, _: devices == 2)
)
def test_carried_through_outer_update(devices, fresh_data, x64):
    """Tasks in a batch, one after the other and over devices: the same, and each with a state of its own."""
    batches = [worlds.stack([task(10 * number + place) for place in range(2)]) for number in range(3)]

    def run(batching, devices):
        outer = metajax.outer_update(
            quadratic(4), optax.sgd(0.1), hypergrad=persistent(4, 2, chunk=2, fresh_data=fresh_data), before=False,
            task_batching=batching,
        )  # fmt: skip
        if devices > 1:
            outer = metajax.parallel.shard(outer, metajax.parallel.make_mesh(devices=jax.devices()[:devices]))
        state = outer.init(jax.random.key(0), task(), num_tasks=2)
        update, types = jax.jit(outer.update), jax.tree.map(jnp.shape, state)
        for batch in batches:
            state, metrics = update(state, batch)
        assert jax.tree.map(jnp.shape, state) == types
        assert metrics["inner_loss"].shape == (2,)
        return state.params, state.hypergrad_state

    params, kept = run("vmap", 1)
    others = run("scan", devices)
    assert worlds.relative_distance(others[0], params) < 1e-12
    assert worlds.relative_distance(others[1].inner.params, kept.inner.params) < 1e-12
    assert kept.inner.params.shape == (2, 4, 2, 3)
    np.testing.assert_array_equal(kept.inner.step, 2)
    assert not np.allclose(kept.inner.params[0], kept.inner.params[1])
    assert not np.array_equal(kept.noise[0], kept.noise[1])
    if fresh_data:
        assert kept.carried.episode == ()
    else:
        np.testing.assert_array_equal(kept.carried.episode.query.targets, batches[2].query.targets)


def test_nothing_is_compiled_again(x64):
    estimator, one, meta = persistent(2, 2), quadratic(4), jnp.array(TARGET)
    fn = jax.jit(lambda state, key: estimator.value_and_grad(one, meta, state, task(), key=key))
    state = estimator.init(one, meta, task(), jax.random.key(0))
    types = jax.tree.map(jax.typeof, state)
    for seed in range(2):
        *_, state = fn(state, jax.random.key(seed))
    assert jax.tree.map(jax.typeof, state) == types
    assert fn._cache_size() == 1


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: hypergrad.evolution(sigma=0.0, pairs=2), "sigma must be a finite number above 0, got 0.0"),
        (lambda: hypergrad.evolution(sigma=0.1, pairs=0), "pairs must be an integer of at least 1, got 0"),
        (lambda: hypergrad.evolution(sigma=0.1, pairs=4, chunk=3), "chunk must divide the number of pairs 4, got 3"),
        (lambda: persistent(2, 0), "steps must be an integer of at least 1, got 0"),
        (lambda: persistent(2, 1, sigma=-1.0), "sigma must be a finite number above 0, got -1.0"),
        (lambda: persistent(2, 1, chunk=0), "chunk must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_what_is_refused(x64):
    def trace(one, estimator, key):
        jax.eval_shape(lambda: worlds.first_step(one, estimator)(jnp.array(TARGET), task(), key=key))

    for estimator in (BOTH, persistent(2, 2)):
        with pytest.raises(ValueError, match=r"evolution\(\) draws perturbations and needs a key, got key=None"):
            trace(quadratic(4), estimator, None)
    for num_steps in (0, 3):
        with pytest.raises(ValueError, match=f"steps must divide the number of inner steps {num_steps}, got 2"):
            trace(quadratic(num_steps), persistent(2, 2), jax.random.key(0))
    with pytest.raises(ValueError, match=r"persistent_evolution\(\) needs a learner with an inner problem"):
        trace(quadratic(4)._replace(problem=None), persistent(2, 2), jax.random.key(0))
