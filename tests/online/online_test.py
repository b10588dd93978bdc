"""Online strategies on streams: what they remember, what they lose, what they refuse."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax import learners
from metajax.online import character_stream, cumulative_regret, follow_the_meta_leader, recent, run_online

# one weight, y = w x, squared error: every number can be worked by hand
LINE = metajax.Model(lambda key, x: jnp.zeros([1, 1]), lambda w, x: x @ w)
LEARNER = metajax.learners.maml(LINE, optax.sgd(0.25), loss=metajax.core.squared_error)
OUTER = metajax.outer_update(LEARNER, optax.sgd(0.5), hypergrad=metajax.hypergrad.mixed_mode(), before=False)
KEY = jax.random.key(0)


def point(slope, x=1.0):
    return metajax.Examples(jnp.array([[x]]), jnp.array([[slope * x]]), jnp.ones(1, bool))


def task(slope):
    return metajax.Episode(point(slope), point(slope))


def test_a_window_adapts_to_the_last_steps_alone():
    """After slopes 1, 2, 4 the window of two holds 2 and 4: w = 0 - 0.25 * mean of (-4, -8) = 1.5."""
    online = recent(LEARNER, window=2)
    state = online.init(KEY, point(0.0), jnp.zeros([1, 1]))
    losses = []
    for slope in (1.0, 2.0, 4.0):
        losses.append(float(online.loss(state, point(slope))))
        state = online.observe(state, point(slope))
    # w before each: 0, 0.5 (one step kept, the padding weighs nothing), 0.75
    np.testing.assert_allclose(losses, [1.0, 1.5**2, 3.25**2])
    np.testing.assert_allclose(online.adapt(state).params, [[1.5]])
    np.testing.assert_array_equal(state.support.targets[:, 0], [2, 4])
    assert online.update(state) == (state, {})


def test_a_window_runs_under_scan_as_step_by_step():
    online = recent(LEARNER, window=3)
    slopes = [1.0, -2.0, 3.0, 0.5, 0.5, 2.0]
    items = [point(slope) for slope in slopes]
    state = online.init(KEY, items[0])
    _, losses = run_online(online, state, items, steps=len(items))

    def step(state, item):
        return online.update(online.observe(state, item))[0], online.loss(state, item)

    _, scanned = jax.lax.scan(step, state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *items))
    np.testing.assert_allclose(losses, scanned, rtol=1e-6)


def test_the_leader_takes_the_meta_step_that_numpy_takes():
    """One task of slope s: w' = w + 0.5 (s - w), loss (s - w')^2 = 0.25 (s - w)^2, gradient -0.5 (s - w)."""
    online = follow_the_meta_leader(LEARNER, OUTER, capacity=4, meta_batch=2, meta_steps=3)
    state = online.init(KEY, task(0.0), jnp.zeros([1, 1]))
    assert float(online.loss(state, task(2.0))) == pytest.approx(1.0)
    np.testing.assert_allclose(online.adapt(state, point(2.0)).params, [[1.0]])
    state, metrics = online.update(online.observe(state, task(2.0)))
    weight = 0.0
    for _ in range(3):
        last = 0.25 * (2 - weight) ** 2
        weight += 0.5 * 0.5 * (2 - weight)
    np.testing.assert_allclose(state.meta.params, [[weight]], rtol=1e-6)
    assert float(metrics["loss"]) == pytest.approx(last)
    assert int(state.meta.step) == 3


def test_an_empty_buffer_teaches_nothing():
    online = follow_the_meta_leader(LEARNER, OUTER, capacity=4)
    state = online.init(KEY, task(5.0), jnp.ones([1, 1]))
    state, metrics = online.update(state)
    np.testing.assert_array_equal(state.meta.params, 1.0)
    assert float(metrics["loss"]) == 0


def test_the_latest_tasks_take_turns_and_a_sample_is_uniform():
    def kept(keep, key):
        online = follow_the_meta_leader(LEARNER, OUTER, capacity=4, keep=keep)
        items = jax.vmap(task)(jnp.arange(12.0))
        state = jax.lax.scan(lambda s, item: (online.observe(s, item), None), online.init(key, task(0.0)), items)[0]
        return state.tasks.support.targets[:, 0, 0]

    np.testing.assert_array_equal(kept("latest", KEY), [8, 9, 10, 11])
    samples = jax.jit(jax.vmap(lambda key: kept("sample", key)))(jax.random.split(KEY, 3000))
    assert all(len(set(line)) == 4 for line in np.asarray(samples)[:50].tolist())
    share = np.bincount(np.asarray(samples, int).ravel(), minlength=12) / 3000
    # each of the 12 tasks is kept with probability 1/3; a standard deviation is 0.0086
    np.testing.assert_allclose(share, 1 / 3, atol=0.035)


def test_a_buffer_draws_only_what_is_filled():
    """With a capacity of 1000 and 2 tasks seen, every meta step is on those two."""
    online = follow_the_meta_leader(LEARNER, OUTER, capacity=1000, meta_batch=8)
    state = online.init(KEY, task(0.0), jnp.zeros([1, 1]))
    state = online.observe(online.observe(state, task(2.0)), task(2.0))
    state, metrics = online.update(state)
    np.testing.assert_allclose(state.meta.params, [[0.5]], rtol=1e-6)
    assert float(metrics["loss"]) == pytest.approx(1.0)


def test_regret_stops_to_grow_once_the_leader_is_where_the_tasks_are():
    """Slopes around 3: the start loses 0.25 * 9 in each round, a leader at 3 only what the slopes scatter."""
    slopes = 3 + 0.1 * np.random.default_rng(0).normal(size=40)
    items = [task(slope) for slope in slopes]
    online = follow_the_meta_leader(LEARNER, OUTER, capacity=16)
    state = online.init(KEY, items[0], jnp.zeros([1, 1]))
    _, losses = run_online(online, state, items, steps=40)
    _, fixed = run_online(online._replace(update=lambda state: (state, {})), state, items, steps=40)
    np.testing.assert_allclose(fixed, 0.25 * slopes**2, rtol=1e-5)
    regret = cumulative_regret(losses, 0.25 * (slopes - slopes.mean()) ** 2)
    assert regret[19] > 2
    assert abs(regret[39] - regret[19]) < 0.02


def test_a_recurrent_state_reads_in_order_and_no_padding():
    learner = learners.recurrent(metajax.models.mlp(2, hidden=(8,)), 2, hidden=6)
    rng = np.random.default_rng(0)
    support = metajax.Examples(
        jnp.array(rng.normal(size=(4, 3)), jnp.float32), jnp.array(rng.normal(size=(4, 2)), jnp.float32),
        jnp.array([True, True, False, True]),
    )  # fmt: skip
    params = learner.init(KEY, support.inputs)
    memory = learner.adapt(params, support).hidden
    short = jax.tree.map(lambda leaf: leaf[jnp.array([0, 1, 3])], support)
    np.testing.assert_allclose(memory, learner.adapt(params, short).hidden, rtol=1e-6)
    dirty = support._replace(inputs=support.inputs.at[2].set(jnp.nan), targets=support.targets.at[2].set(jnp.nan))
    np.testing.assert_allclose(memory, learner.adapt(params, dirty).hidden, rtol=1e-6)
    other = learner.adapt(params, jax.tree.map(lambda leaf: leaf[::-1], support)).hidden
    assert np.abs(memory - other).max() > 1e-3
    nothing = learner.adapt(params, support._replace(mask=jnp.zeros(4, bool)))
    np.testing.assert_array_equal(nothing.hidden, 0)


def test_a_recurrent_state_is_that_of_the_unit_in_numpy():
    learner = learners.recurrent(metajax.Model(lambda key, x: (), lambda params, x: x[:, 2:]), 1, hidden=3)
    support = metajax.Examples(jnp.array([[0.5, -1.0], [2.0, 0.3]]), jnp.array([[1.0], [-2.0]]), jnp.ones(2, bool))
    params = learner.init(KEY, support.inputs)
    cell = jax.tree.map(np.asarray, params["cell"]["cell"])

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    hidden = np.zeros(3)
    for row in np.concatenate([support.inputs, support.targets], axis=1):
        inner = row @ cell["dense_i"]["kernel"] + cell["dense_i"]["bias"]
        outer = hidden @ cell["dense_h"]["kernel"]
        reset, keep = sigmoid(inner[:3] + outer[:3]), sigmoid(inner[3:6] + outer[3:6])
        hidden = (1 - keep) * np.tanh(inner[6:] + reset * outer[6:]) + keep * hidden
    found = learner.predict(learner.adapt(params, support), support.inputs)
    np.testing.assert_allclose(found, np.tile(hidden, (2, 1)), atol=1e-6)


@pytest.mark.slow
def test_a_recurrent_learner_learns_to_adapt():
    """Lines through the origin: the slope stands in the support set alone."""
    learner = learners.recurrent(metajax.models.mlp(1, hidden=(32,)), 1, hidden=16)
    outer = metajax.outer_update(
        learner, optax.adam(5e-3), hypergrad=metajax.hypergrad.unrolled(), task_batching="vmap"
    )
    rng = np.random.default_rng(0)

    def batch():
        slopes, x = rng.uniform(-2, 2, (32, 1, 1)), rng.uniform(-1, 1, (32, 8, 1)).astype(np.float32)
        examples = metajax.Examples(x, (slopes * x).astype(np.float32), np.ones((32, 8), bool))
        return metajax.Episode(
            support=jax.tree.map(lambda leaf: leaf[:, :4], examples),
            query=jax.tree.map(lambda leaf: leaf[:, 4:], examples),
        )

    state = outer.init(KEY, jax.tree.map(lambda leaf: leaf[0], batch()))
    update = jax.jit(outer.update)
    losses = []
    for _ in range(400):
        state, metrics = update(state, batch())
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-20:]) < 0.2 * np.mean(losses[:20])


@pytest.mark.slow
def test_class_labels_are_read_as_one_of_many():
    learner = learners.recurrent(metajax.models.mlp(3), 3, loss=metajax.core.cross_entropy)
    support = metajax.Examples(jnp.eye(3), jnp.arange(3), jnp.ones(3, bool))
    params = learner.init(KEY, support.inputs)
    found, aux = learner.outer_loss(learner.adapt(params, support), params, support)
    assert aux.outputs.shape == (3, 3)
    assert 0 < float(found) < 5


def test_a_stream_that_ends_early_is_told():
    online = recent(LEARNER, window=2)
    state = online.init(KEY, point(0.0))
    with pytest.raises(ValueError, match="stream must last for 5 steps, got 3"):
        run_online(online, state, [point(1.0)] * 3, steps=5)
    with pytest.raises(ValueError, match="stream must last for 1 steps, got 0"):
        run_online(online, state, [], steps=1)


def test_a_stream_gives_no_item_too_many():
    taken = iter(range(10))
    online = recent(LEARNER, window=2)
    run_online(online, online.init(KEY, point(0.0)), (point(float(number)) for number in taken), steps=4)
    assert next(taken) == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recent(LEARNER, window=0), "window must be an integer of at least 1, got 0"),
        (lambda: recent("maml", window=1), "learner must be of type Learner, got 'maml'"),
        (
            lambda: follow_the_meta_leader(LEARNER, OUTER, capacity=0),
            "capacity must be an integer of at",
        ),
        (lambda: follow_the_meta_leader(LEARNER, OUTER, capacity=1, meta_batch=0), "meta_batch must be"),
        (lambda: follow_the_meta_leader(LEARNER, OUTER, capacity=1, meta_steps=0), "meta_steps must be"),
        (
            lambda: follow_the_meta_leader(LEARNER, OUTER, capacity=1, keep="best"),
            "keep must be one of 'sample', 'latest', got 'best'",
        ),
        (lambda: follow_the_meta_leader(LEARNER, None, capacity=1), "outer must be of type OuterUpdate"),
        (lambda: learners.recurrent(LINE, 0), "outputs must be an integer of at least 1, got 0"),
        (lambda: learners.recurrent(LINE, 1, hidden=0), "hidden must be an integer of at least 1, got 0"),
        (lambda: learners.recurrent(None, 1), "model must be of type Model"),
        (lambda: run_online(None, (), [], steps=1), "online must be of type Online"),
        (
            lambda: run_online(recent(LEARNER, window=1), (), [], steps=0),
            "steps must be an",
        ),
        (
            lambda: recent(LEARNER, window=1).init(KEY, point(0.0)._replace(class_mask=jnp.ones(2, bool))),
            "class_mask must be None for items of a stream of steps",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_permuted_stream_keeps_its_letters_and_a_drift_turns_them():
    source = metajax.data.glyphs("val", size=14)
    calm = list(itertools.islice(character_stream(source, seed=3, ways=3, shots=2, queries=4), 3))
    assert calm[0].support.inputs.shape == (6, 14, 14, 1)
    np.testing.assert_array_equal(calm[0].query.targets, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    assert not np.array_equal(calm[0].support.inputs, calm[1].support.inputs)
    turning = list(itertools.islice(character_stream(source, seed=3, ways=3, shots=2, queries=4, turn=90), 3))
    np.testing.assert_allclose(turning[0].query.inputs, calm[0].query.inputs)
    np.testing.assert_allclose(turning[1].query.inputs, np.rot90(calm[1].query.inputs, axes=(1, 2)), atol=0.01)
    np.testing.assert_allclose(turning[2].query.inputs, np.rot90(calm[2].query.inputs, 2, axes=(1, 2)), atol=0.01)


def letters_of(rounds, source):
    """The class of each label in each round, found by the image itself."""
    images = {image.tobytes(): label for image, label in zip(source.inputs, source.labels, strict=True)}
    inputs = [np.round(255 * one.support.inputs).astype(np.uint8) for one in rounds]
    return np.array([[images[image.tobytes()] for image in support] for support in inputs])


def test_labels_switch_at_the_hazard_and_within_the_pool():
    source = metajax.data.glyphs("val", size=14)
    rounds = list(itertools.islice(character_stream(source, seed=1, ways=4, hazard=0.2, pool=4), 200))
    letters = letters_of(rounds, source)
    assert len(np.unique(letters)) == 4
    switches = np.any(letters[1:] != letters[:-1], axis=1).mean()
    assert 0.1 < switches < 0.3  # a permutation may also come again; 0.2 within 3 standard deviations
    never = letters_of(itertools.islice(character_stream(source, seed=1, ways=4), 20), source)
    assert len(np.unique(never, axis=0)) == 1
    always = letters_of(itertools.islice(character_stream(source, seed=1, ways=4, hazard=1), 20), source)
    assert len(np.unique(always, axis=0)) == 20


def test_a_round_is_a_function_of_its_number():
    source = metajax.data.glyphs("val", size=14)
    whole = list(itertools.islice(character_stream(source, seed=5, turn=7, hazard=0.5), 6))
    rest = list(itertools.islice(character_stream(source, seed=5, turn=7, hazard=0.5, first=4), 2))
    jax.tree.map(np.testing.assert_array_equal, whole[4:], rest)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"ways": 0}, "ways must be an integer of at least 1, got 0"),
        ({"shots": 0}, "shots must be an integer of at least 1, got 0"),
        ({"queries": 0}, "queries must be an integer of at least 1, got 0"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"first": -1}, "first must be an integer of at least 0, got -1"),
        ({"pool": 4}, "pool must be an integer of at least 5, got 4"),
        ({"pool": 10_000}, "ways and pool must be at most"),
        ({"queries": 10_000}, "queries must be at most .*, the images of a class, got 10001"),
        ({"hazard": 1.5}, "hazard must be a number from 0 to 1, got 1.5"),
        ({"hazard": -0.5}, "hazard must be a number from 0 to 1, got -0.5"),
        ({"turn": float("inf")}, "turn must be a finite number of degrees, got inf"),
    ],
)
def test_bad_streams_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        character_stream(metajax.data.glyphs("val", size=14), **{"seed": 0, **keywords})
