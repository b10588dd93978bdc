"""Exact match and F1 by hand, spans against a search over all, and `answers` against tables of right answers."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax import core, learners
from metajax.data import AnswerSource, EpisodeSpec, Question, episode, episode_batch, question_answering
from metajax.evaluation import answer_scores, answers, best_span, evaluate


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], 1, 1),
        ("eiffel  tower\n", ["An Eiffel-Tower", "a the Eiffel tower"], 1, 1),
        ("24", ["24\u201310"], 0, 0),  # a dash that is not ASCII stays, and joins
        ("24-10", ["2410"], 1, 1),
        ("Denver Broncos won", ["Broncos"], 0, 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("b b c", ["b c c"], 0, 2 / 3),  # two words in common, of three and three
        ("north", ["south", "north pole", "far north"], 0, 2 / 3),
        ("east", ["west"], 0, 0),
        ("another theory", ["other ory"], 0, 0),  # articles are words of their own
        ("", ["word"], 0, 0),
        ("the", ["a"], 1, 0),  # nothing is left of either: v1.1 calls it a match without words in common
        ("die Stadt", ["Stadt"], 0, 2 / 3),
        ("中国人", ["中国"], 0, 0),
    ],
)
def test_squad(prediction, answers, exact, f1):
    assert answer_scores(prediction, answers) == pytest.approx((exact, f1))


@pytest.mark.parametrize(
    ("language", "prediction", "answers", "exact", "f1"),
    [
        ("de", "die Stadt", ["Stadt"], 1, 1),
        ("de", "the city", ["city"], 0, 2 / 3),
        ("en", "24\u201310", ["2410"], 1, 1),  # punctuation of Unicode
        ("es", "¿La casa?", ["una casa"], 1, 1),
        ("ru", "в «Москве»", ["Москве"], 0, 2 / 3),
        ("vi", "những con mèo", ["con mèo"], 1, 1),
        ("hi", "a house", ["house"], 0, 2 / 3),
        ("ar", "\u0627\u0644\u0628\u064a\u062a", ["\u0628\u064a\u062a"], 1, 1),
        ("zh", "中国人", ["中国"], 0, 2 * (2 / 3) / (2 / 3 + 1)),
        ("zh", "308分\uff0c", ["308 分"], 1, 1),
        ("zh", "NFL 联盟", ["NFL"], 0, 2 * (1 / 3) / (1 / 3 + 1)),
    ],
)
def test_mlqa(language, prediction, answers, exact, f1):
    assert answer_scores(prediction, answers, language=language) == pytest.approx((exact, f1))


def test_refusals_of_scores():
    for wrong in ([], "text"):
        with pytest.raises(ValueError, match="answers must be a list of at least one text"):
            answer_scores("text", wrong)
    with pytest.raises(ValueError, match=r"language must be one of 'ar', .*, got 'xx'"):
        answer_scores("text", ["text"], language="xx")


@pytest.mark.parametrize("max_answer", [1, 3, 50])
def test_best_span_is_the_best_of_all(max_answer):
    rng = np.random.default_rng(max_answer)
    logits = rng.normal(size=(5, 20, 9, 2)).astype(np.float32)
    first = rng.integers(0, 9, (5, 20, 1))
    place = np.arange(9)
    context = (place >= first) & (place <= rng.integers(first, 9))
    start, end, score = map(
        np.asarray, jax.jit(best_span, static_argnames="max_answer")(logits, context, max_answer=max_answer)
    )
    for index in np.ndindex(5, 20):
        found = [
            (logits[index][i, 0] + logits[index][j, 1], i, j)
            for i, j in itertools.product(range(9), repeat=2)
            if i <= j < i + max_answer and context[index][i] and context[index][j]
        ]
        best = max(found)
        assert (start[index], end[index]) == best[1:]
        assert score[index] == best[0]


def test_spans_of_nothing_and_of_what_is_not_finite():
    logits = jnp.zeros([4, 3, 2]).at[1, 1, 0].set(jnp.nan).at[2, 1, 1].set(jnp.inf).at[3, 0, 0].set(jnp.nan)
    context = jnp.array([[False] * 3, [True] * 3, [True] * 3, [False, True, True]])
    start, end, score = best_span(logits, context)
    assert start.tolist() == [-1, -1, -1, 1]
    assert end.tolist() == [-1, -1, -1, 1]
    assert score.tolist() == [-np.inf, -np.inf, -np.inf, 0], "what stands outside of the context does not count"
    with pytest.raises(ValueError, match=r"logits must be \[..., length, 2\] for context \(2, 3\), got \(2, 3\)"):
        best_span(jnp.zeros([2, 3]), jnp.ones([2, 3], bool))
    with pytest.raises(ValueError, match="max_answer must be an integer of at least 1, got 0"):
        best_span(logits, context, max_answer=0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """4 articles of 4 questions; some contexts have several windows. One answer of each article fits into none."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra 'text'")
    words = ["[UNK]", *(f"w{k}" for k in range(30))]
    encoder = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: k for k, word in enumerate(words)}, "[UNK]"))
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("answers")
    encoder.save(str(folder / "tokenizer.json"))
    articles = []
    for a in range(4):
        short, long = (" ".join(f"w{k}" for k in range(a, a + size)) for size in (5, 14))
        qas = [
            [(f"{a}-0", f"w{a}", short), (f"{a}-1", f"w{a + 2} w{a + 3}", short)],
            [(f"{a}-2", f"w{a + 9}", long), (f"{a}-3", f"w{a + 13}", long), (f"{a}-4", long, long)],
        ]
        articles.append({"title": f"T{a}", "paragraphs": [
            {"context": lines[0][2], "qas": [
                {"id": key, "question": f"w{20 + int(key[-1])}", "answers": [
                    {"text": text, "answer_start": context.find(text)}
                ]}
                for key, text, context in lines
            ]} for lines in qas
        ]})  # fmt: skip
    (folder / "en.json").write_text(json.dumps({"data": articles}))
    return question_answering(
        {"en": folder / "en.json"}, tokenizer=folder, split="test", splits={"test": 1}, max_length=8, overlap=3
    )


SPEC = EpisodeSpec(ways=1, shots=1, queries=2)


def oracle(source):
    """A model that knows where each window's answer stands, once it has taken a step; a parameter turns it on."""
    truth = {
        tuple(source.inputs["tokens"][row]): source.targets[row] for row in range(len(source.targets))
        if source.targets[row, 0] >= 0
    }  # fmt: skip
    keys, spans = np.array(list(truth)), np.array(list(truth.values()))

    def apply(params, inputs):
        tokens = jnp.pad(inputs["tokens"], [(0, 0), (0, keys.shape[1] - inputs["tokens"].shape[1])])
        same = (tokens[:, None] == keys).all(-1)
        span = jnp.where(same.any(-1)[:, None], jnp.asarray(spans)[same.argmax(-1)], -1)
        there = jnp.arange(inputs["tokens"].shape[1])[:, None] == span[:, None]
        return 20.0 * there * jnp.tanh(params)

    return metajax.Model(lambda key, inputs: jnp.zeros([]), apply)


def maml(model):
    return learners.maml(model, optax.sgd(10.0), loss=core.span_cross_entropy)


def test_the_oracle_is_right_after_adaptation_only(source):
    model = oracle(source)
    learner = maml(model)
    done = []
    found = evaluate(learner, jnp.zeros([]), source, SPEC, episodes=30, batch=7, progress=done.append)
    assert done == [7, 14, 21, 28, 30]
    assert (found.metric, found.mean, found.ci95, found.transductive) == ("f1", 1.0, 0.0, False)
    assert found.scores["exact_match"].mean() == 1.0, "the window with the answer wins over the others"
    assert found.before["exact_match"].mean() < 0.6
    assert found.scores["f1"].shape == found.before["exact_match"].shape == (30,)
    assert (found.episodes, found.seed, found.spec) == (30, 0, SPEC)
    table = str(found)
    assert "1 support and 2 query examples" in table
    assert "left out       4 questions" in table
    assert [table.splitlines()[line] for line in (-3, -1)] == [
        "after          exact match 100.00 +- 0.00 %, f1 100.00 +- 0.00 %", "f1 100.00 +- 0.00 % (30 episodes)"
    ]  # fmt: skip
    again = evaluate(learner, jnp.zeros([]), source, SPEC, episodes=30, num_steps=0, before=False)
    np.testing.assert_array_equal(again.values, found.before["f1"])
    assert again.before is None


def test_values_are_those_of_the_episodes(source):
    """Before adaptation all logits are equal, and the first token of the first window is the answer."""
    found = evaluate(maml(oracle(source)), jnp.zeros([]), source, SPEC, episodes=25, seed=3)
    for index in range(25):
        questions = [source.questions[place] for place in episode(source, SPEC, seed=3, index=index).query.inputs["id"]]
        expected = [answer_scores(question.context.split()[0], question.answers) for question in questions]
        values = [found.before[name][index] for name in ("exact_match", "f1")]
        np.testing.assert_allclose(values, np.mean(expected, axis=0))
    gains = found.values - found.before["f1"]  # of the same episodes: a narrower interval
    assert found.gain == (pytest.approx(gains.mean()), pytest.approx(1.96 * gains.std(ddof=1) / len(gains) ** 0.5))
    assert f"gain           f1 {100 * gains.mean():+.2f} +- " in str(found)


def test_nothing_of_the_answer_is_seen(source):
    """The model reads all windows of the query's questions, whichever of them holds the answer."""
    seen = []

    def apply(params, inputs):
        def tell(tokens, mask):
            seen.append({tuple(line) for line in np.asarray(tokens)[np.asarray(mask).any(-1)]})

        jax.debug.callback(tell, inputs["tokens"], inputs["mask"])
        return jnp.zeros([*inputs["tokens"].shape, 2]) * params

    learner = maml(metajax.Model(lambda key, inputs: jnp.ones([]), apply))
    only = EpisodeSpec(ways=1, shots=1, queries=3)
    evaluate(learner, jnp.ones([]), source, only, episodes=2, batch=1, num_steps=0)
    jax.effects_barrier()
    drawn = episode(source, only, seed=0, index=0).query.inputs["id"]
    windows = {tuple(line) for line in source.inputs["tokens"][np.isin(source.inputs["id"], drawn)]}
    assert windows in seen


def test_answers_that_are_not_finite_or_too_long_are_wrong(source):
    nowhere = metajax.Model(
        lambda key, inputs: (), lambda params, inputs: jnp.full([*inputs["tokens"].shape, 2], jnp.nan)
    )
    learner = metajax.Learner(
        lambda key, inputs: (), lambda params, support, **options: params,
        lambda adapted, inputs, **options: nowhere.apply(adapted, inputs),
        lambda *args, **options: (0.0, metajax.Aux()),
        task=metajax.tasks.spans,
    )  # fmt: skip
    found = evaluate(learner, (), source, SPEC, episodes=4)
    assert found.before is None, "no inner loop"
    assert found.gain is None
    assert found.mean == found.scores["exact_match"].mean() == 0
    assert found.nonfinite == 4 * 2
    assert "before" not in str(found)
    options = {"episodes": 30, "judge": answers(max_answer=1)}
    short = evaluate(maml(oracle(source)), jnp.zeros([]), source, SPEC, **options)
    full = evaluate(maml(oracle(source)), jnp.zeros([]), source, SPEC, episodes=30)
    exact = short.scores["exact_match"].mean()
    assert exact < full.scores["exact_match"].mean() == 1, "answers of two words are out of reach"
    assert short.mean > exact


def test_a_meta_step_on_spans(source):
    """Its accuracy is the share of ends that are right."""

    def apply(params, inputs):
        return jnp.where(inputs["context"][..., None], params[inputs["tokens"]], -1e9)

    model = metajax.Model(lambda key, inputs: jax.random.normal(key, [31, 2]), apply)
    outer = metajax.outer_update(maml(model), optax.sgd(0.1), hypergrad=metajax.hypergrad.first_order())
    batch = episode_batch(source, SPEC, seed=0, start=0, count=4)
    state = outer.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], batch))
    _, metrics = jax.jit(outer.update)(state, batch)
    inputs, targets = batch.query.inputs, batch.query.targets
    logits = np.where(inputs["context"][..., None], np.asarray(state.params)[inputs["tokens"]], -1e9)
    assert metrics["accuracy_before"] == pytest.approx((logits.argmax(axis=-2) == targets).mean())
    right = np.take_along_axis(logits, targets[..., None, :], axis=-2)[..., 0, :]
    assert metrics["loss_before"] == pytest.approx((np.log(np.exp(logits).sum(axis=-2)) - right).mean(), rel=1e-5)


def test_rules_of_languages():
    question = Question("q", "zh", "A", "谁", "中国人", ("中国",), 0, "question 'q'")
    inputs = {
        "tokens": np.array([[0, 9, 9, 9]] * 2),
        "context": np.array([[False, True, True, True]] * 2),
        "id": np.arange(2),
    }
    offsets = np.array([[[0, 0], [0, 1], [1, 2], [2, 3]]] * 2)

    def of(language):
        asked = question._replace(language=language)
        return AnswerSource("toy", "test", inputs, np.zeros(2, int), ("zh/A",), targets=np.array([[1, 2]] * 2),
                            questions=(asked, asked), offsets=offsets)  # fmt: skip

    logits = jnp.zeros([4, 2]).at[1, 0].set(1).at[3, 1].set(1)
    learner = maml(
        metajax.Model(lambda key, x: jnp.ones([]), lambda params, x: params * logits[None].repeat(len(x["id"]), 0))
    )
    options = {"spec": EpisodeSpec(1, 1, 1), "episodes": 2, "num_steps": 0}
    assert evaluate(learner, jnp.ones([]), of("zh"), **options).mean == 0
    options["judge"] = answers(rules="mlqa")
    assert evaluate(learner, jnp.ones([]), of("zh"), **options).mean == pytest.approx(0.8)
    with pytest.raises(ValueError, match=r"language must be one of 'ar', .*, got 'xx'"):
        evaluate(learner, jnp.ones([]), of("xx"), **options)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"episodes": 1}, "episodes must be an integer of at least 2, got 1"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"num_steps": -1}, "num_steps must be an integer of at least 0"),
        ({"batch": 0}, "batch must be an integer of at least 1"),
        ({"learner": None}, "learner must be of type Learner, got None"),
        ({"source": metajax.data.sinusoids(split="test")}, "got regression of source and spans of learner"),
        ({"spec": EpisodeSpec(1, 3, 3)}, r"shots \+ queries is 3 \+ 3 = 6, but class 'en/T0' of .* has 4 examples"),
        ({"learner": maml(metajax.Model(lambda key, x: jnp.ones([]), lambda params, x: params * x["tokens"]))},
         r"targets of spans must be \[n, 2\] for outputs \[n, length, 2\], got"),
    ],
)  # fmt: skip
def test_refusals(source, options, error):
    given = {"learner": maml(oracle(source)), "params": jnp.zeros([]), "source": source, "spec": SPEC, "num_steps": 0}
    with pytest.raises(ValueError, match=error):
        evaluate(**{**given, **options})


def test_judges_that_are_refused():
    with pytest.raises(ValueError, match="max_answer must be an integer of at least 1, got 0"):
        answers(max_answer=0)
    with pytest.raises(ValueError, match="rules must be one of 'squad', 'mlqa', got 'xquad'"):
        answers(rules="xquad")
    waves, spec = metajax.data.sinusoids(split="test"), EpisodeSpec(1, 2, 2)
    learner = learners.maml(metajax.models.mlp(1), optax.sgd(0.1), task=metajax.tasks.regression)
    with pytest.raises(ValueError, match="source must be of type AnswerSource, got"):
        evaluate(learner, (), waves, spec, judge=answers())
