"""Texts through the launchers: a run on a pretrained encoder, another file with texts of no class, adaptation."""

import json
import re
import shutil

import numpy as np
import pytest
import safetensors.numpy
import worlds
from parity import transformers_cases as cases

import metajax
from metajax import data, evaluation, pretrained
from metajax.core import _tree
from metajax.training._checkpoint import restore_params

CONFIG = "experiments/configs/proto_lora_clinc.py"


def _texts(label, count, rng):
    """Texts of three words, two of them of the label's own."""
    words = [f"w{1 + 4 * label + number}" for number in range(4)]
    return [" ".join([*rng.choice(words, 2), f"w{rng.integers(1, 49)}"]) for _ in range(count)]


def _clinc(path, labels, *, outside=False):
    rng = np.random.default_rng(labels[0])
    parts = {"train": [[text, f"intent{label}"] for label in labels for text in _texts(label, 8, rng)]}
    if outside:
        parts["oos_test"] = [[text, "oos"] for text in _texts(11, 12, rng)]
    path.write_text(json.dumps(parts))
    return path


def _train_command(folder, name, *flags):
    """Three steps, with the model and the data that lie in a folder."""
    return [
        "train", f"--workdir={folder / name}", f"--config={CONFIG}", f"--config.model.path={folder / 'model'}",
        f"--config.data.files={folder / 'data.json'}", f"--config.data.domain={folder / 'domains.json'}",
        "--config.data.splits.train=('auto_and_commute',)", "--config.data.splits.test=('work',)",
        "--config.data.max_length=4", "--config.data.length_buckets=(4,)",
        "--config.episode.ways=2", "--config.episode.queries=3",
        "--config.train_episode.ways=2", "--config.training.steps=3", "--config.validation.every=3",
        "--config.validation.episodes=4", "--config.evaluation.episodes=4", "--config.checkpoint.every=1", *flags,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, launch):
    """A run of three steps, the folder of its model beside it."""
    folder = tmp_path_factory.mktemp("text")
    model = cases.write(folder / "model", "bert")
    worlds.word_tokenizer(50).save(str(model / "tokenizer.json"))
    domains = {
        "auto_and_commute": ["intent0", "intent1"],
        "small_talk": ["intent2", "intent3"],
        "work": ["intent4", "intent5"],
    }
    (folder / "domains.json").write_text(json.dumps(domains))
    _clinc(folder / "data.json", range(6))
    done = launch(*_train_command(folder, "run"))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_evaluation_on_other_texts(run, launch):
    other = _clinc(run / "other.json", [6, 7, 8, 9], outside=True)
    done = launch(
        "evaluate", f"--workdir={run / 'run'}", f"--data={other}", "--ways=4", "--shots=4", "--episodes=40",
        "--shuffle_support", "--checkpoint=start",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the pretrained weights, before meta-training" in done.stdout
    found = json.loads((run / "run" / "evaluation.json").read_text())
    assert found["ways"] == 4
    assert found["accuracy_mean"] > 0.4  # chance is 0.25; words of the class are two of three
    assert abs(found["shuffled_support_accuracy_mean"] - 0.25) < 0.08
    assert 0 < found["oos_auroc_mean"] <= 1  # the words of no class are as those of classes: the encoder is random


def test_evaluation_computes_the_features_of_a_text_once_and_predicts_the_same(run):
    config = metajax.run.load_config(run / "run")
    learner, params = metajax.run.load_run(run / "run")
    facts = metajax.run.load_facts(run / "run")
    source, spec = metajax.run.open_source(config, "test"), metajax.run.build(config, facts).spec
    deployed, known, (features, none) = metajax.run.on_features(config, facts, learner, params, source, None)
    assert known == {}
    assert none is None
    assert features.inputs.shape == (len(source.labels), 16)
    once, anew = (
        evaluation.evaluate(*parts, spec, episodes=6)
        for parts in ((deployed, known, features), (learner, params, source))
    )
    np.testing.assert_allclose(once.values, anew.values)


def test_checkpoints_of_adapters_hold_adapters_and_name_their_base(run):
    checkpoints = run / "run" / "checkpoints"
    kept, _ = restore_params(checkpoints, base=json.loads((run / "run" / "run.json").read_text())["base_sha256"])
    assert all("lora" in path for path in _tree.paths(kept))
    _, params = metajax.run.load_run(run / "run")
    assert not _tree.gaps(params)
    loaded = pretrained.load_pretrained_model(run / "model").params
    np.testing.assert_array_equal(params["embed"]["embedding"], loaded["embed"]["embedding"])
    with pytest.raises(ValueError, match="base must be that of the checkpoint"):
        restore_params(checkpoints)


def test_a_run_over_a_frozen_base_goes_on_as_if_it_had_not_stopped(run, launch):
    done = launch(*_train_command(run, "stopped"))
    assert done.returncode == 0, done.stderr
    (run / "stopped" / "results.json").unlink()
    shutil.rmtree(run / "stopped" / "checkpoints" / "last" / "3")  # as after a kill in the last step
    done = launch(*_train_command(run, "stopped", "--resume"))
    assert done.returncode == 0, done.stderr
    assert "resuming at step 2" in done.stdout
    first, again = (json.loads((run / name / "results.json").read_text()) for name in ("run", "stopped"))
    assert first["params_sha256"] == again["params_sha256"]


@pytest.mark.slow
def test_a_run_begins_with_the_adapters_of_another_over_the_same_base(run, launch, tmp_path):
    done = launch(*_train_command(run, "second", f"--config.init={run / 'run'}"))
    assert done.returncode == 0, done.stderr
    assert re.search(r"begins with \d+ arrays of .*run \(step 3\); new: none", done.stdout)
    other = shutil.copytree(run / "model", tmp_path / "model")
    weights = safetensors.numpy.load_file(other / "model.safetensors")
    name = next(iter(weights))
    safetensors.numpy.save_file({**weights, name: weights[name] + 1}, other / "model.safetensors")
    flags = [f"--config.init={run / 'run'}", f"--config.model.path={other}"]
    done = launch(*[*_train_command(run, "third"), *flags])
    assert done.returncode == 2
    assert "base must be that of the checkpoint in" in done.stderr
    moved = metajax.run.changed(metajax.run.load_config(run / "run"), [f"model.path={other}"])
    with pytest.raises(ValueError, match="must hold the weights that the run was trained over"):
        metajax.run.load_run(run / "run", config=moved)


@pytest.mark.slow
def test_another_learner_over_the_weights_that_a_run_began_with(run, launch):
    command = ["evaluate", f"--workdir={run / 'run'}", "--episodes=4", f"--output={run / 'other_learner.json'}"]
    tuned = ["learner=maml", "learner.adapts=lora|head", "learner.inner=adam", "learner.inner.rate=0.01"]
    flags = [f"--override={setting}" for setting in tuned]
    done = launch(*command, *flags, "--steps=2", "--checkpoint=start")
    assert done.returncode == 0, done.stderr
    found = json.loads((run / "other_learner.json").read_text())
    assert (found["learner"], found["override"]) == ("maml", tuned)
    done = launch(*command, *flags)  # what was meta-trained has no head
    assert done.returncode == 2
    assert "do not fit this run: they need ['head']['bias']" in done.stderr


@pytest.mark.parametrize(
    "name", worlds.few_by_default(["meta_sgd", "bayesian", "finetune"], lambda name: name == "finetune")
)
def test_learners_with_parts_begin_with_the_pretrained_weights_too(run, name):
    inner = ["learner.rate=0.01"] if name == "meta_sgd" else ["learner.inner=sgd", "learner.inner.learning_rate=0.01"]
    config = metajax.run.changed(metajax.run.load_config(run / "run"), [f"learner={name}", *inner])
    spec = metajax.run.build(config, metajax.run.load_facts(run / "run")).spec
    source = metajax.run.open_source(config, "test")
    inputs = data.episode(source, spec, seed=0, index=0).query.inputs
    learner, params = metajax.run.load_run(run / "run", checkpoint="start", config=config, inputs=inputs)
    loaded = pretrained.load_pretrained_model(config["model"]["path"]).params
    network = params["mean" if name == "bayesian" else "backbone"]
    np.testing.assert_array_equal(network["embed"]["embedding"], loaded["embed"]["embedding"])
    assert np.isfinite(evaluation.evaluate(learner, params, source, spec, episodes=2).mean)


def test_a_head_over_the_frozen_weights_that_a_run_began_with(run, launch):
    flags = [
        f"--override={setting}"
        for setting in (
            "frozen=True",
            "wrap={}",
            "learner=finetune",
            "learner.inner=sgd",
            "learner.inner.learning_rate=0.4",
        )
    ]
    output = run / "frozen.json"
    done = launch(
        "evaluate", f"--workdir={run / 'run'}", "--episodes=10", f"--output={output}", "--checkpoint=start",
        "--steps=20", *flags,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert (found["learner"], found["checkpoint"]) == ("finetune", "start")
    assert found["accuracy_mean"] > 0.5
    config = metajax.run.changed(metajax.run.load_config(run / "run"), [flag.split("=", 1)[1] for flag in flags])
    with pytest.raises(ValueError, match="inputs must be given for the start of a run, got None"):
        metajax.run.load_run(run / "run", checkpoint="start", config=config)


def test_what_does_not_fit_together_is_refused_before_the_work(run, refuses, tmp_path):
    other, known = _clinc(tmp_path / "other.json", [6, 7, 8, 9]), f"--workdir={run / 'run'}"
    wide = worlds.word_tokenizer(90)
    wide.save(str(tmp_path / "wide.json"))
    long = _clinc(tmp_path / "wide_data.json", range(20, 24))  # of words that the model does not have
    refuses(
        "evaluate",
        [
            ((known, "--names=work", f"--data={other}"), "names must not be given with data"),
            ((known, f"--output={tmp_path / 'nowhere' / 'x.json'}"), "output must be a file in a folder that exists"),
            ((known, f"--output={tmp_path}"), "output must be a file in a folder that exists"),
            (
                (known, "--override=data.max_length=13", "--override=data.length_buckets=(13,)"),
                "data.max_length must be at most 12, which the model has positions for",
            ),
            (
                (known, f"--data={long}", f"--override=data.tokenizer={tmp_path / 'wide.json'}"),
                "data.tokenizer must be that of the model, whose tokens are from 0 to 49, got token",
            ),
        ],
    )


def test_a_frozen_run_is_of_its_weights(run, launch, tmp_path):
    """They are in no checkpoint: what was trained over others is refused."""
    model, folder = shutil.copytree(run / "model", tmp_path / "model"), tmp_path / "run"
    command = [
        "train", f"--workdir={folder}", "--config=experiments/configs/maml_lora_clinc.py",
        f"--config.model.path={model}", "--config.frozen=True", "--config.wrap={}", "--config.learner.adapts=",
        "--config.training.trainable=", f"--config.data.files={run / 'data.json'}",
        f"--config.data.domain={run / 'domains.json'}", "--config.data.splits.train=('auto_and_commute',)",
        "--config.data.splits.test=('work',)", "--config.data.max_length=4", "--config.data.length_buckets=(4,)",
        "--config.episode.ways=2", "--config.episode.queries=3", "--config.train_episode.ways=2",
        "--config.training.steps=2", "--config.validation.every=2", "--config.validation.episodes=4",
        "--config.evaluation.episodes=4", "--config.checkpoint.every=2",
    ]  # fmt: skip
    done = launch(*command)
    assert done.returncode == 0, done.stderr
    metajax.run.load_run(folder)
    (tmp_path / "support.csv").write_text("text,label\nw25 w26,a\nw29 w30,b\n")
    files = [f"--{name}={tmp_path / 'support.csv'}" for name in ("support", "query")]
    done = launch("adapt", f"--workdir={folder}", *files, "--checkpoint=start")  # a new head over these weights
    assert done.returncode == 0, done.stderr
    weights = safetensors.numpy.load_file(model / "model.safetensors")
    safetensors.numpy.save_file({name: leaf + 1 for name, leaf in weights.items()}, model / "model.safetensors")
    with pytest.raises(ValueError, match="must hold the weights that the run was trained over, got others"):
        metajax.run.load_run(folder)
    done = launch(*command, "--resume")
    assert done.returncode == 2
    assert "model.path must hold the weights that the run was trained over" in done.stderr


def test_evaluation_on_some_domains_of_the_run(run, launch):
    command = ["evaluate", f"--workdir={run / 'run'}", "--episodes=4", f"--output={run / 'names.json'}"]
    done = launch(*command, "--names=work")
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "names.json").read_text())["episodes"] == 4
    done = launch(*command, "--names=small_talk")
    assert done.returncode == 2
    told = "names must be among those that data.splits of the run has for test, ('work',), got ['small_talk']"
    assert told in done.stderr


def test_adaptation_to_a_file_of_texts(run, launch):
    flags = [f"--workdir={run / 'run'}", f"--support={run / 'support.jsonl'}", f"--query={run / 'query.csv'}"]
    rng = np.random.default_rng(3)
    rows = [{"text": text, "label": f"intent{label}"} for label in (6, 7) for text in _texts(label, 4, rng)]
    (run / "support.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (run / "query.csv").write_text("text,label\nw25 w26 w27,intent6\nw29 w30 w31 w32 w29 w30,intent7\n")
    done = launch("adapt", *flags)
    assert done.returncode == 0, done.stderr
    assert "accuracy 100.00 % (2 texts)" in done.stdout
    assert "truncated" in done.stdout
    (run / "query.csv").write_text("text,label\nw25 w26,intent9\n")
    done = launch("adapt", *flags)
    assert done.returncode == 2
    assert "must hold classes of support (intent6, intent7), got 'intent9'" in done.stderr


def _parallel(folder, languages, articles=6):
    """Files of SQuAD's format: in article a the answer is the word behind w1."""
    for shift, language in enumerate(languages):
        content = []
        for a in range(articles):
            context, answer = f"w{2 + a} w1 w{20 + shift + a} w{9 + a} w3", f"w{20 + shift + a}"
            answers = [{"text": answer, "answer_start": context.find(answer)}]
            rows = [{"id": f"{a}-{q}", "question": f"w{30 + q}", "answers": answers} for q in range(6)]
            content.append({"title": f"T{a}", "paragraphs": [{"context": context, "qas": rows}]})
        (folder / f"qa.{language}.json").write_text(json.dumps({"version": "1.1", "data": content}))
    return folder / "qa.{}.json"


@pytest.mark.slow
def test_a_run_on_questions_is_judged_by_f1(run, launch):
    data = _parallel(run, ["en", "de", "fr"])
    flags = [
        f"--workdir={run / 'answers'}", "--config=experiments/configs/reptile_lora_xquad.py",
        f"--config.model.path={run / 'model'}", "--config.data.max_length=8", "--config.data.length_buckets=(8,)",
        "--config.data.overlap=2", "--config.min_examples=0",
        "--config.data.languages.train=('en','de')", "--config.data.languages.test=('fr',)",
        "--config.episode.shots=2", "--config.episode.queries=2", "--config.train_episode.shots=4",
        "--config.learner.inner.rate=0.02", "--config.learner.batch_size=2", "--config.training.steps=4",
        "--config.validation.every=4", "--config.validation.episodes=4", "--config.evaluation.episodes=8",
        "--config.checkpoint.every=4",
    ]  # fmt: skip
    done = launch("train", *flags, f"--config.data.files={data}")
    assert done.returncode == 0, done.stderr
    results = json.loads((run / "answers" / "results.json").read_text())
    assert results["metric"] == "f1"
    assert 0 <= results["f1_before_mean"] <= 1
    assert results["f1_gain_mean"] == pytest.approx(results["f1_mean"] - results["f1_before_mean"])
    assert (
        done.stdout.splitlines()[-1]
        == f"f1 {100 * results['f1_mean']:.2f} +- {100 * results['f1_ci95']:.2f} % (8 episodes)"
    )
    assert (run / "answers" / "report.png").stat().st_size > 10_000
    done = launch(
        "evaluate", f"--workdir={run / 'answers'}", f"--data={run / 'qa.en.json'}", "--checkpoint=start", "--episodes=4"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((run / "answers" / "evaluation.json").read_text())
    assert (found["metric"], found["checkpoint"], found["episodes"]) == ("f1", "start", 4)


@pytest.mark.slow
def test_a_prompt_needs_no_training(run, launch):
    model = cases.write(run / "decoder", "llama")
    worlds.word_tokenizer(50).save(str(model / "tokenizer.json"))
    done = launch(
        "train", f"--workdir={run / 'prompt'}", "--config=experiments/configs/icl_decoder.py",
        f"--config.model.path={model}", f"--config.data.files={run / 'data.json'}",
        f"--config.data.domain={run / 'domains.json'}", "--config.data.splits.train=('auto_and_commute',)",
        "--config.data.splits.test=('work',)", "--config.data.max_length=4", "--config.data.length_buckets=(4,)",
        "--config.learner.labels=('w40', 'w41')", "--config.learner.separator=w42", "--config.learner.end=w43",
        "--config.learner.content_free=w44", "--config.episode.ways=2", "--config.training.steps=2",
        "--config.validation.every=2", "--config.validation.episodes=4", "--config.evaluation.episodes=4",
        "--config.checkpoint.every=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = launch("evaluate", f"--workdir={run / 'prompt'}", "--checkpoint=start", "--episodes=10")
    assert done.returncode == 0, done.stderr
    found = json.loads((run / "prompt" / "evaluation.json").read_text())
    assert (found["learner"], found["checkpoint"]) == ("in_context", "start")
    assert 0 < found["accuracy_mean"] < 1
    for settings in ((), ("--override=wrap={}", "--override=frozen=True")):
        done = launch(
            "evaluate", f"--workdir={run / 'prompt'}", "--checkpoint=start", "--episodes=4",
            "--override=learner=prototypical", "--override=model.head=features", *settings,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr  # of the decoder's features
