"""`experiments.adapt` as a process: folders in, a table of predictions out."""

import shutil
import zipfile

import jax
import numpy as np
import pytest
import worlds

import metajax
from metajax.data.readers._folders import read_image_folder

CLASSES = ("maple", "oak", "pine")


@pytest.fixture(scope="module")
def task(tmp_path_factory, draw):
    """A support folder (2, 1 and 3 images of three classes) and a query folder (5 of each)."""
    folder = tmp_path_factory.mktemp("task")
    support = draw(folder / "support", CLASSES, images=3, seed=1)
    for name in ("maple/2", "oak/1", "oak/2"):
        (support / f"{name}.png").unlink()
    return support, draw(folder / "query", CLASSES, images=5, seed=2)


def _table(text):
    return [line.split() for line in text.splitlines() if ".png" in line]


@pytest.mark.parametrize("run", worlds.few_by_default(["metric_run", "head_run"], lambda run: run == "metric_run"))
def test_predictions_are_those_of_the_learner(launch, request, task, run):
    support, query = task
    folder = request.getfixturevalue(run)
    done = launch("adapt", f"--workdir={folder}", f"--support={support}", f"--query={query}")
    assert done.returncode == 0, done.stderr

    options = {"size": 8, "channels": 1, "invert": "auto"}
    images, labels, names, _ = read_image_folder(support, **options)
    asked = read_image_folder(query, **options)
    learner, params = metajax.load_run(folder)
    examples = metajax.Examples(images, labels, np.ones(6, bool), np.ones(3, bool))
    apply = jax.jit(lambda params: learner.predict(learner.adapt(params, examples), asked.images))
    logits = np.asarray(apply(params))[:, :3]
    weights = np.exp(logits - logits.max(1, keepdims=True))
    best = (weights / weights.sum(1, keepdims=True)).max(1)

    rows = _table(done.stdout)
    assert [row[0] for row in rows] == list(asked.file_names)
    assert [row[1] for row in rows] == [names[place] for place in logits.argmax(1)]
    np.testing.assert_allclose([float(row[2]) for row in rows], best, atol=2e-3)
    assert [row[3] for row in rows] == [name for name in CLASSES for _ in range(5)]
    right = np.mean([row[1] == row[3] for row in rows])
    assert done.stdout.splitlines()[-1] == f"accuracy {100 * right:.2f} % (15 images)"
    assert right > 0.6  # patterns that it never saw


def test_plain_images_and_zips_give_predictions_without_accuracy(launch, metric_run, task, tmp_path):
    support, query = task
    plain = tmp_path / "plain"
    plain.mkdir()
    for number, name in enumerate(CLASSES):
        shutil.copy(query / name / "0.png", plain / f"{number}.png")
    (plain / ".DS_Store").write_bytes(b"")
    zipped = tmp_path / "support.zip"
    with zipfile.ZipFile(zipped, "w") as archive:
        for file in sorted(support.rglob("*.png")):
            archive.write(file, file.relative_to(support))
    done = launch("adapt", f"--workdir={metric_run}", f"--support={zipped}", f"--query={plain}")
    assert done.returncode == 0, done.stderr
    rows = _table(done.stdout)
    assert [row[0] for row in rows] == ["0.png", "1.png", "2.png"]
    assert all(len(row) == 3 for row in rows)
    assert all(row[1] in CLASSES and 0 <= float(row[2]) <= 1 for row in rows)
    assert "accuracy" not in done.stdout


def test_bad_input_is_refused(refusals, metric_run, head_run, wave_run, task, draw, tmp_path):
    support, query = task
    strange = draw(tmp_path / "strange", ("oak", "elm", "yew"), images=1)
    many = draw(tmp_path / "many", [f"class{number}" for number in range(5)], images=1)
    empty = tmp_path / "empty"
    empty.mkdir()
    alone = draw(tmp_path / "alone", ("oak",), images=2)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "note.png").write_text("no image")
    cases = [
        (metric_run, support, strange, "query must hold classes of support (maple, oak, pine), got 'elm', 'yew'"),
        (head_run, many, many, "ways must be at most 4, the number of outputs of the model, got 5"),
        (metric_run, support, empty, "query must be a folder of images"),
        (metric_run, empty, query, "support must hold images as CLASS/NAME.png"),
        (metric_run, support, tmp_path / "nowhere", "query must be a folder or a zip file"),
        (metric_run, support, broken, "note.png"),
        (wave_run, support, query, "workdir must be a run on images"),
        (metric_run, alone, alone, "support must hold two classes at least, got 1: oak"),
        (metric_run, support, query, "steps must not be given for prototypical, which takes no inner steps, got -1"),
        (head_run, support, query, "num_steps must be an integer of at least 0, got -1"),
    ]
    flags = [(f"--workdir={run}", f"--support={one}", f"--query={two}") for run, one, two, _ in cases]
    flags[-2:] = [(*given, "--steps=-1") for given in flags[-2:]]
    for (*_, said), text in zip(cases, refusals("adapt", flags), strict=True):
        assert said in text
        assert "\n" not in text


def test_an_error_is_one_line_and_exit_status_2(launch, metric_run, task):
    done = launch("adapt", f"--workdir={metric_run}", f"--support={task[0]}", "--query=nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.strip().splitlines()) == 1
    assert "nowhere" in done.stderr
