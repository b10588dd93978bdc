"""The program of the README on questions with choices: load, adapt to kinds of questions, adapt fast to a new kind."""

import json

import jax
import numpy as np
import pytest
import worlds

import metajax
from metajax.adaptation import _base
from metajax.evaluation import mean_and_interval

DECODER = {"vocab": 50, "width": 32, "depth": 2, "heads": 4}
ENCODER = DECODER | {"positions": 32}
QUESTIONS = [
    {"question": "w1 w2", "choices": ["w3", "w4"], "context": "w5"},
    {"question": "w6", "choices": ["w7", "w8 w9", "w10"]},
    {"question": "w2", "choices": ["w3", "w4"]},
]
TASK = (QUESTIONS, [0, "w8 w9", "w4"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A decoder and an encoder with random weights."""
    folder = tmp_path_factory.mktemp("models")
    for factory, options, limit in (("decoder", DECODER, {"max_length": 32}), ("encoder", ENCODER, {})):
        params = getattr(metajax.models, factory)(**options).init(jax.random.key(0), np.zeros([1, 2], np.int32))
        metajax.save_pretrained_model(
            folder / factory, params, factory=factory, options=options, tokenizer=worlds.word_tokenizer(50), **limit
        )
    return folder


@pytest.fixture(scope="module", params=worlds.few_by_default(["decoder", "encoder"], lambda name: name == "encoder"))
def loaded(folders, request):
    """Logits of tokens, or a new layer of one output."""
    options = {"head": "tokens"} if request.param == "decoder" else {"outputs": 1}
    return metajax.load_pretrained_model(folders / request.param, **options)


def _skill(words, count, rng):
    """The right choice is the word that the question has: which words there are is the kind of question."""
    questions, answers = [], []
    for _ in range(count):
        right, wrong = rng.choice(words, 2, replace=False)
        question = f"w{rng.integers(1, 10)} w{right} w{rng.integers(1, 10)}"
        answers.append(int(rng.integers(2)))
        questions.append({"question": question, "choices": [f"w{wrong}"] * 2, "answer": "not looked at"})
        questions[-1]["choices"][answers[-1]] = f"w{right}"
    return questions, answers


@pytest.mark.slow
def test_after_the_loop_a_new_kind_of_question_is_learned_better(loaded):
    model, rng, gains = loaded, np.random.default_rng(0), []
    for _ in range(3):
        kinds = [_skill(rng.choice(np.arange(10, 35), 8, replace=False), 32, rng) for _ in range(6)]
        model = metajax.adapt_model(model, kinds, steps=40, shots=8, queries=8, outer_rate=1e-2)
    assert int(model.state.step) == 120
    for _ in range(12):
        words = rng.choice(np.arange(35, 50), 8, replace=False)
        support, (questions, answers) = _skill(words, 8, rng), _skill(words, 40, rng)
        scores = [metajax.fast_adapt_model(start, support).score(questions, answers) for start in (loaded, model)]
        gains.append(scores[1] - scores[0])
    mean, interval = mean_and_interval(np.array(gains))
    assert mean > interval


@pytest.mark.slow
def test_without_steps_it_says_what_the_model_says(loaded):
    """Each choice alone, without padding, through `score_choices`."""
    found = metajax.fast_adapt_model(loaded, TASK, steps=0).predict_proba(QUESTIONS)
    model = metajax.models.score_choices(loaded.model)
    for question, row in zip(QUESTIONS, found, strict=True):
        prompt = [int(word[1:]) for word in f"{question.get('context', '')} {question['question']}".split()]
        scores = []
        for choice in question["choices"]:
            tokens = [int(word[1:]) for word in choice.split()]
            inputs = {
                "tokens": np.array([[prompt + tokens]]), "mask": np.ones([1, 1, len(prompt + tokens)], bool),
                "types": np.array([[[0] * len(prompt) + [1] * len(tokens)]]),
                "choice": np.array([[[False] * len(prompt) + [True] * len(tokens)]]),
            }  # fmt: skip
            scores.append(float(model.apply(loaded.params, inputs)[0, 0]))
        expected = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(row, np.pad(expected, (0, 3 - len(scores))), atol=1e-5)


def test_what_adapts_is_told_by_the_support(loaded):
    fast = metajax.fast_adapt_model(loaded, TASK, steps=60, rate=1e-2)
    assert fast.classes_ == ()
    assert fast.predict(QUESTIONS) == ["w3", "w8 w9", "w4"]
    assert fast.score(*TASK) == fast.score(QUESTIONS, [0, 1, 1]) == 1
    assert fast.score(QUESTIONS, [1, 0, 0]) == 0


def test_one_example_at_a_time_adapts_to_the_same(folders):
    """The gradients are the same, and `base.options` decide how the questions go through the model."""
    fast = [
        metajax.fast_adapt_model(metajax.load_pretrained_model(folders / "decoder", head="tokens", remat=remat), TASK)
        for remat in (True, "example")
    ]
    np.testing.assert_allclose(*(model.predict_proba(QUESTIONS) for model in fast), atol=1e-4)
    assert [_base.adaptable(model.base, model.rank).one_by_one for model in fast] == [False, True]


def test_what_is_saved_predicts_the_same(loaded, tmp_path):
    model = metajax.adapt_model(loaded, TASK, steps=2, shots=1, queries=1, rank=2)
    fast = metajax.fast_adapt_model(model, TASK)
    fast.save(tmp_path / "fast")
    again = type(fast).load(tmp_path / "fast")
    assert (again.classes_, again.rank) == ((), 2)
    np.testing.assert_allclose(again.predict_proba(QUESTIONS), fast.predict_proba(QUESTIONS), atol=1e-6)
    assert again.predict(QUESTIONS) == fast.predict(QUESTIONS)
    told = json.loads((tmp_path / "fast/fast_model.json").read_text())
    (tmp_path / "fast/fast_model.json").write_text(json.dumps(told | {"classes": ["a", "b"], "ways": 8}))
    with pytest.raises(ValueError, match=r"fast_model.json' must hold no classes, got \('a', 'b'\)"):
        type(fast).load(tmp_path / "fast")


def test_files_and_sources_are_the_same_task(folders, loaded, tmp_path):
    lines = [question | {"answer": answer} for question, answer in zip(*TASK, strict=True)]
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = metajax.data.multiple_choice(path, tokenizer=folders / "decoder", max_length=20, splits={"train": 1})
    expected, *others = (
        metajax.fast_adapt_model(loaded, task, steps=3).predict_proba(QUESTIONS) for task in (TASK, path, source)
    )
    for found in others:
        np.testing.assert_allclose(found, expected, atol=1e-6)
    first, *rest = (
        metajax.adapt_model(loaded, task, steps=3, shots=1, queries=1).history["loss"]
        for task in (TASK, path, source, [source, path])
    )
    for losses in rest[:2]:
        np.testing.assert_allclose(losses, first, rtol=1e-5)


def test_the_next_task_compiles_nothing(loaded, caplog):
    def compiled(task):
        caplog.clear()
        with jax.log_compiles():
            metajax.fast_adapt_model(loaded, task, steps=7).predict(task[0])
        return [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]

    assert compiled(TASK)
    assert not compiled(([QUESTIONS[1]] * 4, [2] * 4))


def test_long_prompts_lose_their_beginning_with_a_warning(loaded):
    fast = metajax.fast_adapt_model(loaded, TASK, steps=1)
    words = [f"w{1 + number}" for number in range(40)]
    ask = lambda context: [QUESTIONS[0] | {"context": context}]  # noqa: E731
    with pytest.warns(UserWarning, match="1 of 1 inputs have more than 32 tokens, and lose their beginnings"):
        found = fast.predict_proba(ask(" ".join(words)))
    np.testing.assert_allclose(found, fast.predict_proba(ask(" ".join(words[-29:]))), rtol=1e-5)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("no/such.jsonl", "does not exist"),
        (__file__, "files must end in .jsonl,"),
        ((["w1"], ["w2"]), r"index 0 of questions must be a question, \{'question': .*\}, got 'w1'"),
        (("w1", [0]), "questions must be a list of one question or more, got 'w1'"),
        (([], []), r"questions must be a list of one question or more, got \[\]"),
        ((QUESTIONS, [0, 1]), "answers must be one for each of the 3 questions, got 2"),
        ((QUESTIONS, None), "answers must be a list of places or texts of right choices, got None"),
        ((QUESTIONS, 3), "answers must be a list of places or texts of right choices, got 3"),
        ((np.array(QUESTIONS[0]), [0]), "questions must be a list of one question or more"),
        (([{"question": "w1", "choices": ["w1", "w1"]}], [0]), r"must have different choices, got \('w1', 'w1'\)"),
        ((QUESTIONS, [0, 1, 2]), "index 2 of questions must have one of its 2 choices as answer, from 0 on, got 2"),
        ((QUESTIONS, [0, 1, "w9"]), "index 2 of questions has the answer 'w9', which is not among its choices"),
        (([{"question": " ", "choices": ["w1", "w2"]}], [0]), "index 0 of questions has an empty question"),
        (([{"question": "w1", "choices": ["w1"]}], [0]), "must have a list of 2 choices at least"),
        (([{"question": "w1", "choices": ["w1", "w2 " * 40]}], [0]), "max_length, 32, must leave room"),
        (metajax.data.glyphs("val"), "task must be a .jsonl file of questions .*, which the model takes"),
        (7, "task must be a .jsonl file of questions .*, got 7"),
    ],
)
def test_refusals(loaded, task, said):
    for adapt in (metajax.fast_adapt_model, metajax.adapt_model):
        with pytest.raises(ValueError, match=said):
            adapt(loaded, task)


def test_refused_options(folders, loaded):
    with pytest.raises(ValueError, match="ways must be 1 for questions, which bring their choices, got 5"):
        metajax.adapt_model(loaded, TASK, ways=5)
    with pytest.raises(ValueError, match=r"learner must be one of .*maml.*, got 'prototypical'"):
        metajax.adapt_model(loaded, TASK, learner="prototypical")
    features = metajax.load_pretrained_model(folders / "encoder")
    with pytest.raises(ValueError, match=r"inputs must be texts, got a dict at index 0: questions .* \(head='tokens'"):
        metajax.fast_adapt_model(features, TASK)
    for outputs in (2, DECODER["vocab"]):
        tagger = metajax.load_pretrained_model(folders / "encoder", head="tokens", outputs=outputs)
        with pytest.raises(ValueError, match=r"model must give features \[n, d\].*outputs=1\); got head="):
            metajax.fast_adapt_model(tagger, TASK)
    with pytest.raises(ValueError, match="labels must be a list of places or texts of right choices, got None"):
        metajax.fast_adapt_model(loaded, TASK, steps=0).score(QUESTIONS, None)
    for model in (loaded, metajax.adapt_model(loaded, TASK, steps=1, shots=1, queries=1)):
        with pytest.raises(ValueError, match="model must give features of texts or images, got one that scores"):
            metajax.FewShotClassifier(model).fit(*TASK)


TOKENS = np.ones([3, 3, 4], np.int32)
MASK = np.ones([3, 3, 4], bool)
SOURCE = {"inputs": {"tokens": TOKENS, "mask": MASK, "choice": MASK}, "targets": np.zeros(3, np.int32)}


def _inputs(**leaves):
    return {"inputs": SOURCE["inputs"] | leaves}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"targets": np.array([9, 0, 0])}, "targets of .*mine.* must be places of choices, got 9"),
        (
            _inputs(mask=MASK & (np.arange(3) != 2)[:, None]) | {"targets": np.array([0, 2, 0])},
            "targets of .*mine.* must be places of choices, got 2",
        ),
        ({"targets": None}, "targets of .*mine.* must be 3 places of right choices, got None"),
        ({"targets": np.zeros([3, 2], int)}, "targets of .*mine.* must be 3 places of right choices"),
        ({"targets": np.full(3, 0.7)}, "targets of .*mine.* must be 3 places of right choices"),
        ({"labels": np.full(3, -1)}, "labels of .*mine.* must keep one question at least"),
        (_inputs(mask=MASK.astype(int)), r"mask of .*mine.* must be bool.* of shape \[n, choices, length\], got int64"),
        (_inputs(choice=~MASK), "choice of .*mine.* must pick a token of each choice that is there"),
        (_inputs(tokens=TOKENS * 77), "tokens of .*mine.* must be from 0 to 49, got 77"),
        ({"inputs": {name: leaf[:, 0] for name, leaf in SOURCE["inputs"].items()}}, r"of shape \[n, choices, length\]"),
    ],
)
def test_refused_sources(loaded, change, said):
    fields = {"labels": np.zeros(3, int), "class_names": ("a",)} | SOURCE | change
    with pytest.raises(ValueError, match=said):
        metajax.fast_adapt_model(loaded, metajax.data.ClassSource("mine", "train", **fields))


def test_a_folder_is_a_task_and_damage_is_seen(loaded, tmp_path):
    lines = [json.dumps(question | {"answer": answer}) for question, answer in zip(*TASK, strict=True)]
    (tmp_path / "kinds").mkdir()
    with pytest.raises(
        ValueError, match=r"files must be .jsonl or .jsonl.gz, got the folder '.*kinds', which has none"
    ):
        metajax.fast_adapt_model(loaded, tmp_path / "kinds")
    for place, line in enumerate(lines):
        (tmp_path / "kinds" / f"kind{place}.jsonl").write_text(line + "\n")
    fast = metajax.fast_adapt_model(loaded, tmp_path / "kinds", steps=2)
    expected = metajax.fast_adapt_model(loaded, TASK, steps=2).predict_proba(QUESTIONS)
    np.testing.assert_allclose(fast.predict_proba(QUESTIONS), expected, atol=1e-6)
    fast.save(tmp_path / "fast")
    worlds.word_tokenizer(90).save(str(tmp_path / "fast/tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer must have at most 50 tokens, .* got 90: it is of another model"):
        type(fast).load(tmp_path / "fast")
