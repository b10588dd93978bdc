"""Texts through the launchers: a run on a pretrained encoder, another file with texts of no class, adaptation."""

import json

import numpy as np
import pytest
import worlds
from parity import transformers_cases as cases

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
    done = launch(
        "train", f"--workdir={folder / 'run'}", f"--config={CONFIG}", f"--config.model.path={model}",
        f"--config.data.path={_clinc(folder / 'data.json', range(6))}",
        f"--config.data.domain={folder / 'domains.json'}", "--config.data.names.train=('auto_and_commute',)",
        "--config.data.names.test=('work',)",
        "--config.data.length=4", "--config.data.buckets=(4,)", "--config.episode.ways=2", "--config.episode.queries=3",
        "--config.train_episode.ways=2", "--config.outer.steps=3", "--config.validation.every=3",
        "--config.validation.episodes=4", "--config.evaluation.episodes=4", "--config.checkpoint.every=3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


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
