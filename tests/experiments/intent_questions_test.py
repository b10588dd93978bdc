"""intent_questions: what is asked, among which choices, and what is refused."""

import json

import pytest

LABELS = {"bank": ["card_lost", "pay", "rate"], "travel": ["book_it", "visa", "bags"]}


@pytest.fixture
def files(tmp_path):
    rows = [[f"say {label} {number}", label] for labels in LABELS.values() for label in labels for number in range(6)]
    (tmp_path / "data.json").write_text(
        json.dumps({"train": rows[::2], "test": rows[1::2], "oos_test": [["x", "oos"]]})
    )
    (tmp_path / "domains.json").write_text(json.dumps(LABELS))
    return tmp_path


def flags(files, **more):
    given = {"data": files / "data.json", "domain": files / "domains.json", "out": files / "out", "choices": 2} | more
    return [f"--{name}={value}" for name, value in given.items()]


def test_questions_of_each_domain(files, launch):
    done = launch("intent_questions", *flags(files))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["18 questions of bank", "18 questions of travel"]
    places, pairs = set(), set()
    for domain, labels in LABELS.items():
        known = {label.replace("_", " ") for label in labels}
        for line in (files / "out" / f"{domain}.jsonl").read_text().splitlines():
            row = json.loads(line)
            assert len(set(row["choices"])) == 2
            assert set(row["choices"]) <= known
            assert row["choices"][row["answer"]].replace(" ", "_") == row["question"].split()[1]
            places.add(row["answer"])
            pairs.add(tuple(row["choices"]))
    assert places == {0, 1}
    assert len(pairs) == 12, "each label beside each other one of its domain, in both orders"


def test_refusals(files, refuses):
    (files / "outside.json").write_text(json.dumps({"../bank": LABELS["bank"], "travel": LABELS["travel"]}))
    (files / "less.json").write_text(json.dumps({"bank": LABELS["bank"]}))
    refuses(
        "intent_questions",
        [
            (flags(files, choices=4), "choices must be at most the labels of each domain, got 4 for bank, travel"),
            (flags(files, choices=1), "choices must be an integer of at least 2, got 1"),
            (flags(files, domain=files / "outside.json"), "names of domains that name files, got '../bank'"),
            (flags(files, domain=files / "less.json"), "domain must hold all labels, got none for "),
            (flags(files, data=files / "no.json"), "no.json"),
        ],
    )
    assert not (files / "out").exists()
    (files / "out").mkdir()
    (files / "out" / "bank.jsonl").write_text("")
    (files / "alike.json").write_text(json.dumps(LABELS | {"bank": [*LABELS["bank"], "card lost"]}))
    refuses(
        "intent_questions",
        [
            (flags(files), "out must be a folder without files of questions"),
            (flags(files, domain=files / "alike.json"), "domain must hold labels that differ without underscores"),
        ],
    )
