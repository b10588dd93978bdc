"""Questions with choices through the launchers: a run on a decoder and on an encoder, another file, adaptation."""

import json

import numpy as np
import pytest
import worlds
from parity import transformers_cases as cases

CONFIG = "experiments/configs/maml_lora_choices.py"


def _questions(kind, count, *, answered=True):
    """The right choice is the word of the kind."""
    rng = np.random.default_rng(kind)
    lines = []
    for _ in range(count):
        choices = [f"w{10 + kind}", *(f"w{number}" for number in rng.choice(np.arange(30, 49), 2, replace=False))]
        place = int(rng.integers(3))
        choices[0], choices[place] = choices[place], choices[0]
        lines.append({"question": f"w{rng.integers(1, 9)} w{rng.integers(1, 9)}", "choices": choices})
        if answered:
            lines[-1]["answer"] = place
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture(scope="module", params=worlds.few_by_default(["llama", "bert"], lambda name: name == "bert"))
def run(tmp_path_factory, launch, request):
    """A run of three steps, the folder of its model beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    model = cases.write(folder / "model", request.param)
    worlds.word_tokenizer(50).save(str(model / "tokenizer.json"))
    (folder / "data").mkdir()
    for kind in range(5):
        (folder / "data" / f"kind{kind}.jsonl").write_text(_questions(kind, 9))
    (folder / "data" / "README.md").write_text("is not read")
    done = launch(
        "train", f"--workdir={folder / 'run'}", f"--config={CONFIG}", f"--config.model.path={model}",
        f"--config.data.files={folder / 'data'}",
        "--config.data.splits={'train':('kind0','kind1'),'val':('kind2',),'test':('kind3',)}",
        "--config.data.max_length=6", "--config.data.length_buckets=(6,)",
        "--config.min_examples=9", "--config.episode.shots=3", "--config.episode.queries=3",
        f"--config.model.remat={'example' if request.param == 'llama' else 'True'}",
        "--config.training.steps=3", "--config.training.meta_batch=2", "--config.validation.every=3",
        "--config.validation.episodes=4", "--config.evaluation.episodes=4", "--config.checkpoint.every=3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_is_evaluated_and_adapts(run, launch):
    results = json.loads((run / "run" / "results.json").read_text())
    assert 0 <= results["accuracy_mean"] <= 1
    other = run / "other.jsonl"
    other.write_text(_questions(7, 12))
    done = launch("evaluate", f"--workdir={run / 'run'}", f"--data={other}", "--episodes=4", "--steps=60")
    assert done.returncode == 0, done.stderr
    (run / "query.jsonl").write_text(_questions(7, 30))
    adapt = ["adapt", f"--workdir={run / 'run'}", f"--support={other}", f"--query={run / 'query.jsonl'}", "--steps=100"]
    done = launch(*adapt)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "maml, 12 support questions"
    assert lines[2].split() == ["question", "predicted", "probability", "true"]
    assert float(lines[-1].split()[1]) > 60, "of three choices, whose right one the support set tells"
    (run / "query.jsonl").write_text(_questions(7, 30, answered=False))
    unknown = launch(*adapt).stdout.splitlines()
    assert unknown[2].split() == ["question", "predicted", "probability"]
    assert [line.split()[:3] for line in unknown[3:]] == [line.split()[:3] for line in lines[3:-1]]


def test_refusals(run, refuses):
    known, bad = f"--workdir={run / 'run'}", run / "bad.jsonl"
    bad.write_text('{"question": "w1", "choices": ["w2", "w3"], "answer": 2}\n')
    (run / "none").mkdir(exist_ok=True)
    cases = [
        ((known, "--shuffle_support"), "shuffle_support must not be given for multiple_choice"),
        ((known, f"--data={bad}"), f"line 1 of '{bad}' must have one of its 2 choices as answer"),
        ((known, f"--data={run / 'none'}"), f"files must be .jsonl or .jsonl.gz, got the folder '{run / 'none'}'"),
        ((known, "--override=learner=prototypical"), "data and learner must be of one task type, got multiple choice"),
    ]
    if run.name.startswith("bert"):
        cases += [
            (
                (known, "--override=data.max_length=13", "--override=data.length_buckets=(13,)"),
                "data.max_length must be at most 12",
            ),
        ]
    refuses("evaluate", cases)
    refuses("adapt", [((known, f"--support={bad}", f"--query={bad}"), f"support: line 1 of '{bad}' must have one")])
