"""The picture of a run: what it shows, and that it is written whole or not at all."""

import os

import matplotlib
import numpy as np
import pytest
from PIL import Image

import metajax
from metajax import data, tasks
from metajax.evaluation import Evaluation, Outputs, _report, report

HISTORY = [{"step": k, "seconds": 0.5 * k, "loss": 1.0 / k, "accuracy": 1 - 1.0 / k} for k in range(1, 40)]
HISTORY += [{"step": 20, "seconds": 10.2, "validation_accuracy": 0.9}]
SPEC = data.EpisodeSpec(3, 2, 4)


def _images(channels=1, dtype=np.uint8):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 8, 8, channels)) * (rng.random((30, 8, 8, 1)) < 0.2)
    scaled = pixels.astype(np.uint8) if dtype == np.uint8 else (pixels / 127.5 - 1).astype(dtype)
    source = data.ClassSource("noise", "test", scaled, np.repeat(np.arange(3), 10), ("a", "b", "c"))
    return data.episode(source, SPEC, seed=0, index=0)


def _draw(path, episode, outputs, **changes):
    arguments = {"history": HISTORY, "evaluation": None, "title": "a run", **changes}
    report(path, episode=episode, outputs=outputs, **arguments)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def _pixels_of(picture, colour):
    rgb = np.array([int(colour[index : index + 2], 16) for index in (1, 3, 5)])
    return int(np.sum(np.abs(picture - rgb).max(-1) < 6))


def test_right_and_wrong_predictions_differ_in_colour(tmp_path):
    episode = _images()
    right = np.eye(3)[episode.query.targets]
    picture = _draw(tmp_path / "right.png", episode, right)
    assert _pixels_of(picture, _report.RIGHT) > 300
    assert _pixels_of(picture, _report.WRONG) == 0
    for name, outputs in (("wrong", np.roll(right, 1, axis=1)), ("nan", np.full_like(right, np.nan))):
        picture = _draw(tmp_path / f"{name}.png", episode, outputs)
        assert _pixels_of(picture, _report.RIGHT) == 0
        assert _pixels_of(picture, _report.WRONG) > 300


def test_padding_is_not_drawn(tmp_path):
    episode = _images()
    query = episode.query._replace(mask=episode.query.targets == 0)
    wrong_in_padding = np.eye(3)[np.zeros(12, int)]
    picture = _draw(tmp_path / "report.png", episode._replace(query=query), wrong_in_padding)
    assert _pixels_of(picture, _report.WRONG) == 0


@pytest.mark.parametrize(("channels", "dtype"), [(3, np.uint8), (1, np.float32), (3, np.float32)])
def test_colour_and_float_images_are_drawn(tmp_path, channels, dtype):
    episode = _images(channels, dtype)
    assert _pixels_of(_draw(tmp_path / "report.png", episode, np.eye(3)[episode.query.targets]), _report.RIGHT) > 300


def test_a_regression_task_shows_both_curves(tmp_path):
    episode = data.episode(data.sinusoids(), data.EpisodeSpec(1, 10, 30), seed=0, index=0)
    history = [{"step": k, "seconds": 1.0 * k, "loss": 1.0 / k, "validation_mse": 2.0} for k in (1, 2)]
    truth = episode.query.targets
    before = _draw(tmp_path / "both.png", episode, Outputs(truth * 0, truth), history=history, task=tasks.regression)
    after = _draw(tmp_path / "after.png", episode, truth, history=history, task=tasks.regression)
    assert _pixels_of(before, _report.OTHER) > _pixels_of(after, _report.OTHER) + 100


@pytest.mark.parametrize("shape", [(20, 3), (20, 2, 3)])
def test_other_tasks_are_drawn_too(tmp_path, shape):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=shape)
    examples = metajax.Examples(rng.normal(size=(20, 4)), rng.integers(0, 3, shape[:-1]), np.ones(20, bool))
    _draw(tmp_path / "classes.png", metajax.Episode(examples, examples), logits)
    examples = examples._replace(targets=logits)
    own = tasks.resolve(loss=lambda outputs, targets: outputs[:, 0])  # nothing is known of its outputs
    _draw(tmp_path / "own.png", metajax.Episode(examples, examples), logits[:, :, None], task=own)
    _draw(
        tmp_path / "numbers.png",
        metajax.Episode(examples, examples),
        Outputs(logits * 0, logits),
        history=[],
        task=tasks.regression,
    )


@pytest.mark.parametrize(
    "history",
    [
        [],
        HISTORY[:1],
        [{"step": 5, "seconds": 1.0, "loss": float("nan")}, {"step": 5, "seconds": 1.0, "validation_accuracy": 0.5}],
        [{"step": 2, "seconds": 3.0, "loss": 1.0}, {"step": 4, "seconds": 1.0, "loss": 2.0}],  # a resumed clock
    ],
)
def test_short_and_broken_histories_are_drawn(tmp_path, history):
    episode = _images()
    _draw(tmp_path / "report.png", episode, np.eye(3)[episode.query.targets], history=history)


def test_the_result_is_stated(tmp_path):
    episode = _images()
    found = Evaluation("accuracy", 0.9, 0.01, np.full(600, 0.9), 600, 0, "batch", True, SPEC, "noise (test)")
    assert _report._subtitle(found) == (
        "noise (test)  ·  accuracy 90.00 ± 1.00 %  (600 episodes)  ·  transductive, normalisation: batch"
    )
    with_result = _draw(tmp_path / "a.png", episode, np.eye(3)[episode.query.targets], evaluation=found)
    assert (with_result != _draw(tmp_path / "b.png", episode, np.eye(3)[episode.query.targets])).any()


@pytest.mark.parametrize(("classes", "shots", "queries"), [(5, 1, 15), (20, 1, 5), (5, 5, 15), (1, 1, 1), (20, 5, 15)])
def test_images_fit_their_area(classes, shots, queries):
    plan = _report._plan_images(classes, shots, queries, 7.0, 4.0)
    assert plan.support * plan.lines >= shots
    assert plan.query * plan.lines >= queries
    blocks = -(-classes // plan.rows)
    assert plan.inches * (blocks * plan.block + _report._LABEL) <= 7.0 + 1e-9
    assert plan.inches * plan.rows * (plan.lines * _report._STEP + _report._SPACE) <= 4.0 + 1e-9


def test_a_report_that_fails_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    episode, path = _images(), tmp_path / "report.png"
    path.write_bytes(b"old")

    def fail(self, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(FigureCanvasAgg, "print_png", fail)
    with pytest.raises(OSError, match="disk full"):
        report(path, history=HISTORY, evaluation=None, episode=episode, outputs=np.zeros([12, 3]), title="")
    assert os.listdir(tmp_path) == ["report.png"]
    assert path.read_bytes() == b"old"


def test_settings_of_the_program_stay_as_they_are(tmp_path):
    before = dict(matplotlib.rcParams)
    _draw(tmp_path / "report.png", _images(), np.eye(3)[_images().query.targets])
    assert dict(matplotlib.rcParams) == before


def test_outputs_of_another_length_are_refused(tmp_path):
    with pytest.raises(ValueError, match="12 query examples, got 5"):
        report(tmp_path / "r.png", history=[], evaluation=None, episode=_images(), outputs=np.zeros([5, 3]), title="")
    assert not os.listdir(tmp_path)
