"""Replay in meta-training and in adaptation: against steps on what was joined by hand, and across checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import states
import worlds

import metajax
from metajax import Episode, Examples, hypergrad, replay
from metajax.replay import Experience, Sample

_KEY = jax.random.key(0)


def _scale():
    """The network `w * x`, from w = 0."""
    return metajax.Model(lambda key, x: jnp.float32(0), lambda w, x: w * x)


def _points(x, y, mask=None):
    x, y = np.asarray(x, np.float32)[:, None], np.asarray(y, np.float32)[:, None]
    return Examples(x, y, np.ones(len(x), bool) if mask is None else np.asarray(mask))


def _batch(*tasks):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(Episode(support, query) for support, query in tasks))


def _outer(batch_size=None, num_steps=1):
    learner = metajax.learners.reptile(
        _scale(), optax.sgd(0.1), num_steps, batch_size=batch_size, loss=metajax.core.squared_error
    )
    return metajax.outer_update(learner, optax.sgd(0.5), hypergrad=hypergrad.displacement())


def _task(x, y):
    return _points([x], [y]), _points([x], [y])


# --- adaptation


def test_a_learner_adapts_to_joined_examples_as_to_one_support_set():
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(9, 3)).astype(np.float32), np.array([0, 1, 0, 1, 2, 2, 1, 0, 2], np.int32)
    memory = replay.reservoir(6)
    earlier = Experience(inputs[4:], targets[4:])
    held = memory.init(Experience(inputs[0], targets[0]))
    held = replay.remember(memory, held, earlier, key=_KEY)
    here = np.array([True, True, False])
    support = Examples(inputs[:4], targets[:4], np.array([True, True, True, False]), here)
    joined = replay.with_experience(support, memory.sample(held, 6, key=_KEY))
    assert joined.mask.tolist() == [True, True, True, False] + [True] * 5 + [False]
    assert joined.class_mask.tolist() == [True] * 3
    learner = metajax.learners.maml(metajax.models.mlp(3, hidden=(4,)), optax.sgd(0.1), 3)
    params = learner.init(_KEY, inputs)
    whole = Examples(
        inputs[[0, 1, 2, *range(4, 9)]], targets[[0, 1, 2, *range(4, 9)]], np.ones(8, bool), np.ones(3, bool)
    )
    predict = jax.jit(lambda examples: learner.predict(learner.adapt(params, examples), inputs))
    ours, theirs = predict(joined), predict(whole)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_classes_of_padding_and_classes_beyond_the_mask_stay_out():
    support = Examples(jnp.zeros([1, 1]), jnp.array([0]), jnp.ones(1, bool), jnp.array([True, False, False]))
    old = Sample(Experience(jnp.ones([4, 1]), jnp.array([1, 2, 3, -1])), jnp.array([1.0, 0.0, 1.0, 1.0]), jnp.arange(4))
    joined = replay.with_experience(support, old)
    assert joined.mask.tolist() == [True, True, False, False, True]
    assert joined.class_mask.tolist() == [True, True, False]
    assert replay.with_experience(support._replace(class_mask=None), old).mask.tolist() == [
        True, True, False, True, True,
    ]  # fmt: skip


def test_an_example_counts_as_often_as_its_weight_says():
    weights = jnp.array([0.0, 0.3, 1.0])
    drawn = Sample(Experience(jnp.zeros([3, 1]), jnp.zeros([3, 1])), weights, jnp.arange(3))
    support = _points([1], [1])
    counts = jax.vmap(lambda key: replay.with_experience(support, drawn, key=key).mask)(jax.random.split(_KEY, 2000))
    share = np.mean(np.asarray(counts), axis=0)
    assert share[[0, 1, 3]].tolist() == [1, 0, 1]
    assert abs(share[2] - 0.3) < 3 * np.sqrt(0.3 * 0.7 / 2000)


# --- meta-training


def test_meta_experience_replay_by_hand():
    outer = replay.replayed(_outer(), replay.reservoir(1), 1, what="examples")
    state = outer.init(_KEY, Episode(*_task(1, 2)))
    update = jax.jit(outer.update)
    # at w = 0 the gradient of (w - 2)^2 is -4: w_T = 0.4, and w moves half of the way
    state, metrics = update(state, _batch(_task(1, 2)))
    np.testing.assert_allclose(state.params, 0.2, rtol=1e-6)
    assert metrics["replayed"] == 0
    # (2 w - 2)^2 and, remembered, (w - 2)^2: gradients -6.4 and -3.6, mean -5, w_T = 0.7
    state, metrics = update(state, _batch(_task(2, 2)))
    np.testing.assert_allclose(state.params, 0.45, rtol=1e-6)
    assert metrics["replayed"] == 1


def test_remembered_tasks_are_tasks_of_the_step():
    first, second = _batch(_task(1, 2), _task(2, -1)), _batch(_task(3, 1), _task(1, 1))
    plain = _outer()
    outer = replay.replayed(plain, replay.reservoir(2), 2)
    start = Episode(*_task(1, 2))
    state, reference = outer.init(_KEY, start), plain.init(_KEY, start)
    state, metrics = outer.update(state, first)  # not compiled: the memory is known to be empty
    reference, expected = jax.jit(plain.update)(reference, first)
    np.testing.assert_allclose(state.params, reference.params, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    state, metrics = jax.jit(outer.update)(state, second)
    joined = jax.tree.map(lambda new, old: np.concatenate([new, old]), second, first)
    reference, expected = jax.jit(plain.update)(reference, joined)
    np.testing.assert_allclose(state.params, reference.params, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    assert metrics["replayed"] == 2
    assert int(state.step) == 2


@pytest.mark.parametrize("what", ["tasks", "examples"])
def test_padding_is_not_remembered(what):
    empty = _points([9, 9], [9, 9], [False, False])
    half = _points([1, 9], [2, 9], [True, False])
    memory = replay.reservoir(8)
    outer = replay.replayed(_outer(), memory, 3, what=what)
    state = outer.init(_KEY, Episode(half, half))
    state, _ = jax.jit(outer.update)(state, _batch((half, half), (empty, empty)))
    held = state.hypergrad_state.memory
    assert int(memory.size(held)) == 1
    inputs = held.items.support.inputs if what == "tasks" else held.items.inputs
    assert np.asarray(inputs)[0, 0].reshape(-1)[0] == 1


def test_priorities_are_those_of_the_parameters_after_the_step():
    memory = replay.prioritised(4, exponent=1.0, correction=0.0, floor=1e-6)

    def losses(params, items):
        return jnp.square(params * items.inputs[:, 0] - items.targets[:, 0])

    outer = replay.replayed(_outer(), memory, 2, what="examples", priority=losses)
    update = jax.jit(outer.update)
    state, _ = update(outer.init(_KEY, Episode(*_task(1, 2))), _batch(_task(1, 2)))
    state, metrics = update(state, _batch(_task(2, 2)))
    # the one example that was there is drawn twice: gradients -6.4, -3.6, -3.6, w = 0.2 + 0.05 * 13.6 / 3
    assert metrics["replayed"] == 2
    w = 0.2 + 0.05 * 13.6 / 3
    np.testing.assert_allclose(state.params, w, rtol=1e-6)
    # its loss now, 2.48, and for the new one the highest so far, rounded up
    np.testing.assert_allclose(
        state.hypergrad_state.memory.sum_tree_state.nodes[3:], [(w - 2) ** 2, 3, 0, 0], rtol=1e-5
    )


def test_tasks_of_a_balanced_memory_and_a_learner_that_adapts_in_one_pass():
    """Prototypes, and one reservoir for each kind of task."""
    identity = metajax.Model(lambda key, x: jnp.ones(3), lambda scales, x: scales * x)
    learner = metajax.learners.prototypical(identity)
    plain = metajax.outer_update(learner, optax.sgd(0.1), hypergrad=hypergrad.unrolled())
    memory = replay.balanced(2, 1, lambda episode: episode.query.inputs[0, 0] > 0)
    outer = replay.replayed(plain, memory, 2)
    rng = np.random.default_rng(0)

    def episode(sign):
        inputs = sign * np.abs(rng.normal(size=(4, 3))).astype(np.float32)
        examples = Examples(inputs, np.array([0, 1, 0, 1], np.int32), np.ones(4, bool), np.ones(2, bool))
        return examples, examples

    one, other, third = episode(1), episode(-1), episode(1)
    state, reference = (each.init(_KEY, Episode(*one)) for each in (outer, plain))
    for number, (batch, everything) in enumerate([
        (_batch(one, other), _batch(one, other)), (_batch(third), _batch(third, one, other)),
    ]):  # fmt: skip
        state, metrics = jax.jit(outer.update)(state, batch)
        reference, expected = jax.jit(plain.update)(reference, everything)
        assert metrics["replayed"] == 2 * number
        np.testing.assert_allclose(state.params, reference.params, rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=1e-4)


def _memories():
    priority = {"priority": lambda params, items: jnp.abs(items.targets[:, 0])}
    return {
        "reservoir": (replay.reservoir(5), {}),
        "prioritised": (replay.prioritised(5), priority),
    }


def _stream(count):
    rng = np.random.default_rng(1)
    for _ in range(count):
        yield _batch(*((_points(*rng.normal(size=(2, 3))), _points(*rng.normal(size=(2, 2)))) for _ in range(2)))


@pytest.mark.parametrize(
    "kind", worlds.few_by_default(["reservoir", "prioritised"], lambda kind: kind == "prioritised")
)
def test_a_run_with_its_memory_goes_on_from_a_checkpoint_to_the_same_bits(kind, tmp_path):
    memory, options = _memories()[kind]
    outer = replay.replayed(_outer(batch_size=2, num_steps=3), memory, 3, what="examples", **options)
    batches = list(_stream(6))
    start = jax.tree.map(lambda leaf: leaf[0], batches[0])
    update = jax.jit(outer.update)
    state = outer.init(_KEY, start)
    for batch in batches[:3]:
        state, _ = update(state, batch)
    checkpoints = metajax.training.Checkpoints(tmp_path)
    checkpoints.save(3, state, {})
    for batch in batches[3:]:
        state, _ = update(state, batch)
    assert update._cache_size() == 1
    restored, _ = checkpoints.restore(jax.eval_shape(outer.init, _KEY, start))
    checkpoints.close()
    assert int(memory.size(restored.hypergrad_state.memory)) == memory.capacity
    resumed = metajax.training.fit(outer, restored, batches[3:], steps=6)
    states.assert_same(resumed, state)


def test_other_keys_and_steps_draw_others():
    outer = replay.replayed(_outer(), replay.reservoir(20), 2, what="examples")
    batches = list(_stream(8))
    init, update = jax.jit(outer.init), jax.jit(outer.update)
    found = []
    for seed in (0, 0, 1):
        state = init(jax.random.key(seed), jax.tree.map(lambda leaf: leaf[0], batches[0]))
        for batch in batches:
            state, _ = update(state, batch)
        found.append(float(state.params))
    assert found[0] == found[1] != found[2]


@pytest.mark.slow  # a mesh; the meta step itself is compared over meshes in tests/parallel
def test_over_devices_as_on_one():
    learner = metajax.learners.maml(metajax.models.mlp(1), optax.sgd(0.1), loss=metajax.core.squared_error)
    plain = metajax.outer_update(learner, optax.sgd(0.1), hypergrad=hypergrad.first_order())
    rng = np.random.default_rng(0)
    batches = [_batch(*([_points(*rng.normal(size=(2, 3)))] * 2 for _ in range(8))) for _ in range(3)]
    found = []
    for spread in (False, True):
        outer = metajax.parallel.shard(plain, metajax.parallel.make_mesh()) if spread else plain
        outer = replay.replayed(outer, replay.reservoir(12), 8)
        state = outer.init(_KEY, jax.tree.map(lambda leaf: leaf[0], batches[0]))
        for batch in batches:
            state, metrics = jax.jit(outer.update)(state, batch)
        found.append((metrics["loss"], metrics["replayed"], state.hypergrad_state.memory.items))
    assert jax.local_device_count() == 8
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5), *found)


def test_bad_input():
    plain, memory = _outer(), replay.reservoir(3)
    with pytest.raises(ValueError, match="outer must be of type OuterUpdate, got None"):
        replay.replayed(None, memory, 1)
    with pytest.raises(ValueError, match="memory must be of type Memory, got None"):
        replay.replayed(plain, None, 1)
    with pytest.raises(ValueError, match="count must be an integer of at least 1, got 0"):
        replay.replayed(plain, memory, 0)
    with pytest.raises(ValueError, match="count must be at most the capacity of the memory, 3, got 4"):
        replay.replayed(plain, memory, 4)
    with pytest.raises(ValueError, match="what must be one of 'tasks', 'examples', got 'steps'"):
        replay.replayed(plain, memory, 1, what="steps")
    with pytest.raises(ValueError, match="outer must have no axis_name, since all devices share the memory, got 'd'"):
        replay.replayed(plain._replace(axis_name="d"), memory, 1)
    with pytest.raises(ValueError, match="priority must be None for a memory without priorities, got <function"):
        replay.replayed(plain, memory, 1, priority=lambda params, items: 0)
    with pytest.raises(ValueError, match="priority must be given for a memory that has them, got None"):
        replay.replayed(plain, replay.prioritised(3), 1)
    outer = replay.replayed(plain, memory, 1)
    state = outer.init(_KEY, Episode(*_task(1, 2)))
    with pytest.raises(ValueError, match="item must have the structure, shapes and dtypes of the example"):
        outer.update(state, _batch((_points([1, 2], [1, 2]), _points([1], [1]))))
    with pytest.raises(ValueError, match=r"drawn.items must be of type Experience, got \("):
        replay.with_experience(_points([1], [1]), Sample((jnp.zeros([1, 1]),) * 2, jnp.ones(1), jnp.arange(1)))
    big = replay.replayed(plain, replay.reservoir(10**6, max_bytes=1000), 1)
    with pytest.raises(ValueError, match=r"it takes \d+ bytes, and 1000 max_bytes allows"):
        big.init(_KEY, Episode(*_task(1, 2)))
