"""Stages go on with one state; what a stage asks for reaches the meta step; schedules that cannot be are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax import models, training
from metajax.data import EpisodeSpec
from metajax.training import Stage, StageResult

SPEC, HARDER = EpisodeSpec(2, 1, 1), EpisodeSpec(4, 2, 1)


def source(classes=8, size=4):
    """The image of a class is full of its number."""
    labels = np.repeat(np.arange(classes), 4)
    images = np.broadcast_to(labels[:, None, None, None], (len(labels), size, size, 1)).astype(np.uint8)
    return metajax.data.ClassSource("numbers", "train", images, labels, tuple(map(str, range(classes))))


class Recording:
    """A meta step that counts, and keeps what it was called with; it is traced once for each shape."""

    def __init__(self):
        self.shapes, self.seen, self.closed, self.steps = [], [], 0, []
        self.outer = metajax.OuterUpdate(self.init, self.update)

    def init(self, key, episode, params=None):
        return metajax.MetaState(params or {"w": jnp.zeros([])}, (), (), jnp.zeros([], jnp.int32), key)

    def update(self, state, episodes):
        self.shapes.append(episodes.support.inputs.shape)
        highest = jnp.max(episodes.query.inputs)
        params = {"w": state.params["w"] + 1}
        return state._replace(params=params, step=state.step + 1), {"loss": jnp.zeros([]), "highest": highest}

    def __call__(self, step, state, metrics):
        self.steps.append(step)
        self.seen.append(int(metrics["highest"]))

    def close(self):
        self.closed += 1


def run(stages, step=0, **options):
    recording = Recording()
    state = recording.init(jax.random.key(0), None)._replace(step=jnp.asarray(step, jnp.int32))
    options = {"batch": 3, "callbacks": [recording], **options}
    state, passed = training.curriculum(recording.outer, state, source(), stages, **options)
    return recording, state, passed


def test_each_stage_is_one_program_and_the_state_goes_on():
    recording, state, passed = run([Stage(SPEC, 3, resolution=2), Stage(HARDER, 2, start=3)])
    assert recording.shapes == [(3, 2, 2, 2, 1), (3, 8, 4, 4, 1)]
    assert recording.steps == [1, 2, 3, 4, 5]
    assert recording.closed == 1
    assert (int(state.step), float(state.params["w"])) == (5, 5.0)
    assert passed == (StageResult(3, None, False), StageResult(2, None, False))


def test_a_run_goes_on_with_the_stages_that_are_left():
    whole, _, _ = run([Stage(SPEC, 2), Stage(HARDER, 4)], seed=5)
    rest, state, _ = run([Stage(HARDER, 4, start=2)], step=2, seed=5)
    assert int(state.step) == 6
    assert rest.seen == whole.seen[2:]  # the same episodes


def test_a_threshold_ends_a_stage_and_steps_do_where_it_is_not_reached():
    asked = []

    def score(params, stage):
        asked.append((float(params["w"]), stage.spec))
        return float(params["w"]) / 10

    stages = [Stage(SPEC, 9, threshold=0.4), Stage(HARDER, 5, threshold=2.0)]
    recording, state, passed = run(stages, score=score, every=2)
    assert passed == (StageResult(4, 0.4, True), StageResult(5, 0.9, False))
    assert asked == [(2, SPEC), (4, SPEC), (6, HARDER), (8, HARDER), (9, HARDER)]
    assert int(state.step) == 9
    assert len(recording.shapes) == 2  # compiled once for a stage, however often it is scored


def test_a_share_is_of_the_easiest_classes():
    difficulty = [7, 6, 5, 4, 3, 2, 1, 0]  # class 7 is the easiest
    recording, _, _ = run([Stage(SPEC, 20, share=0.25), Stage(SPEC, 20)], difficulty=difficulty)
    assert set(recording.seen[:20]) == {7}  # of the classes 6 and 7, both of which stand in every episode
    assert min(recording.seen[20:]) < 6
    lowest = [Stage(SPEC, 20, share=0.25)]
    recording, _, _ = run(lowest, difficulty=difficulty[::-1])
    assert set(recording.seen) == {1}


def test_images_are_augmented_behind_the_resizing():
    brighter = metajax.data.Transform(0, lambda images, numbers: images * 0 + 77)
    recording, _, _ = run([Stage(SPEC, 2, resolution=2, augment=brighter)])
    assert recording.shapes == [(3, 2, 2, 2, 1)]
    assert set(recording.seen) == {77}


@pytest.mark.slow
def test_a_stage_grows_the_network_before_its_first_step():
    def parts(width):
        learner = metajax.learners.prototypical(metajax.models.mlp(3, hidden=(width,)))
        return learner, metajax.outer_update(learner, optax.adam(0.0), hypergrad=metajax.hypergrad.unrolled())

    (small, outer), (large, larger) = parts(4), parts(8)
    episode = metajax.data.episode(source(), SPEC, seed=0, index=0)
    state = outer.init(jax.random.key(0), episode)
    before = small.predict(small.adapt(state.params, episode.support), episode.query.inputs)
    grow = lambda params: models.widen(params, 8)  # noqa: E731
    stages = [Stage(SPEC, 2), Stage(SPEC, 3, grow=grow, outer=larger), Stage(HARDER, 1)]
    state, _ = training.curriculum(outer, state, source(), stages, batch=2)
    assert state.params["layer_0"]["bias"].shape == (8,)
    assert state.opt_state[0].mu["layer_0"]["bias"].shape == (8,)
    assert (int(state.step), int(state.opt_state[0].count)) == (6, 6)
    after = large.predict(large.adapt(state.params, episode.support), episode.query.inputs)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-4)  # at a rate of 0 only growth could change it


def test_competence_by_hand():
    assert training.competence(0.0, initial=0.3) == pytest.approx(0.3)
    assert training.competence(0.5, initial=0.6) == pytest.approx(np.sqrt(0.5 * 0.64 + 0.36))
    assert training.competence(0.5, initial=0.2, root=1) == pytest.approx(0.6)
    assert training.competence(1.0) == 1.0
    assert training.competence(9.0) == 1.0


def test_a_paced_stage_keeps_its_steps():
    grow = lambda params: None  # noqa: E731
    stages = training.paced(Stage(SPEC, 10, share=0.5, resolution=2, grow=grow), 3, initial=0.5, root=1)
    assert [stage.steps for stage in stages] == [3, 3, 4]
    np.testing.assert_allclose([stage.share for stage in stages], [0.25, 1 / 3, 5 / 12])
    assert [stage.grow for stage in stages] == [grow, None, None]
    assert {stage.resolution for stage in stages} == {2}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Stage(SPEC),
            "steps must be an integer of at least 1, also where a threshold may end the stage, got None",
        ),
        (lambda: Stage(SPEC, threshold=0.9), "steps must be an integer of at least 1, also where a threshold"),
        (lambda: Stage(SPEC, 0), "steps must be an integer of at least 1, got 0"),
        (lambda: Stage(5, 1), "spec must be of type EpisodeSpec, got 5"),
        (lambda: Stage(SPEC, 1, threshold=float("nan")), "threshold must be a finite number or None, got nan"),
        (lambda: Stage(SPEC, 1, start=-1), "start must be an integer of at least 0, got -1"),
        (lambda: Stage(SPEC, 1, resolution=0), "resolution must be an integer of at least 1, got 0"),
        (lambda: Stage(SPEC, 1, augment="flip"), "augment must be a transform or a list of them, got 'flip'"),
        (lambda: Stage(SPEC, 1, share=0.0), "share must be a finite number above 0, got 0.0"),
        (lambda: Stage(SPEC, 1, share=1.5), "share must be a number above 0 and at most 1, got 1.5"),
        (lambda: Stage(SPEC, 1, outer=3), "outer must be of type OuterUpdate, got 3"),
        (lambda: run([]), "stages must hold at least one stage, got none"),
        (lambda: run([SPEC]), "stages must be of type Stage"),
        (
            lambda: run([Stage(SPEC, 10), Stage(SPEC, 5, start=8)]),
            r"start of stages\[1\] must be 10, where the one before ends, got 8: stages overlap",
        ),
        (
            lambda: run([Stage(SPEC, 10), Stage(SPEC, 5, start=12)]),
            r"start of stages\[1\] must be 10, .* got 12: no stage has the steps between",
        ),
        (
            lambda: run([Stage(SPEC, 10, threshold=0.5), Stage(SPEC, 5, start=10)], score=lambda params, stage: 0.0),
            r"start of stages\[1\] must be None behind a stage that a threshold may end, got 10",
        ),
        (lambda: run([Stage(SPEC, 10, threshold=0.5)]), r"score must be given for the threshold 0.5 of stages\[0\]"),
        (
            lambda: run([Stage(SPEC, 1), Stage(EpisodeSpec(9, 1, 1), 1)]),
            r"spec of stages\[1\] must be one that the source can give: ways is 9, but numbers \(train\) has 8 classes",
        ),
        (
            lambda: run([Stage(HARDER, 1, share=0.25)], difficulty=range(8)),
            r"spec of stages\[0\] must be one that the source can give: ways is 4, but .* has 2 classes",
        ),
        (lambda: run([Stage(SPEC, 1, share=0.5)]), r"difficulty must be 8 numbers, .* got an array of shape \(\)"),
        (lambda: run([Stage(SPEC, 1)], batch=0), "batch must be an integer of at least 1, got 0"),
        (lambda: run([Stage(SPEC, 1)], every=0), "every must be an integer of at least 1, got 0"),
        (lambda: training.competence(-0.1), "time must be a finite number of at least 0, got -0.1"),
        (lambda: training.competence(0.1, initial=2), "initial must be a number above 0 and at most 1, got 2"),
        (lambda: training.competence(0.1, root=0), "root must be a finite number above 0, got 0"),
        (lambda: training.paced(Stage(SPEC, 2), 3), "count must be at most the 2 steps of the stage, got 3"),
        (lambda: training.paced(Stage(SPEC, 2, start=0), 2), "stage must have neither a threshold nor a start, got"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_share_needs_classes():
    stages = [Stage(EpisodeSpec(1, 1, 1), 1, share=0.5)]
    recording = Recording()
    state = recording.init(jax.random.key(0), None)
    with pytest.raises(ValueError, match=r"source must be a ClassSource for the share 0.5 of stages\[0\], got"):
        training.curriculum(recording.outer, state, metajax.data.sinusoids(), stages, batch=1)
