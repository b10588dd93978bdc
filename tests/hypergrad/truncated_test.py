"""Truncation: of the first steps of a loop, and with inner state that outer steps share."""

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


def learner(problem):
    """The distance to the targets of the query set as outer loss."""

    def adapt(meta, support, *, num_steps=None, key=None):
        return _inner.unroll(problem, meta, support, key=key, num_steps=num_steps).adapted

    def outer_loss(adapted, meta, query, *, key=None):
        return 0.5 * jnp.sum((adapted - query.targets) ** 2), metajax.Aux(adapted)

    return metajax.Learner(lambda key, inputs: META, adapt, None, outer_loss, problem, metajax.tasks.regression)


def quadratic(num_steps, optimizer=lambda meta: optax.sgd(meta["rate"])):
    """A quadratic about a learned target, with a learned start and rate."""
    return learner(
        metajax.InnerProblem(
            lambda meta, support, key: meta["start"],
            lambda params, meta, support, step, key: 0.5 * jnp.sum(support.inputs * (params - meta["target"]) ** 2),
            optimizer,
            num_steps,
            lambda params, meta, support, key: params,
        )
    )


META = {"start": jnp.array([1.0, -1.0, 0.5]), "target": jnp.array([0.3, 0.2, -0.4]), "rate": jnp.array(0.3)}


def task(seed):
    goal = np.random.default_rng(seed).normal(size=3)
    parts = [metajax.Examples(jnp.array(CURVATURE), jnp.array(values), jnp.ones(3, bool)) for values in (goal, goal)]
    return metajax.Episode(*parts)


def as_float64(meta):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), meta)


def gradient(learner, estimator, params, episode):
    return jax.jit(hypergrad.value_and_grad(learner, estimator))(params, episode)


@pytest.mark.parametrize("start", worlds.few_by_default(["identity", "constant"], lambda start: start == "identity"))
def test_through_all_steps_it_is_exact(start, x64):
    row = worlds.LEARNERS["maml_adam"]
    params, episode = worlds.parameters(row), worlds.episode(row)
    (loss, _), expected = worlds.compiled("maml_adam", "unrolled")(params, episode)
    for k in (2,) if start == "constant" else (2, 5):
        (value, _), grads = gradient(row.learner, hypergrad.truncated(k, start=start), params, episode)
        assert worlds.relative_distance(grads, expected) < 1e-12
        np.testing.assert_allclose(value, loss, rtol=1e-14)


def curved(num_steps=5):
    """Nothing is linear: a quartic with a learned ridge, and momentum with a learned rate."""
    problem = metajax.InnerProblem(
        lambda meta, support, key: jnp.sin(meta["start"]),
        lambda x, meta, support, step, key: (
            0.25 * jnp.sum(support.inputs * (x - support.targets) ** 4) + meta["ridge"] * jnp.sum(x**2)
        ),
        lambda meta: optax.sgd(jnp.exp(meta["rate"]), momentum=0.5),
        num_steps,
        lambda params, meta, support, key: params * meta["scale"],
    )
    meta = {"start": jnp.array([0.5, -0.7, 0.2]), "ridge": 0.3, "rate": jnp.array([-2.0, -1.5, -1.8]), "scale": 1.2}
    return learner(problem), as_float64(meta)


def truncated_by_hand(meta, episode, num_steps, k, start, weights=None):
    """A loop in Python whose first steps see numbers instead of what is differentiated."""
    weights = [0.0] * (num_steps - 1) + [1.0] if weights is None else weights
    numbers = jax.tree.map(np.asarray, meta)
    curvature, goal = episode.support.inputs, episode.support.targets

    def objective(meta):
        x, trace, total = jnp.sin(numbers["start"]), jnp.zeros(3), 0.0
        for step in range(num_steps):
            if step == num_steps - k and start == "identity":
                x = x + jnp.sin(meta["start"]) - np.sin(numbers["start"])
            seen = meta if step >= num_steps - k else numbers
            trace = curvature * (x - goal) ** 3 + 2 * seen["ridge"] * x + 0.5 * trace
            x = x - jnp.exp(seen["rate"]) * trace
            total += weights[step] * 0.5 * jnp.sum((x * meta["scale"] - episode.query.targets) ** 2)
        return total

    return jax.value_and_grad(objective)(meta)


@pytest.mark.parametrize("start", ["identity", "constant"])
def test_the_last_steps_by_hand(start, x64):
    (one, meta), episode = curved(), task(0)
    for k in (1, 3):
        (loss, aux), grads = gradient(one, hypergrad.truncated(k, start=start), meta, episode)
        value, expected = truncated_by_hand(meta, episode, 5, k, start)
        np.testing.assert_allclose(loss, value, rtol=1e-12)
        assert worlds.relative_distance(grads, expected) < 1e-12
        assert aux.metrics["inner_loss"].shape == (5,)
        np.testing.assert_allclose(
            aux.metrics["inner_loss"], _inner.unroll(one.problem, meta, episode.support).losses.values, rtol=1e-12
        )
        assert float(jnp.abs(grads["start"]).max()) > 0 or start == "constant"


def test_the_bias_vanishes_with_more_steps(x64):
    (one, meta), episode = curved(12), task(0)
    _, exact = gradient(one, hypergrad.unrolled(), meta, episode)
    for start in ("identity", "constant"):
        errors = [
            worlds.relative_distance(gradient(one, hypergrad.truncated(k, start=start), meta, episode)[1], exact)
            for k in (1, 4, 11)
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.1 * errors[0]


def test_step_weights(x64):
    (one, meta), episode, weights = curved(), task(0), (0.0, 0.0, 0.2, 0.3, 0.5)
    (loss, _), grads = gradient(one, hypergrad.truncated(3, step_weights=weights), meta, episode)
    value, expected = truncated_by_hand(meta, episode, 5, 3, "identity", weights)
    np.testing.assert_allclose(loss, value, rtol=1e-12)
    assert worlds.relative_distance(grads, expected) < 1e-12


def test_a_start_alone_is_not_silently_zero(x64):
    row = worlds.LEARNERS["maml"]
    params, episode = worlds.parameters(row), worlds.episode(row)
    constant = hypergrad.truncated(1, start="constant")
    fn = hypergrad.value_and_grad(row.learner, constant)
    with pytest.raises(ValueError, match=r'start must be "identity" .* hypergradient of truncated\(1\) would be zero'):
        jax.eval_shape(fn, params, episode)
    # ANIL: the body is read by the last steps, the head is the start and nothing else
    row = worlds.LEARNERS["anil"]
    _, grads = gradient(row.learner, constant, params, episode)
    assert float(jnp.abs(grads["layer_0"]["kernel"]).max()) > 1e-3
    assert worlds.dot(grads["head"], grads["head"]) == 0
    _, grads = gradient(row.learner, hypergrad.truncated(1), params, episode)
    assert worlds.dot(grads["head"], grads["head"]) > 1e-3


def test_memory_does_not_grow_with_the_number_of_steps():
    size = 4096
    meta = {"start": jnp.zeros(size), "target": jnp.ones(size), "rate": jnp.array(0.1)}
    part = metajax.Examples(jnp.ones(size), jnp.ones(size), jnp.ones(size, bool))

    def temporaries(num_steps):
        fn = jax.jit(hypergrad.value_and_grad(quadratic(num_steps), hypergrad.truncated(2)))
        return worlds.temporary_bytes(fn, meta, metajax.Episode(part, part))

    assert abs(temporaries(64) - temporaries(8)) < 4 * size  # less than one copy of the fast weights


@pytest.mark.parametrize("when", ["truncated", "differentiated"])
def test_nan_in_an_inner_step_is_not_hidden(when, x64):
    at = 0 if when == "truncated" else 3
    problem = quadratic(4).problem
    spoiled = problem._replace(
        loss=lambda params, meta, support, step, key: (
            problem.loss(params, meta, support, step, key) * jnp.where(step == at, jnp.nan, 1.0)
        )
    )
    (loss, _), grads = gradient(learner(spoiled), hypergrad.truncated(2), as_float64(META), task(0))
    assert np.isnan(loss)
    assert np.isnan(grads["target"]).all()


def test_a_learner_without_inner_problem_is_differentiated_directly(x64):
    row = worlds.LEARNERS["prototypical"]
    params, episode = worlds.parameters(row), worlds.episode(row)
    _, grads = gradient(row.learner, hypergrad.truncated(2, start="constant"), params, episode)
    assert worlds.relative_distance(grads, worlds.compiled("prototypical", "unrolled")(params, episode)[1]) < 1e-12


@pytest.mark.parametrize("estimator", [hypergrad.truncated(1), hypergrad.persistent_truncation(1)])
def test_inner_rules_and_loops_that_are_refused(estimator, x64):
    def trace(one):
        jax.eval_shape(worlds.first_step(one, estimator), as_float64(META), task(0))

    with pytest.raises(ValueError, match="eps_root"):
        trace(quadratic(2, lambda meta: optax.adam(meta["rate"])))
    with pytest.raises(ValueError, match="num_steps must be an integer of at least 1, got 0"):
        trace(quadratic(0))


# Truncation with carried state, on the quadratic: a segment is x -> a^k x + (1 - a^k) target with a = 1 - rate c.


def segment_by_hand(meta, x, goal, k, passes_start):
    a = 1 - meta["rate"] * CURVATURE
    end = a**k * x + (1 - a**k) * meta["target"]
    away = end - goal
    return end, 0.5 * np.sum(away**2), {
        "start": a**k * away if passes_start else np.zeros(3),
        "target": (1 - a**k) * away,
        "rate": np.sum(-k * CURVATURE * a ** (k - 1) * (x - meta["target"]) * away),
    }  # fmt: skip


class ByHand:
    """Tasks, their places in a batch, and an outer SGD step."""

    def __init__(self, k, num_steps, start, rate, reset=True, fresh_data=False):
        self.k, self.num_steps, self.start, self.rate, self.reset, self.fresh_data = (
            k,
            num_steps,
            start,
            rate,
            reset,
            fresh_data,
        )
        self.meta = {name: np.asarray(leaf, np.float64) for name, leaf in META.items()}
        self.places = [None] * 2  # (x, goal, steps taken)

    def step(self, tasks):
        losses, grads = [], []
        for place, episode in enumerate(tasks):
            goal = np.asarray(episode.query.targets)
            state = self.places[place]
            restart = state is None or (self.reset and state[2] >= self.num_steps)
            x, kept, taken = (self.meta["start"], goal, 0) if restart else state
            goal = goal if self.fresh_data else kept
            end, loss, grad = segment_by_hand(self.meta, x, goal, self.k, restart or self.start == "identity")
            self.places[place] = (end, goal, taken + self.k)
            losses.append(loss)
            grads.append(grad)
        mean = jax.tree.map(lambda *parts: sum(parts) / len(parts), *grads)
        self.meta = jax.tree.map(lambda leaf, grad: leaf - self.rate * grad, self.meta, mean)
        return np.mean(losses)


@pytest.mark.parametrize(
    ("batching", "options"),
    [
        ("vmap", {}), ("scan", {"start": "constant"}), ("vmap", {"reset": False}), ("scan", {"fresh_data": True}),
    ],
)  # fmt: skip
def test_carried_state_through_outer_update(batching, options, x64):
    """Six outer steps of two tasks, four inner steps each, against a loop in NumPy."""
    by_hand = ByHand(2, 4, options.get("start", "identity"), 0.5, options.get("reset", True), "fresh_data" in options)
    estimator = hypergrad.persistent_truncation(2, **options)
    outer = metajax.outer_update(
        quadratic(4), optax.sgd(0.5), hypergrad=estimator, task_batching=batching, before=False
    )
    state = outer.init(jax.random.key(0), task(99), params=as_float64(META), num_tasks=2)
    assert state.hypergrad_state.inner.params.shape == (2, 3)
    update, types = jax.jit(outer.update), jax.tree.map(jax.typeof, state)
    for number in range(6):
        tasks = [task(10 * number + place) for place in range(2)]
        state, metrics = update(state, worlds.stack(tasks))
        loss = by_hand.step(tasks)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-12)
        assert metrics["inner_loss"].shape == (2,)
        assert worlds.relative_distance(state.params, by_hand.meta) < 1e-12
        carried = state.hypergrad_state
        np.testing.assert_allclose(carried.inner.params, [place[0] for place in by_hand.places], rtol=1e-12)
        assert carried.inner.step.tolist() == [place[2] for place in by_hand.places]
        if "fresh_data" in options:
            assert carried.episode == ()
        else:
            np.testing.assert_array_equal(carried.episode.query.targets, [place[1] for place in by_hand.places])
    assert jax.tree.map(jax.typeof, state) == types  # so that nothing is compiled again
    assert update._cache_size() == 1


def test_carried_state_over_devices(x64):
    """Each device keeps the states of its own tasks."""
    batches = [worlds.stack([task(10 * number + place) for place in range(2)]) for number in range(3)]

    def run(devices):
        outer = metajax.outer_update(
            quadratic(4), optax.sgd(0.5), hypergrad=hypergrad.persistent_truncation(2), before=False,
        )  # fmt: skip
        if devices > 1:
            outer = metajax.parallel.shard(outer, metajax.parallel.make_mesh(devices=jax.devices()[:devices]))
        state = outer.init(jax.random.key(0), task(99), params=as_float64(META), num_tasks=2)
        update = jax.jit(outer.update)
        for batch in batches:
            state, _ = update(state, batch)
        return state.params, state.hypergrad_state.inner.params

    assert worlds.relative_distance(run(2), run(1)) < 1e-12


def test_one_segment_is_the_whole_loop(x64):
    """With k = num_steps each outer step starts anew: exact, whatever the start."""
    row = worlds.LEARNERS["maml"]
    params, episode = worlds.parameters(row), worlds.episode(row)
    expected = worlds.compiled("maml", "unrolled")(params, episode)[1]
    step = jax.jit(worlds.first_step(row.learner, hypergrad.persistent_truncation(2, start="constant")))
    _, grads = step(params, episode)
    assert worlds.relative_distance(grads, expected) < 1e-12


def test_nan_lasts_until_the_next_start(x64):
    estimator, meta, episode = hypergrad.persistent_truncation(2), as_float64(META), task(0)
    one = quadratic(4)
    fn = jax.jit(lambda state, episode: estimator.value_and_grad(one, meta, state, episode))
    state = estimator.init(one, meta, episode, None)
    state = state._replace(started=jnp.array(True), inner=state.inner._replace(params=jnp.full(3, jnp.nan)))
    seen = []
    for _ in range(3):
        ((loss, _), grads, state) = fn(state, episode)
        assert np.isnan(loss) == np.isnan(grads["start"]).all() == np.isnan(grads["rate"])
        seen.append(bool(np.isnan(loss)))
    assert seen == [True, True, False]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: hypergrad.truncated(0), "k must be an integer of at least 1, got 0"),
        (lambda: hypergrad.truncated(1, start="zero"), "start must be one of 'identity', 'constant', got 'zero'"),
        (lambda: hypergrad.truncated(1, step_weights=(0.5, 0.5)), "step_weights must be 0 before the last 1 inner"),
        (lambda: hypergrad.truncated(2, step_weights=(0.0, -1.0)), "a weight of step_weights must be"),
        (lambda: hypergrad.persistent_truncation(True), "k must be an integer of at least 1, got True"),
        (lambda: hypergrad.persistent_truncation(1, start=1), "start must be one of"),
    ],
)
def test_bad_arguments(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_another_number_of_tasks_than_of_states_is_refused(x64):
    outer = metajax.outer_update(quadratic(4), optax.sgd(0.5), hypergrad=hypergrad.persistent_truncation(2))
    state = outer.init(jax.random.key(0), task(0), params=as_float64(META), num_tasks=2)
    with pytest.raises(ValueError, match="got 3 tasks and 2 states"):
        outer.update(state, worlds.stack([task(seed) for seed in range(3)]))


def test_what_persistent_truncation_refuses(x64):
    def trace(one, estimator, params, episode):
        jax.eval_shape(worlds.first_step(one, estimator), params, episode)

    meta, episode = as_float64(META), task(0)
    for num_steps in (1, 5):
        with pytest.raises(ValueError, match=f"k must divide the number of inner steps {num_steps}, got 2"):
            trace(quadratic(num_steps), hypergrad.persistent_truncation(2), meta, episode)
    trace(quadratic(5), hypergrad.persistent_truncation(2, reset=False), meta, episode)
    row = worlds.LEARNERS["prototypical"]
    with pytest.raises(ValueError, match=r"persistent_truncation\(1\) needs a learner with an inner problem"):
        trace(row.learner, hypergrad.persistent_truncation(1), worlds.parameters(row), worlds.episode(row))
    row = worlds.LEARNERS["maml"]
    with pytest.raises(ValueError, match=r"hypergradient of persistent_truncation\(1\) would be zero"):
        trace(
            row.learner, hypergrad.persistent_truncation(1, start="constant"), worlds.parameters(row),
            worlds.episode(row),
        )  # fmt: skip
