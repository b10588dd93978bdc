"""Steps that are not finite are left out without a trace; losses that jump are found, and those that do not are not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import metajax
from metajax import data, training

_TASKS = 8


def _outer(*, estimator=None, dtype=jnp.float32, optimizer=None, axis_name=None):
    linear = metajax.Model(lambda key, x: jax.random.normal(key, [x.shape[-1], 2], dtype), lambda w, x: x @ w)
    return metajax.outer_update(
        metajax.learners.maml(linear, inner=optax.sgd(0.1), num_steps=2), optimizer or optax.adam(1e-2),
        hypergrad=estimator or metajax.hypergrad.mixed_mode(), axis_name=axis_name, before=False,
    )  # fmt: skip


def _episodes(seed=0, *, broken=False, dtype=np.float32):
    """Broken: the query set of one task of 8 is not finite."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(2, _TASKS, 4, 3))
    if broken:
        inputs[1, 3] = np.inf
    rest = np.tile([0, 0, 1, 1], (_TASKS, 1)), np.ones((_TASKS, 4), bool), np.ones((_TASKS, 2), bool)
    return metajax.Episode(*(metajax.Examples(jnp.asarray(part, dtype), *rest) for part in inputs))


def _one(episodes):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), episodes)


def _numbers(tree):
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return [np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf) for leaf in jax.tree.leaves(tree)]


def _same(tree, other):
    pairs = list(zip(_numbers(tree), _numbers(other), strict=True))
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


_SETTINGS = {
    "bfloat16": {"dtype": jnp.bfloat16},
    "persistent truncation over devices": {
        "axis_name": "task",
        "estimator": metajax.hypergrad.persistent_truncation(1),
    },
}


def _over_devices(outer, count=2):
    mesh, whole, split = metajax.parallel.make_mesh(devices=jax.devices()[:count]), P(), P("task")
    layout = metajax.MetaState(params=whole, opt_state=whole, hypergrad_state=split, step=whole, key=whole)
    update = jax.shard_map(outer.update, mesh=mesh, in_specs=(layout, split), out_specs=(layout, whole))

    def init(*arguments, **keywords):
        return jax.device_put(outer.init(*arguments, **keywords), NamedSharding(mesh, whole))

    return metajax.OuterUpdate(init, update)


@pytest.mark.parametrize("setting", _SETTINGS)
def test_a_step_that_is_not_finite_changes_the_step_alone_and_every_other_step_is_what_it_was(setting):
    bare, spread = _outer(**_SETTINGS[setting]), "axis_name" in _SETTINGS[setting]
    dtype = _SETTINGS[setting].get("dtype", np.float32)
    # both ways round: the guard inside of shard_map and outside of it
    outer = training.skip_nonfinite(bare)
    if spread:
        bare, outer = (_over_devices(one) for one in (bare, outer))
    update, unguarded = jax.jit(outer.update), jax.jit(bare.update)
    good, broken = _episodes(dtype=dtype), _episodes(1, broken=True, dtype=dtype)
    state = expected = outer.init(jax.random.key(0), _one(good), num_tasks=_TASKS)
    for _ in range(2):
        state, metrics = update(state, good)
        expected, told = unguarded(expected, good)
        assert _same(state, expected)
        assert float(metrics.pop("skipped")) == 0.0
        assert _same(metrics, told)
    ruined, _ = unguarded(state, broken)
    assert not all(np.all(np.isfinite(np.asarray(leaf, np.float32))) for leaf in jax.tree.leaves(ruined.params))
    after, metrics = update(state, broken)
    assert float(metrics["skipped"]) == 1.0
    assert not np.isfinite(float(metrics["loss"]))
    assert _same(after._replace(step=state.step), state)
    assert int(after.step) == int(state.step) + 1
    if spread:
        outside, metrics = jax.jit(training.skip_nonfinite(bare).update)(state, broken)
        assert float(metrics["skipped"]) == 1.0
        assert _same(outside, after)
    went_on, metrics = update(after, good)
    assert float(metrics["skipped"]) == 0.0
    assert _same(went_on, unguarded(expected._replace(step=after.step), good)[0])


def test_a_hypergradient_that_is_not_finite_is_enough():
    def update(state, episodes):
        metrics = {"loss": jnp.float32(1.0), "grad_norm": episodes}
        return state._replace(params=state.params + episodes, step=state.step + 1), metrics

    outer = training.skip_nonfinite(metajax.OuterUpdate(lambda key, episode: None, update))
    state = _plain_state()
    for value, skipped in ((jnp.inf, 1.0), (jnp.nan, 1.0), (2.0, 0.0)):
        state, metrics = jax.jit(outer.update)(state, jnp.float32(value))
        assert float(metrics["skipped"]) == skipped
    assert float(state.params) == 2.0


def test_optax_alone_lets_through_what_skipping_keeps_out():
    """The reason for a wrapper of the meta step: `apply_if_finite` gives up, and looks at the gradient alone."""
    good, broken = _episodes(), _episodes(1, broken=True)
    estimator = metajax.hypergrad.persistent_truncation(1)
    patient = _outer(optimizer=optax.apply_if_finite(optax.adam(1e-2), 2), estimator=estimator)
    state = patient.init(jax.random.key(0), _one(good), num_tasks=_TASKS)
    update = jax.jit(patient.update)
    first, _ = update(state, broken)
    assert _same(first.params, state.params)
    assert not _same(first.hypergrad_state, state.hypergrad_state)
    for _ in range(3):
        state, _ = update(state, broken)
    assert not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))


def test_what_is_no_meta_step_is_refused():
    with pytest.raises(ValueError, match="outer must be of type OuterUpdate, got 3"):
        training.skip_nonfinite(3)


def _plain_state():
    return metajax.MetaState(jnp.zeros([]), (), (), jnp.zeros([], jnp.int32), jax.random.key(0))


def _counting(bad):
    """A meta step that counts its good steps, and whose loss is their number, or NaN at the steps `bad`."""
    bad = jnp.array(sorted(bad) or [-1])

    def update(state, episodes):
        loss = jnp.where(jnp.any(state.step + 1 == bad), jnp.nan, state.params + 1)
        return state._replace(params=state.params + 1, step=state.step + 1), {"loss": loss}

    return training.skip_nonfinite(metajax.OuterUpdate(lambda key, episode: _plain_state(), update))


def _loop(kind, outer, steps, callbacks):
    if kind == "fit":
        return training.fit(outer, _plain_state(), [jnp.zeros(1)] * steps, steps=steps, callbacks=callbacks)
    sampler = data.device_sampler(data.sinusoids(), data.EpisodeSpec(1, 1, 1))
    return training.fit_on_device(
        outer, _plain_state(), *sampler, batch=1, steps=steps, chunk=2, callbacks=callbacks
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["fit", "fit_on_device"])
def test_a_run_passes_skipped_steps_records_saves_and_validates(kind, tmp_path):
    recorder = training.Recorder(tmp_path, every=4, tensorboard=False)
    checkpoints, limit, spikes = training.Checkpoints(tmp_path / "all"), training.SkipLimit(3), training.Spikes()
    callbacks = [
        limit, spikes, recorder,
        training.Validation(
            lambda params: {"score": float(params)}, recorder, every=4, checkpoints=checkpoints, better=("score", 1)
        ),
        training.Saving(checkpoints, every=4, steps=8, extra=dict),
    ]  # fmt: skip
    state = _loop(kind, _counting({3, 4, 6, 8}), 8, callbacks)
    assert float(state.params) == 4.0
    lines = [line for line in training.read_metrics(tmp_path) if "skipped" in line]
    assert [(line["step"], line["skipped"]) for line in lines] == [(1, 0.0), (4, 2.0), (8, 2.0)]
    assert [line["loss"] for line in lines] == [1.0, 2.0, 3.5]  # of 1; 2; and 3 and 4
    scores = [line["score"] for line in training.read_metrics(tmp_path) if "score" in line]
    assert scores == [2.0, 4.0]
    restored, _ = checkpoints.restore(_plain_state())
    checkpoints.close()
    assert (int(restored.step), float(restored.params)) == (8, 4.0)
    assert limit.count == 3  # the last step is not looked at


def test_a_line_of_skipped_steps_alone_holds_their_number(tmp_path):
    recorder = training.Recorder(tmp_path, every=2, start=2, tensorboard=False)
    for step in (3, 4):
        recorder(step, None, {"loss": float("nan"), "skipped": 1.0})
    recorder.close()
    (line,) = training.read_metrics(tmp_path)
    assert (line["skipped"], set(line)) == (2.0, {"step", "seconds", "skipped"})


@pytest.mark.parametrize("kind", ["fit", "fit_on_device"])
def test_too_many_skipped_steps_in_a_row_end_the_run(kind):
    with pytest.raises(training.NonFiniteError, match="3 steps in a row up to step 7 "):
        _loop(kind, _counting({2, 3, 5, 6, 7, 8}), 10, [training.SkipLimit(3)])
    assert int(_loop(kind, _counting({2, 3, 5, 6}), 8, [training.SkipLimit(3)]).step) == 8


@pytest.mark.parametrize("kind", ["fit", "fit_on_device"])
def test_without_skipping_a_loss_that_is_not_finite_ends_the_run(kind):
    guarded = _counting({3})

    def update(state, episodes):
        state, metrics = guarded.update(state, episodes)
        return state, {"loss": metrics["loss"]}

    with pytest.raises(training.NonFiniteError, match="step 3"):
        _loop(kind, guarded._replace(update=update), 6, [])


def _alarms(losses, **options):
    found = []
    spikes = training.Spikes(record=lambda step, values: found.append(step), **options)
    for step, loss in enumerate([*losses, 0.0], start=1):  # one more: the last one is not looked at
        spikes(step, None, {"loss": loss})
    assert spikes.count == len(found)
    return found


def _series(length, seed=0):
    """Losses as they come: they fall, and their noise is skewed."""
    rng = np.random.default_rng(seed)
    return 0.5 + np.exp(-np.arange(length) / 300) + 0.1 * rng.gamma(2.0, 0.5, length)


def test_noise_gives_no_alarm():
    for seed in range(3):
        assert _alarms(_series(3000, seed)) == []
        assert _alarms(np.random.default_rng(seed).normal(1.0, 0.1, 3000), factor=6.0) == []


def test_losses_that_hardly_move_give_no_alarm():
    assert _alarms([0.7] * 80 + [0.7001] * 20) == []
    assert _alarms([0.0] * 80 + [1e-6] * 20) == []
    assert _alarms([0.7] * 80 + [0.8] + [0.7] * 10) == [81]


def test_a_spike_is_found_where_it_is():
    losses = _series(400)
    losses[250] += 3.0
    assert _alarms(losses) == [251]


def test_a_change_of_level_is_found_and_then_is_the_level():
    losses = _series(400)
    losses[250:] += 3.0
    found = _alarms(losses)
    assert found == list(range(251, found[-1] + 1))
    assert 30 < len(found) <= 50  # half of the window


def test_a_fall_is_no_spike():
    losses = _series(400)
    losses[250:] -= 0.4
    assert _alarms(losses) == []


def test_nothing_is_a_spike_before_half_the_window_is_known():
    losses = [1.0] * 9 + [50.0] + [1.0] * 5 + [60.0]
    assert _alarms(losses, window=20) == [16]
    assert _alarms(losses, window=18) == [10, 16]


def test_losses_that_are_not_finite_are_neither_spikes_nor_known():
    losses = _series(300)
    losses[100:200] = np.where(np.arange(100) % 2, np.nan, np.inf)
    losses[250] += 3.0
    assert _alarms(losses) == [251]
    assert _alarms([1.0] * 9 + [np.nan] * 9 + [9.0], window=20) == []


def test_the_definition_by_numpy():
    losses, window, factor = _series(300, 3), 30, 3.0
    expected = []
    for place in range(window // 2, len(losses)):
        known = losses[max(place - window, 0) : place]
        spread = 1.4826 * np.median(np.abs(known - np.median(known)))
        if losses[place] > np.median(known) + factor * max(spread, 0.01 * abs(np.median(known))):
            expected.append(place + 1)
    assert len(expected) > 3
    assert _alarms(losses, window=window, factor=factor) == expected


@pytest.mark.parametrize(("action", "kind"), [("stop", training.LossSpike), ("rollback", training.Rollback)])
def test_a_spike_ends_the_run_with_its_step_and_the_callback_can_be_used_again(action, kind):
    spikes = training.Spikes(window=10, action=action)
    for _ in range(2):
        for step, loss in enumerate([1.0, 1.1] * 4 + [7.0], start=1):
            spikes(step, None, {"loss": loss})
        with pytest.raises(kind, match="step 9, 7, is above") as caught:
            spikes(10, None, {"loss": 1.0})
        assert type(caught.value) is kind
        assert (caught.value.step, caught.value.loss) == (9, 7.0)
        assert 1.1 < caught.value.threshold < 2.5
        spikes.close()
    assert spikes.count == 2


class _Tracer:
    """A loss that says when it is read."""

    def __init__(self, step, read):
        self._step, self._read = step, read

    def __float__(self):
        self._read.append(self._step)
        return 1.0


def test_losses_are_read_late_except_before_a_checkpoint():
    read, at = [], []
    spikes = training.Spikes(checkpoint_every=4)
    for step in range(1, 8):
        spikes(step, None, {"loss": _Tracer(step, read)})
        at.append(list(read))
    assert at == [[], [1], [1, 2], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]]


def test_a_rollback_comes_before_the_spike_is_saved_and_a_second_start_passes_it(tmp_path):
    """What a launcher does: the last checkpoint, and the episodes after those that made the spike."""
    batches = np.ones(20)
    batches[7] = 100.0  # of step 8, at which a checkpoint is due

    def update(state, batch):
        return state._replace(params=state.params + batch, step=state.step + 1), {"loss": batch}

    checkpoints, place, starts = training.Checkpoints(tmp_path), 0, []
    state = _plain_state()
    while int(state.step) < 12:
        starts.append((int(state.step), place))
        taken = int(state.step)
        spikes = training.Spikes(window=4, action="rollback", checkpoint_every=4)
        saving = training.Saving(checkpoints, every=4, steps=12, extra=dict)
        try:
            state = training.fit(
                update, state, iter(jnp.asarray(batches[place:])), steps=12, callbacks=[spikes, saving]
            )
        except training.Rollback as spike:
            state, _ = checkpoints.restore(_plain_state())
            place += spike.step - taken
    checkpoints.close()
    assert starts == [(0, 0), (4, 8)]
    assert float(state.params) == 12.0


def test_rollback_without_a_launcher_ends_in_one_line():
    assert issubclass(training.Rollback, training.LossSpike)
    assert issubclass(training.LossSpike, ValueError)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: training.SkipLimit(0), "limit must be an integer of at least 1, got 0"),
        (lambda: training.Spikes(window=1), "window must be an integer of at least 2, got 1"),
        (lambda: training.Spikes(factor=0.0), "factor must be a finite number above 0, got 0.0"),
        (lambda: training.Spikes(action="panic"), "action must be one of 'count', 'stop', 'rollback', got 'panic'"),
        (lambda: training.Spikes(checkpoint_every=0), "checkpoint_every must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()
