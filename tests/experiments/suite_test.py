"""A run across sources: what is given, images like those of the run, and the table."""

import json

import numpy as np
import pytest

import metajax
from metajax import run
from metajax.run import _suite

IMAGES = run.Facts(metajax.tasks.classification, 5, 64, (32, 32, 3))
OTHERS = run.Facts(metajax.tasks.regression, 1)
CONFIG = run.complete({"data": {"name": "sinusoids"}})


def test_what_is_given_has_names_of_its_own():
    assert _suite.parse(["omniglot=a", "mine=b=c"], CONFIG, IMAGES) == {"omniglot": "a", "mine": "b=c"}
    for given, facts, text in (
        (["omniglot"], IMAGES, "suite_data must be NAME=PATH,... with names of their own, got 'omniglot'"),
        (["a=b", "a=c"], IMAGES, "suite_data must be .* got 'a=c'"),
        ([], OTHERS, "suite must be of a run on images, got one on sinusoids"),
    ):
        with pytest.raises(ValueError, match=text):
            _suite.parse(given, CONFIG, facts)


def test_channels_become_those_of_the_run():
    pixels = np.zeros([8, 2, 2, 3], np.uint8)
    pixels[..., 0], pixels[..., 1] = 30, 60
    source = metajax.data.ClassSource("toy", "test", pixels, np.repeat([0, 1], 4), ("a", "b"))
    spec = metajax.data.EpisodeSpec(2, 1, 2)
    grey = _suite._like(source, 1, spec)
    assert np.unique(metajax.data.episode(grey, spec, seed=0, index=0).query.inputs).tolist() == [30]
    assert metajax.data.episode(_suite._like(grey, 3, spec), spec, seed=0, index=0).query.inputs.shape == (4, 2, 2, 3)
    assert _suite._like(source, 3, spec) is source


@pytest.mark.slow  # a process, and the built-in characters in another size
def test_the_suite_has_a_row_for_each_source(launch, metric_run, draw, tmp_path):
    other = draw(tmp_path / "other", [f"other{number}" for number in range(16)], images=6, seed=3, size=10)
    flags = ["--ways=2", "--shots=1", "--queries=4", "--episodes=12", "--suite=cross_domain"]
    output = tmp_path / "found.json"
    done = launch("evaluate", f"--workdir={metric_run}", *flags, f"--suite_data=mine={other}", f"--output={output}")
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    rows = {row["source"]: row for row in found["suite"]}
    assert list(rows) == ["image_folder", "glyphs", "mine"]
    assert [row["in_domain"] for row in rows.values()] == [True, False, False]
    assert rows["image_folder"]["accuracy_mean"] == found["accuracy_mean"]
    learner, params = metajax.load_run(metric_run)
    source = metajax.data.image_folder(other, split="test", size=8, channels=1)
    expected = metajax.evaluation.evaluate(learner, params, source, metajax.data.EpisodeSpec(2, 1, 4), episodes=12)
    assert rows["mine"]["accuracy_mean"] == pytest.approx(expected.mean, abs=1e-5)
    assert _suite.table(found["suite"]) in done.stdout
