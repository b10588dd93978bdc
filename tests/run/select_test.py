"""Successive halving: who goes on, from what state, the same after a kill, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax import data, run
from metajax.run import _select

MODEL = metajax.models.mlp(6, hidden=(8,))
METRIC = metajax.learners.prototypical(MODEL)
SPEC = data.EpisodeSpec(ways=4, shots=1, queries=3)


def clouds(split):
    """Classes are points on two of eight axes; the other six are noise, which training has to leave out."""
    rng = np.random.default_rng({"train": 0, "val": 1, "test": 2}[split])
    labels = np.repeat(np.arange(12), 8)
    inputs = np.concatenate([2 * rng.normal(size=(12, 2))[labels], 3 * rng.normal(size=(96, 6))], axis=1)
    inputs[:, :2] += 0.2 * rng.normal(size=(96, 2))
    return data.ClassSource("clouds", split, np.float32(inputs), labels, tuple("abcdefghijkl"))


TASKS = clouds("train"), clouds("val")


def candidate(name, rate):
    outer = metajax.outer_update(METRIC, optax.adam(rate), hypergrad=metajax.hypergrad.unrolled(), before=False)
    return run.Candidate(name, METRIC, outer)


CANDIDATES = [candidate("still", 1e-9), candidate("fast", 0.02), candidate("quarter", 0.005), candidate("snail", 1e-8)]
BUDGET = 240


def select(**options):
    return metajax.select(CANDIDATES, TASKS, BUDGET, **{"spec": SPEC, "meta_batch": 2, "episodes": 60, **options})


@pytest.fixture(scope="module")
def found():
    return select(shots=(1, 3))


def test_the_rungs_by_hand():
    assert _select._rungs(2, 2, 2) == [(2, 1)]
    assert _select._rungs(9, 99, 3) == [(9, 5), (3, 21)]
    assert _select._rungs(5, 45, 2) == [(5, 3), (3, 8), (2, 15)]


def test_the_worse_half_stops_and_the_winner_is_trained_as_by_hand(found):
    """240 steps, two rungs: 30 for each of 4, then 60 more for each of 2."""
    assert found.winner.name == "fast"
    assert [(row.name, row.steps) for row in found.rows[:2]] == [("fast", 90), ("quarter", 90)]
    assert {(row.name, row.steps) for row in found.rows[2:]} == {("still", 30), ("snail", 30)}
    assert (found.steps, found.full_steps) == (240, 360)
    outer = found.winner.outer
    state = outer.init(jax.random.key(0), data.episode(TASKS[0], SPEC, seed=0, index=0))
    update, values = jax.jit(outer.update), []
    for step in range(90):
        state, _ = update(state, data.episode_batch(TASKS[0], SPEC, seed=0, start=2 * step, count=2))
        if step + 1 in (30, 90):
            values.append(metajax.evaluation.evaluate(METRIC, state.params, TASKS[1], SPEC, episodes=60))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found.params, state.params)
    expected = zip((30, 90), values, strict=True)
    assert found.curves["fast"] == [(n, pytest.approx(v.mean), pytest.approx(v.ci95)) for n, v in expected]
    row = found.rows[0]
    assert (row.mean, row.ci95) == found.curves["fast"][-1][1:]
    assert row.by_shots[1] == pytest.approx((row.mean, row.ci95))
    assert row.by_shots[3][0] > row.by_shots[1][0]
    assert row.adapt_seconds > 0
    assert row.step_bytes > 0
    assert found.rows[2].by_shots == {}


def test_the_text_is_a_table_and_the_plot_a_picture(found, tmp_path):
    lines = str(found).splitlines()
    assert lines[0].split() == ["candidate", "steps", "validation", "adapt", "ms", "step", "MB", "1-shot", "3-shot"]
    assert lines[1].split()[:2] == ["fast", "90"]
    assert lines[-1] == "240 meta steps, 67 % of those of training all as long"
    found.plot(tmp_path / "selection.png")
    assert (tmp_path / "selection.png").read_bytes()[1:4] == b"PNG"


def test_a_call_that_was_cut_off_goes_on_to_the_same_end(found, tmp_path, monkeypatch):
    measure, left = _select._measure, [5]

    def cut_off(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(_select, "_measure", cut_off)
    with pytest.raises(KeyboardInterrupt):
        select(shots=(1, 3), folder=tmp_path)
    assert len(json.loads((tmp_path / "rung_0.json").read_text())) == 4
    assert len(json.loads((tmp_path / "rung_1.json").read_text())) == 1
    left[0] = 1  # one more is all that is missing
    again = select(shots=(1, 3), folder=tmp_path)
    assert again.curves == {name: [pytest.approx(point) for point in curve] for name, curve in found.curves.items()}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), again.params, found.params)
    left[0] = 0  # nothing is measured any more
    jax.tree.map(np.testing.assert_array_equal, select(shots=(1, 3), folder=tmp_path).params, again.params)
    with pytest.raises(ValueError, match=r"folder .* is of a call with seed=0, got 1"):
        select(shots=(1, 3), folder=tmp_path, seed=1)


def test_errors_rank_from_below_and_what_is_not_a_number_is_last():
    found = [{"metric": "mse", "score": [mean, 0.0]} for mean in (2.0, float("nan"), 1.0)]
    assert [one["score"][0] for one in sorted(found, key=_select._order)][:2] == [1.0, 2.0]
    accuracies = [{"metric": "accuracy", "score": [mean, 0.0]} for mean in (0.2, 0.9)]
    assert min(accuracies, key=_select._order)["score"][0] == 0.9


def test_bad_input_is_refused():
    for candidates, tasks, budget, options, text in (
        (CANDIDATES[:1], TASKS, 8, {}, r"candidates must be at least 2, got \['still'\]"),
        ([*CANDIDATES, CANDIDATES[0]], TASKS, 99, {}, "candidates must have names of their own, got 'still' twice"),
        ([candidate("a/b", 1), CANDIDATES[0]], TASKS, 8, {}, "a name of candidates must be of letters"),
        ([*CANDIDATES, 5], TASKS, 99, {}, "candidates must be of type Candidate, got 5"),
        (CANDIDATES, (TASKS[0], clouds("test")), 99, {}, r"tasks must not be test tasks, .* got clouds \(test\)"),
        (CANDIDATES, (clouds("test"), TASKS[1]), 99, {}, r"tasks must not be test tasks"),
        (CANDIDATES, TASKS, 7, {}, "budget must be at least 8 meta steps, one for each of 4 candidates .*, got 7"),
        (CANDIDATES, TASKS, 0, {}, "budget must be an integer of at least 1, got 0"),
        (CANDIDATES, TASKS, 8, {"factor": 1}, "factor must be an integer of at least 2, got 1"),
        (CANDIDATES, TASKS, 8, {"episodes": 1}, "episodes must be an integer of at least 2, got 1"),
        (CANDIDATES, TASKS, 8, {"shots": (0,)}, "shots must be an integer of at least 1, got 0"),
        (CANDIDATES, TASKS, 8, {"shots": (6,)}, "shots"),
        (CANDIDATES, TASKS, 8, {"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=text):
            metajax.select(candidates, tasks, budget, **{"spec": SPEC, **options})


def test_regression_is_selected_by_its_error():
    """Of two learners of sine waves, the one that learns."""
    model = metajax.models.mlp(1, hidden=(8,))
    learner = metajax.learners.maml(model, optax.sgd(0.01), loss=metajax.core.squared_error)
    some = []
    for name, rate in (("stays", 1e-9), ("learns", 0.01)):
        outer = metajax.outer_update(learner, optax.adam(rate), hypergrad=metajax.hypergrad.first_order(), before=False)
        some.append(run.Candidate(name, learner, outer, num_steps=3))
    waves = data.sinusoids(split="train"), data.sinusoids(split="val")
    found = metajax.select(some, waves, 80, spec=data.EpisodeSpec(1, 10, 10), episodes=60)
    assert found.winner.name == "learns"
    assert found.rows[0].metric == "mse"
    assert found.rows[0].mean < found.rows[1].mean
    assert jnp.isfinite(found.params["head"]["bias"]).all()
