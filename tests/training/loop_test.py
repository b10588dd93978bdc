"""`fit`, its callbacks and checkpoints."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

import metajax
from metajax import training
from metajax.training import _loop


def _setup(rate=0.1):
    learner = metajax.learners.maml(metajax.models.mlp(outputs=2, hidden=(3,)), inner=optax.sgd(0.1))
    outer = metajax.outer_update(learner, optax.sgd(rate), hypergrad=metajax.hypergrad.mixed_mode())
    examples = metajax.Examples(jnp.eye(4), jnp.array([0, 0, 1, 1]), jnp.ones(4, bool), jnp.ones(2, bool))
    episode = metajax.Episode(examples, examples)
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), episode)
    return outer, outer.init(jax.random.key(0), episode), batch


def test_fit_is_the_update_repeated_and_calls_back_after_each_step():
    outer, state, batch = _setup()
    expected, update = state, jax.jit(outer.update)
    for _ in range(3):
        expected, _ = update(expected, batch)
    seen = []
    found = training.fit(outer, state, [batch] * 5, steps=3, callbacks=[lambda step, *_: seen.append(step)])
    assert seen == [1, 2, 3]
    for ours, theirs in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_fit_compiles_once():
    outer, state, batch = _setup()
    count = []

    def update(state, episodes):
        count.append(1)
        return outer.update(state, episodes)

    training.fit(update, state, [batch] * 4, steps=4)
    assert len(count) == 1


@pytest.mark.parametrize("hosts", worlds.few_by_default([1, 2], lambda hosts: hosts == 2))
def test_callbacks_find_the_position_of_their_step_and_a_run_goes_on_from_it(hosts):
    """From any step, in any number of processes: the run of process 0 is followed, the others draw beside it."""
    source, spec = metajax.data.sinusoids(), metajax.data.EpisodeSpec(ways=1, shots=2, queries=2)
    start = metajax.MetaState((), (), (), jnp.zeros([], jnp.int32), jax.random.key(0))

    def update(state, episodes):  # trains nothing, and tells what it was given
        return state._replace(step=state.step + 1), {"loss": 0.5, "given": episodes.query.inputs}

    def run(state, position, steps, count):
        """Gives the position after each step, and what its first two tasks were."""
        stream = metajax.data.prefetch_to_device(
            metajax.data.episodes(source, spec, batch=4 // count, seed=1, start=position, process_count=count), size=3
        )
        seen = []
        keep = lambda step, state, metrics: seen.append((step, stream.position, np.asarray(metrics["given"][:2])))  # noqa: E731
        state = training.fit(update, state, stream, steps=steps, callbacks=[keep])
        stream.close()
        return state, seen

    known = metajax.data.episode_batch(source, spec, seed=1, start=0, count=20).query.inputs.reshape(5, 4, 2, 1)
    for stop in range(1, 5):
        state, before = run(jax.tree.map(jnp.copy, start), 0, stop, hosts)
        _, after = run(state, before[-1][1], 5, 3 - hosts)
        for place, (step, position, given) in enumerate(before + after):
            assert (step, position) == (place + 1, 4 * (place + 1))
            np.testing.assert_array_equal(given, known[place, :2])


def test_fit_refuses_too_few_episodes_and_bad_steps():
    outer, state, batch = _setup()
    with pytest.raises(ValueError, match="steps must be an integer of at least 1, got 0"):
        training.fit(outer, state, [batch], steps=0)
    with pytest.raises(ValueError, match="episodes must last for 3 steps, got 1"):
        training.fit(outer, state, [batch], steps=3)


def test_a_callback_that_fails_to_close_leaves_none_open():
    closed = []

    class Closing:
        def __init__(self, name, fails=False):
            self.name, self.fails = name, fails

        def close(self):
            closed.append(self.name)
            if self.fails:
                raise OSError("full")

    with pytest.raises(OSError, match="full"), _loop.closing([Closing("a"), Closing("b", fails=True), Closing("c")]):
        pass
    assert closed == ["a", "b", "c"]


def test_a_loss_that_is_not_finite_names_its_step_and_closes_callbacks():
    outer, state, batch = _setup()
    bad = batch._replace(query=batch.query._replace(inputs=batch.query.inputs.at[0, 0, 0].set(jnp.nan)))

    class Closing:
        closed = False

        def __call__(self, *_):
            pass

        def close(self):
            self.closed = True

    closing = Closing()
    with pytest.raises(training.NonFiniteError, match="at step 3"):
        training.fit(outer, state, [batch, batch, bad, batch], steps=4, callbacks=[closing])
    assert closing.closed


def test_checkpoints_restore_the_same_state(tmp_path):
    outer, state, batch = _setup()
    state, _ = outer.update(state, batch)
    like = _setup()[1]
    checkpoints = training.Checkpoints(tmp_path)
    with pytest.raises(ValueError, match="there is no checkpoint"):
        checkpoints.restore(like)
    checkpoints.save(1, state, {"seconds": 1.5})
    restored, extra = checkpoints.restore(like)
    checkpoints.close()
    assert extra == {"seconds": 1.5}
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    plain = lambda state: jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))  # noqa: E731
    for ours, theirs in zip(plain(restored), plain(state), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


def test_saving_refuses_parameters_that_are_not_finite(tmp_path):
    _, state, _ = _setup()
    checkpoints = training.Checkpoints(tmp_path)
    saving = training.Saving(checkpoints, every=1, steps=9, extra=dict)
    saving(1, state, {"loss": 0.5})
    broken = state._replace(params=jax.tree.map(lambda leaf: leaf * jnp.nan, state.params))
    with pytest.raises(training.NonFiniteError, match="after step 2"):
        saving(2, broken, {"loss": 0.5})
    with pytest.raises(training.NonFiniteError, match="at step 2"):
        saving(2, state, {"loss": float("nan")})
    assert checkpoints.latest() == 1
    checkpoints.close()


def test_validation_keeps_the_best(tmp_path):
    _, state, _ = _setup()
    scores = iter([0.5, 0.9, float("nan"), 0.7])
    checkpoints = training.Checkpoints(tmp_path)
    recorder = training.Recorder(tmp_path, every=1, tensorboard=False)
    validating = training.Validation(
        lambda params: {"validation_accuracy": next(scores)}, recorder, every=2, checkpoints=checkpoints,
        better=("validation_accuracy", 1),
    )  # fmt: skip
    for step in range(1, 9):
        validating(step, state, {"loss": 0.5})
    assert validating.best == 0.9
    assert checkpoints.latest("best") == 4
    checkpoints.close()
    recorder.close()


def test_a_run_killed_between_the_best_and_the_last_checkpoint_passes_the_best_again(tmp_path):
    _, state, _ = _setup()
    for _ in range(2):  # the second time as after a kill: no last checkpoint, so the best value is forgotten
        checkpoints = training.Checkpoints(tmp_path)
        recorder = training.Recorder(tmp_path, every=1, tensorboard=False)
        validating = training.Validation(
            lambda params: {"validation_accuracy": 0.5}, recorder, every=2, checkpoints=checkpoints,
            better=("validation_accuracy", 1),
        )  # fmt: skip
        for step in (1, 2, 3):
            validating(step, state, {"loss": 0.5})
        assert checkpoints.latest("best") == 2
        checkpoints.close()
        recorder.close()


def test_the_recorder_works_without_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    recorder = training.Recorder(tmp_path, every=1)
    assert not recorder.tensorboard
    recorder(1, None, {"loss": 0.5})
    recorder.close()
    assert training.read_metrics(tmp_path)[0]["loss"] == 0.5
    assert not (tmp_path / "tensorboard").exists()


def test_the_recorder_forgets_lines_beyond_the_restored_step_and_a_torn_line(tmp_path):
    recorder = training.Recorder(tmp_path, every=2, tensorboard=False)
    for step in range(1, 7):
        recorder(step, None, {"loss": float(step)})
    recorder.close()
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 8, "lo')
    assert [line["step"] for line in training.read_metrics(tmp_path)] == [1, 2, 4, 6]
    recorder = training.Recorder(tmp_path, every=2, start=4, seconds=10.0, tensorboard=False)
    recorder(5, None, {"loss": 1.0})
    recorder(6, None, {"loss": 3.0})
    recorder.close()
    lines = training.read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 4, 6]
    assert lines[-1]["loss"] == 2.0
    assert lines[-1]["seconds"] >= 10.0


def test_a_recorder_goes_on_with_the_steps_that_wait_for_their_line(tmp_path):
    def record(folder, begin, end, **options):
        folder.mkdir(exist_ok=True)
        recorder = training.Recorder(folder, every=4, tensorboard=False, start=begin, **options)
        for step in range(begin + 1, end + 1):
            recorder(step, None, {"loss": 1 / step})
        waiting = recorder.waiting
        recorder.close()
        return waiting

    record(tmp_path / "whole", 0, 8)
    waiting = record(tmp_path / "parts", 0, 6)
    assert [line["loss"] for line in waiting] == [1 / 5, 1 / 6]
    assert training.read_metrics(tmp_path / "parts")[-1]["partial"] == 2
    record(tmp_path / "parts", 6, 8, waiting=waiting)
    whole, parts = (
        [(line["step"], line["loss"]) for line in training.read_metrics(tmp_path / name)] for name in ("whole", "parts")
    )
    assert whole == parts


def test_a_recorder_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorder = training.Recorder(None, every=1)
    recorder(1, None, {"loss": 1.0})
    recorder.write(1, {"validation": 1.0})
    recorder.close()
    assert (recorder.tensorboard, recorder.waiting, list(tmp_path.iterdir())) == (False, [], [])
