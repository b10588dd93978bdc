"""`fit_on_device`: what one program with its episodes shares with a loop over the same episodes."""

import contextlib

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import metajax
from metajax import data, training
from metajax.training import _device_loop

_SPEC = data.EpisodeSpec(ways=2, shots=1, queries=2)
_BATCH, _SEED = 4, 5


def _source(seed=0):
    inputs = np.random.default_rng(seed).normal(size=[30, 3]).astype(np.float32)
    return data.ClassSource("toy", "train", inputs, np.repeat(np.arange(6), 5), tuple("abcdef"))


_DATA, _SAMPLE = data.device_sampler(_source(), _SPEC)
_DRAW = jax.jit(jax.vmap(_SAMPLE, in_axes=(None, 0)))


def _update(state, episodes):
    """Least squares on the query sets: the shortest meta step that has all that the loop looks at."""

    def loss(params):
        return jnp.mean((jnp.tanh(episodes.query.inputs @ params) - episodes.query.targets) ** 2)

    value, slope = jax.value_and_grad(loss)(state.params)
    metrics = {"loss": value, "slopes": slope}
    return state._replace(params=state.params - 0.1 * slope, step=state.step + 1), metrics


def _start():
    return metajax.MetaState(jnp.zeros(3), (), (), jnp.zeros([], jnp.int32), jax.random.key(0))


def _fit(state, steps, *, outer=_update, sampled=(_DATA, _SAMPLE), **options):
    options = {"batch": _BATCH, "seed": _SEED, "chunk": 3} | options
    return training.fit_on_device(outer, state, *sampled, steps=steps, **options)


def _equal(tree, other):
    plain = lambda tree: jax.tree.leaves(tree._replace(key=jax.random.key_data(tree.key)))  # noqa: E731
    return all(np.array_equal(a, b) for a, b in zip(plain(tree), plain(other), strict=True))


def _keys(seed, step):
    """One key a task; 2**32 - 2 keeps them apart from the keys of the state, which may have the same seed."""
    key = jax.random.key(seed % 2**32)
    for number in (2**32 - 2, seed // 2**32, step):
        key = jax.random.fold_in(key, number)
    return jax.vmap(lambda task: jax.random.fold_in(key, task))(jnp.arange(_BATCH))


def _show(state, episodes):
    """A meta step that trains nothing, and whose metrics are the episodes that it was given."""
    return state._replace(step=state.step + 1), {"loss": 0.5, "episodes": episodes}


class _Seen:
    """A callback that keeps what it is called with."""

    def __init__(self, every=None):
        self.steps, self.states, self.metrics, self.closed = [], [], [], 0
        if every is not None:
            self.every = every

    def __call__(self, step, state, metrics):
        self.steps.append(step)
        self.states.append(int(state.step))
        self.metrics.append(metrics)

    def close(self):
        self.closed += 1


@contextlib.contextmanager
def _compilations():
    found = []

    def listen(event, seconds, **told):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(told.get("fun_name", ""))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def whole():
    """Seven steps at once, and what a callback saw of them."""
    seen = _Seen()
    return _fit(_start(), 7, callbacks=[seen]), seen


def test_it_is_a_loop_over_the_same_keys():
    learner = metajax.learners.maml(metajax.models.mlp(outputs=2, hidden=(4,)), inner=optax.sgd(0.1))
    outer = metajax.outer_update(learner, optax.adam(1e-2), hypergrad=metajax.hypergrad.mixed_mode())
    init = jax.jit(lambda: outer.init(jax.random.key(0), data.episode(_source(), _SPEC, seed=0, index=0)))
    update = jax.jit(outer.update)
    expected, seen = init(), _Seen()
    state = _fit(init(), 7, outer=outer, callbacks=[seen])
    for step in range(7):
        expected, known = update(expected, _DRAW(_DATA, _keys(_SEED, step)))
        assert set(seen.metrics[step]) == set(known)
        for name, value in known.items():
            np.testing.assert_allclose(seen.metrics[step][name], value, rtol=1e-4, atol=1e-6)
    assert int(state.step) == 7
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_callbacks_see_each_step_once_and_the_state_that_its_chunk_ended_with(whole):
    _, seen = whole
    assert (seen.steps, seen.closed) == ([1, 2, 3, 4, 5, 6, 7], 1)
    assert seen.states == [3, 3, 3, 6, 6, 6, 7]
    assert all(isinstance(leaf, np.generic | np.ndarray) for leaf in jax.tree.leaves(seen.metrics))
    assert len({float(metrics["loss"]) for metrics in seen.metrics}) == 7


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_the_chunk_changes_no_bit(whole, chunk):
    seen = _Seen()
    assert _equal(_fit(_start(), 7, chunk=chunk, callbacks=[seen]), whole[0])
    assert [float(metrics["loss"]) for metrics in seen.metrics] == [float(m["loss"]) for m in whole[1].metrics]


@pytest.mark.parametrize("stop", range(1, 7))
def test_resumed_is_uninterrupted(whole, stop):
    seen = _Seen()
    assert _equal(_fit(_fit(_start(), stop), 7, callbacks=[seen]), whole[0])
    assert seen.steps == list(range(stop + 1, 8))
    assert seen.states == whole[1].states[stop:]  # chunks end at the same steps


def test_nothing_is_left_to_do(whole):
    seen = _Seen()
    assert int(_fit(_fit(_start(), 2), 2, callbacks=[seen]).step) == 2
    assert (seen.steps, seen.closed) == ([], 1)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
def test_episodes_depend_on_the_seed_and_the_step(seed):
    seen = _Seen()
    _fit(_start(), 3, outer=_show, seed=seed, chunk=2, callbacks=[seen])
    for step, metrics in enumerate(seen.metrics):
        expected = _DRAW(_DATA, _keys(seed, step))
        for ours, theirs in zip(jax.tree.leaves(metrics["episodes"]), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_seeds_steps_and_tasks_differ():
    drawn = set()
    for seed in (0, 1, 2**32, 2**32 + 1):
        seen = _Seen()
        _fit(_start(), 3, outer=_show, seed=seed, callbacks=[seen])
        drawn |= {task.tobytes() for metrics in seen.metrics for task in metrics["episodes"].query.inputs}
    assert len(drawn) == 4 * 3 * _BATCH


def test_a_loss_that_is_not_finite_names_its_step_and_is_not_saved(tmp_path):
    def update(state, episodes):
        state, metrics = _update(state, episodes)
        return state, metrics | {"loss": jnp.where(state.step >= 8, jnp.nan, metrics["loss"])}

    checkpoints = training.Checkpoints(tmp_path)
    recorder = training.Recorder(tmp_path, every=2, tensorboard=False)
    scored = []
    validating = training.Validation(
        lambda params: scored.append(1) or {"score": 1.0}, recorder, every=3, checkpoints=checkpoints,
        better=("score", 1),
    )  # fmt: skip
    saving = training.Saving(checkpoints, every=3, steps=20, extra=dict)
    seen = _Seen()
    with pytest.raises(training.NonFiniteError, match="the loss is nan at step 8"):
        _fit(_start(), 20, outer=update, callbacks=[seen, recorder, validating, saving])
    assert seen.steps == [1, 2, 3, 4, 5, 6, 7]
    assert seen.closed == 1
    assert len(scored) == 2
    assert checkpoints.latest() == 6
    assert [line["step"] for line in training.read_metrics(tmp_path)] == [1, 2, 3, 4, 6, 6, 7]
    checkpoints.close()


def test_what_is_saved_is_the_state_of_its_step(whole, tmp_path):
    checkpoints = training.Checkpoints(tmp_path)
    saving = training.Saving(checkpoints, every=6, steps=7, extra=dict)
    _fit(_start(), 7, callbacks=[saving])
    assert _equal(checkpoints.restore(_start())[0], whole[0])
    checkpoints.close()


def test_one_compilation_for_chunks_of_all_lengths_other_data_and_other_seeds():
    traced = []

    def update(state, episodes):
        traced.append(1)
        return _update(state, episodes)

    state = _fit(_start(), 1, chunk=4)
    with _compilations() as found:
        state = _fit(state, 9, outer=update, chunk=4)  # chunks of 3, 4 and 1 steps
    assert sum("several" in name for name in found) == 1
    assert len(traced) == 1
    with _compilations() as found:
        same = _fit(_start(), 9, outer=update, chunk=4)
        other_data = jax.tree.map(lambda leaf: leaf * 2 if leaf.dtype == jnp.float32 else leaf, _DATA)
        one = _fit(_start(), 9, outer=update, chunk=4, sampled=(other_data, _SAMPLE))
        two = _fit(_start(), 9, outer=update, chunk=4, seed=_SEED + 1)
    assert not any("several" in name for name in found)
    assert not _equal(one, same)
    assert not _equal(two, same)


def test_data_is_an_argument_of_the_program_and_is_not_donated():
    inputs = np.random.default_rng(0).normal(size=[6000, 100]).astype(np.float32)
    source = data.ClassSource("large", "train", inputs, np.repeat(np.arange(1000), 6), tuple(map(str, range(1000))))
    large, sample = data.device_sampler(source, _SPEC)
    state = _start()._replace(params=jnp.zeros(100))
    run = _device_loop._program(_update, sample, _BATCH, 2)
    text = run.lower(state, large, jax.random.key(0), 2).as_text()
    assert len(text) < 500_000  # as a constant the inputs alone take 4.8 million digits
    _fit(state, 2, sampled=(large, sample), chunk=2)
    np.testing.assert_array_equal(large.examples[0], inputs)


def _over_devices(count):
    """A meta step over the pixels of augmented images, on so many devices; `experiments.train` has real ones."""

    def update(state, episodes):
        def loss(params):
            images = episodes.query.inputs.reshape(*episodes.query.mask.shape, -1) / 255.0
            return jnp.mean((images @ params - episodes.query.targets) ** 2) / count

        value, slope = jax.value_and_grad(loss)(state.params)  # sums over devices, since the parameters are the same
        value = jax.lax.psum(value, "task") if count > 1 else value
        return state._replace(params=state.params - 0.01 * slope, step=state.step + 1), {"loss": value}

    mesh = metajax.parallel.make_mesh(devices=jax.devices()[:count])
    if count > 1:
        update = jax.shard_map(update, mesh=mesh, in_specs=(P(), P("task")), out_specs=(P(), P()))
    start = jax.device_put(_start()._replace(params=jnp.zeros(17 * 13)), NamedSharding(mesh, P()))
    outer = metajax.OuterUpdate(lambda: start, update)
    return training.augment(outer, data.random_flip())


def test_two_devices_give_what_one_gives_and_draw_half_of_the_tasks_each():
    """With the data where the caller left it: on one of the two."""
    labels = np.repeat(np.arange(8), 5)
    inputs = np.random.default_rng(0).integers(0, 256, [40, 17, 13, 1], np.uint8)
    source = data.ClassSource("images", "train", inputs, labels, tuple("abcdefgh"))
    sampled = data.device_sampler(source, _SPEC, device=jax.devices()[0])
    found = {}
    for count in (1, 2):
        outer, seen = _over_devices(count), _Seen()
        with _compilations() as compiled:
            state = _fit(outer.init(), 5, outer=outer, sampled=sampled, callbacks=[seen])
        assert sum("several" in name for name in compiled) == 1
        assert len(state.params.devices()) == count
        found[count] = np.asarray(state.params), [float(metrics["loss"]) for metrics in seen.metrics]
    np.testing.assert_allclose(found[2][0], found[1][0], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found[2][1], found[1][1], rtol=1e-5)
    run = _device_loop._program(outer.update, sampled[1], _BATCH, 3)
    everywhere = jax.device_put(sampled[0], state.step.sharding)
    text = run.lower(state, everywhere, jax.random.key(0), 3).compile().as_text()
    assert "u8[2,4,17,13,1]" in text  # the query sets of two tasks
    assert "u8[4,4,17,13,1]" not in text


def test_an_interrupt_is_raised_after_its_chunk():
    """What a callback raises stops the loop as an interrupt does, and closes the others."""

    def interrupt(step, state, metrics):
        if step == 4:
            raise KeyboardInterrupt

    seen = _Seen()
    with pytest.raises(KeyboardInterrupt):
        _fit(_start(), 100, callbacks=[seen, interrupt])
    assert (seen.steps, seen.closed) == ([1, 2, 3, 4], 1)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch": 0}, "batch must be an integer of at least 1, got 0"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"chunk": 0}, "chunk must be an integer of at least 1, got 0"),
        ({"chunk": 2.5}, "chunk must be an integer of at least 1, got 2.5"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"seed": 2**64}, r"seed must lie below 2\*\*64, got 18446744073709551616"),
        ({"callbacks": [_Seen(every=4)]}, "chunk must divide the interval of _Seen, 4, got 3"),
    ],
)
def test_bad_input_is_named(changes, told):
    with pytest.raises(ValueError, match=told):
        _fit(_start(), **({"steps": 3} | changes))


def test_saving_and_validation_tell_their_intervals(tmp_path):
    checkpoints = training.Checkpoints(tmp_path)
    recorder = training.Recorder(tmp_path, every=2, tensorboard=False)
    saving = training.Saving(checkpoints, every=10, steps=20, extra=dict)
    validating = training.Validation(dict, recorder, every=10, checkpoints=checkpoints, better=("score", 1))
    for callback, name in ((saving, "Saving"), (validating, "Validation")):
        with pytest.raises(ValueError, match=f"chunk must divide the interval of {name}, 10, got 4"):
            _fit(_start(), 20, chunk=4, callbacks=[callback])
    checkpoints.close()
    recorder.close()
