"""`experiments.evaluate` as a process: its result is that of the library, and it refuses what it must."""

import json
import shutil

import jax
import pytest

import metajax


def _library(run, spec=None, episodes=30, seed=0, split="test", steps=None):
    config = metajax.run.load_config(run)
    learner, params = metajax.load_run(run)
    source = metajax.run.open_source(config, split)
    spec = spec or metajax.run.build(config, metajax.run.load_facts(run)).spec
    found = metajax.evaluation.evaluate(learner, params, source, spec, episodes=episodes, seed=seed, num_steps=steps)
    return found, params


def test_the_result_is_that_of_the_library_and_is_written(launch, metric_run):
    done = launch("evaluate", f"--workdir={metric_run}", "--episodes=30")
    assert done.returncode == 0, done.stderr
    expected, params = _library(metric_run)
    assert done.stdout.splitlines()[-1] == expected.summary()
    assert "normalisation  batch" in done.stdout
    assert "transductive" in done.stdout
    written = json.loads((metric_run / "evaluation.json").read_text())
    assert set(written) >= {
        "learner", "ways", "shots", "queries", "episodes", "metric", "accuracy_mean", "accuracy_ci95", "transductive",
        "normalisation", "seed", "data", "split", "params_sha256",
    }  # fmt: skip
    assert written["accuracy_mean"] == pytest.approx(expected.mean, abs=1e-5)
    assert written["accuracy_ci95"] == pytest.approx(expected.ci95, abs=1e-5)
    assert (written["transductive"], written["normalisation"], written["ways"]) == (True, "batch", 4)
    assert written["params_sha256"] == metajax.training.params_sha256(params)


@pytest.mark.slow  # more processes; the first test compares one with the library
def test_other_episodes_and_other_data(launch, metric_run, draw, tmp_path):
    other = draw(tmp_path / "other", [f"other{number}" for number in range(16)], images=6, seed=3, size=10)
    flags = ["--ways=2", "--shots=1", "--queries=4", "--seed=7", f"--data={other}", "--split=test"]
    done = launch("evaluate", f"--workdir={metric_run}", "--episodes=12", *flags)
    assert done.returncode == 0, done.stderr
    written = json.loads((metric_run / "evaluation.json").read_text())
    assert [written[name] for name in ("ways", "shots", "queries", "seed", "episodes")] == [2, 1, 4, 7, 12]
    assert written["data"] == str(other)
    assert done.stdout.splitlines()[-1].endswith("(12 episodes)")


@pytest.mark.slow  # a run of its own for what the tests of metajax.evaluation check in one process
def test_steps_and_fewer_ways_of_a_learner_with_a_head(launch, head_run):
    done = launch("evaluate", f"--workdir={head_run}", "--episodes=30", "--ways=3", "--steps=6")
    assert done.returncode == 0, done.stderr
    expected, _ = _library(head_run, metajax.data.EpisodeSpec(3, 2, 3), steps=6)
    assert done.stdout.splitlines()[-1] == expected.summary()
    assert "inductive" in done.stdout


@pytest.mark.slow  # as above: tests/evaluation/fewshot_test.py checks the metric of a regression
def test_a_regression_run_reports_its_error(launch, wave_run):
    done = launch("evaluate", f"--workdir={wave_run}", "--episodes=30")
    assert done.returncode == 0, done.stderr
    expected, _ = _library(wave_run)
    assert done.stdout.splitlines()[-1] == expected.summary()
    assert expected.summary().startswith("mse ")
    written = json.loads((wave_run / "evaluation.json").read_text())
    assert written["metric"] == "mse"
    assert "accuracy_mean" not in written
    assert written["mse_mean"] == pytest.approx(expected.mean, rel=1e-4)


def test_a_soup_is_the_mean_of_runs(launch, metric_run, shorter_run):
    config, other = metajax.run.load_config(metric_run), shorter_run
    done = launch("evaluate", f"--workdir={metric_run}", "--episodes=30", f"--soup={other},{other}")
    assert done.returncode == 0, done.stderr
    assert f"the mean of its weights and those of {other}, {other}" in done.stdout
    written = json.loads((metric_run / "evaluation.json").read_text())
    (learner, params), (_, more) = metajax.load_run(metric_run), metajax.load_run(other)
    mean = jax.tree.map(lambda one, two: (one + 2 * two) / 3, params, more)
    source = metajax.run.open_source(config, "test")
    spec = metajax.run.build(config, metajax.run.load_facts(metric_run)).spec
    expected = metajax.evaluation.evaluate(learner, mean, source, spec, episodes=30)
    assert written["soup"] == [str(other)] * 2
    assert written["accuracy_mean"] == pytest.approx(expected.mean, abs=2e-3)
    assert written["params_sha256"] not in [
        metajax.training.params_sha256(params),
        metajax.training.params_sha256(more),
    ]


def test_bad_input_is_refused_before_anything_is_written(refusals, metric_run, head_run):
    cases = [
        (head_run, "--ways=5", "ways must be at most 4"),
        (metric_run, "--ways=50", "ways is 50"),
        (metric_run, "--shots=0", "shots must be an integer of at least 1, a pair"),
        (metric_run, "--queries=11", "shots + queries is 2 + 11 = 13"),
        (metric_run, "--episodes=1", "episodes must be an integer of at least 2, got 1"),
        (metric_run, "--seed=-1", "seed must be an integer of at least 0, got -1"),
        (metric_run, "--split=dev", "split must be one of"),
        (metric_run, "--data=nowhere", "'nowhere'"),
        (metric_run, "--steps=2", "steps must not be given"),
        (head_run, "--steps=-1", "num_steps must be an integer of at least 0, got -1"),
        (metric_run, "--workdir=nowhere", "workdir must be the folder of a run"),
        (metric_run, "--checkpoint=first", "checkpoint must be one of"),
        (metric_run, "--soup=nowhere", "workdir must be the folder of a run, with a config.json in it, got 'nowhere'"),
        (metric_run, f"--soup={head_run}", "soup must hold runs that began as workdir did, with model {"),
        (metric_run, "--soup=a,,b", "soup must hold folders of runs, got ['a', '', 'b']"),
        (metric_run, "--soup=a --checkpoint=start", "soup must not be given with --checkpoint=start, got ['a']"),
        (metric_run, "--suite_data=omniglot=x", "suite_data must come with suite, got ['omniglot=x']"),
    ]
    for folder in (metric_run, head_run):
        (folder / "evaluation.json").unlink(missing_ok=True)
    before = [sorted(folder.rglob("*")) for folder in (metric_run, head_run)]
    told = refusals(
        "evaluate", [(f"--workdir={folder}", "--episodes=10", *flags.split()) for folder, flags, _ in cases]
    )
    for (_, flag, said), text in zip(cases, told, strict=True):
        assert said in text, flag
        assert "\n" not in text, flag
    assert [sorted(folder.rglob("*")) for folder in (metric_run, head_run)] == before


def test_an_error_is_one_line_and_exit_status_2(launch, metric_run):
    done = launch("evaluate", f"--workdir={metric_run}", "--ways=50")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.strip().splitlines()) == 1
    assert "ways is 50" in done.stderr


def test_images_that_do_not_fit_the_run_are_named(refusals, head_run, draw, tmp_path):
    config = json.loads((head_run / "config.json").read_text())
    other = draw(tmp_path / "other", [f"other{number}" for number in range(16)], images=6, size=20)
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "checkpoints").symlink_to(head_run / "checkpoints")
    config["data"]["size"] = None  # images keep their size
    (copy / "config.json").write_text(json.dumps(config))
    shutil.copy(head_run / "run.json", copy)
    (told,) = refusals("evaluate", [(f"--workdir={copy}", f"--data={other}", "--ways=2")])
    assert "(20, 20, 1), which do not fit this run" in told
    assert not (copy / "evaluation.json").exists()
