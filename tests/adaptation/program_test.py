"""The program of the README: load, adapt to tasks one after the other, adapt fast to a new one, predict."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds

import metajax
from metajax.evaluation import mean_and_interval

TASK = (["w1 w2", "w3", "w4 w5", "w6"], ["a", "a", "b", "b"])
OPTIONS = {"width": 8, "depth": 3, "normalisation": "layer"}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A small network with random weights, saved and loaded."""
    folder = tmp_path_factory.mktemp("models") / "conv4"
    params = metajax.models.conv4(**OPTIONS).init(jax.random.key(0), jnp.zeros([1, 28, 28, 1]))
    metajax.save_pretrained_model(folder, params, factory="conv4", options=OPTIONS, image=(28, 28, 1))
    model = metajax.load_pretrained_model(folder)
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    return model


def _tasks(source, count, shots, queries):
    """Arrays of five classes each: support and query."""
    spec = metajax.data.EpisodeSpec(5, shots, queries)
    for index in range(count):
        one = metajax.data.episode(source, spec, seed=0, index=index)
        names = np.array(["a", "b", "c", "d", "e"])
        yield tuple((np.asarray(part.inputs), names[np.asarray(part.targets)].tolist()) for part in one)


@pytest.fixture(scope="module")
def trained(loaded):
    train = metajax.data.glyphs("train")
    model = loaded
    for _ in range(2):
        model = metajax.adapt_model(model, train, steps=40, shots=1, queries=3, outer_rate=3e-3)
    assert int(model.state.step) == 80
    return model


@pytest.mark.slow
def test_after_the_loop_a_new_task_is_learned_better(loaded, trained):
    gains = []
    for support, (images, labels) in _tasks(metajax.data.glyphs("test"), 12, 1, 10):
        scores = [
            metajax.fast_adapt_model(model, support, steps=5).score(images, labels) for model in (loaded, trained)
        ]
        gains.append(scores[1] - scores[0])
    mean, interval = mean_and_interval(np.array(gains))
    assert mean > interval


def test_the_next_task_compiles_nothing(trained, caplog):
    (first, (images, _)), (second, (others, _)) = _tasks(metajax.data.glyphs("test"), 2, 5, 2)
    fewer = (second[0][:24], [f"class {label}" for label in second[1][:24]])  # other names, an example less

    def compiled(task, queries):
        caplog.clear()
        with jax.log_compiles():
            metajax.fast_adapt_model(trained, task, steps=3).predict(queries)
        return [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]

    assert compiled(first, images)  # what the next line looks for is said
    assert not compiled(second, others)
    assert not compiled(fewer, others[:9])


def test_what_is_saved_predicts_the_same(trained, tmp_path):
    support, (images, _) = next(_tasks(metajax.data.glyphs("test"), 1, 2, 2))
    fast = metajax.fast_adapt_model(trained, support)
    fast.save(tmp_path / "fast")
    again = type(fast).load(tmp_path / "fast")
    assert again.classes_ == fast.classes_ == ("a", "b", "c", "d", "e")
    assert again.predict(images) == fast.predict(images)
    probabilities = fast.predict_proba(images)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(again.predict_proba(images), probabilities, atol=1e-6)
    assert not list(tmp_path.glob("**/*.p*k*l*"))


def test_refusals(loaded):
    images = np.zeros([4, 28, 28, 1], np.uint8)
    for task, said in {
        "no such place": "no such place",
        (("one", "two"), ("a", "b")): "image",
    }.items():
        with pytest.raises(ValueError, match=said):
            metajax.fast_adapt_model(loaded, task)
    with pytest.raises(ValueError, match="class"):
        metajax.fast_adapt_model(loaded, (images, ["a"] * 4))
    with pytest.raises(ValueError, match="28"):
        metajax.fast_adapt_model(loaded, (images[:, :14], ["a", "a", "b", "b"]))


def _sentences(label, count, rng):
    """Noise, and one word of the label's own somewhere in it."""
    texts = []
    for _ in range(count):
        words = [f"w{number}" for number in rng.integers(1, 12, 5)]
        words[rng.integers(5)] = f"w{12 + label}"
        texts.append(" ".join(words))
    return texts


def _text_task(labels, count, rng):
    pairs = [(text, f"intent{label}") for label in labels for text in _sentences(label, count, rng)]
    return [text for text, _ in pairs], [label for _, label in pairs]


@pytest.fixture
def encoder(tmp_path):
    """A small transformer with random weights, for texts of up to 16 words."""
    options = {"vocab": 50, "width": 32, "depth": 1, "heads": 4, "positions": 16}
    params = metajax.models.encoder(**options).init(jax.random.key(0), np.zeros([1, 2], np.int32))
    made = worlds.word_tokenizer(50)
    metajax.save_pretrained_model(tmp_path / "model", params, factory="encoder", options=options, tokenizer=made)
    return metajax.load_pretrained_model(tmp_path / "model")


def test_long_texts_are_cut_with_a_warning(encoder):
    words = [f"w{1 + number}" for number in range(20)]
    fast = metajax.fast_adapt_model(encoder, TASK, steps=1)
    texts = [" ".join(words), "w7", " ".join(words[:16])]
    with pytest.warns(UserWarning, match="1 of 3 inputs have more than 16 tokens, and are cut"):
        probabilities = fast.predict_proba(texts)
    np.testing.assert_allclose(probabilities[0], probabilities[2], rtol=1e-5)


def test_padding_of_the_users_tokenizer_is_no_word(encoder):
    queries = ["w1 w7 w8", "w6"]
    expected = metajax.fast_adapt_model(encoder, TASK, steps=1).predict_proba(queries)
    tokenizer = type(encoder.tokenizer).from_str(encoder.tokenizer.to_str())
    tokenizer.enable_padding(length=12)
    padding = dataclasses.replace(encoder, tokenizer=tokenizer)
    found = metajax.fast_adapt_model(padding, TASK, steps=1).predict_proba(queries)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_labels_are_what_they_were(encoder):
    for labels in ([2**63, 2**63 + 1, -1, -1], ["a", "a\0", "b", "b"]):
        fast = metajax.fast_adapt_model(encoder, (TASK[0], labels), steps=0)
        assert fast.classes_ == tuple(sorted(set(labels)))


def test_half_a_character_is_refused(encoder):
    with pytest.raises(ValueError, match="index 1 of inputs has a text that is not Unicode"):
        metajax.fast_adapt_model(encoder, TASK, steps=0).predict(["w1", "\ud800 w2"])


def _tokens(tokens, mask):
    inputs = {"tokens": np.array(tokens, np.int32), "mask": np.array(mask, bool)}
    return metajax.data.ClassSource("mine", "train", inputs, np.repeat([0, 1], 2), ("a", "b"))


def test_tokens_in_a_source(encoder):
    """What stands in padding counts for nothing, and is no token of the model here."""
    mask = [[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]]
    tokens = np.array([[3, 4, 99], [5, 99, 99], [6, 7, 8], [9, 6, 99]])
    found, clear = (
        metajax.fast_adapt_model(encoder, _tokens(given, mask), steps=1).predict_proba(["w1"])
        for given in (tokens, np.where(mask, tokens, 0))
    )
    np.testing.assert_array_equal(found, clear)
    with pytest.raises(ValueError, match=r"mask of .*mine.* must be padding behind each text"):
        metajax.fast_adapt_model(encoder, _tokens(tokens, np.array(mask)[:, ::-1]))
    with pytest.raises(ValueError, match=r"tokens of .*mine.* must be from 0 to 49, got 99"):
        metajax.adapt_model(encoder, _tokens(tokens, np.ones([4, 3], bool)), shots=1, queries=1)


def test_what_the_first_call_chose_stays(encoder):
    task = _text_task(range(3), 4, np.random.default_rng(0))
    model = metajax.adapt_model(encoder, task, steps=1, shots=1, queries=1, rank=4)
    assert metajax.adapt_model(model, task, steps=1, shots=1, queries=1).rank == 4
    with pytest.raises(ValueError, match="rank must be that of the first call, 4, got 16"):
        metajax.adapt_model(model, task, rank=16)


@pytest.mark.slow
def test_texts_in_a_loop(encoder):
    model, loaded, rng = encoder, encoder, np.random.default_rng(0)
    for labels in (range(0, 8), range(8, 16), range(16, 24)):
        model = metajax.adapt_model(model, _text_task(labels, 8, rng), steps=40, shots=2, queries=4, outer_rate=1e-2)
    gains = []
    for _ in range(12):
        labels = rng.choice(np.arange(24, 38), 5, replace=False)
        support, (texts, truth) = _text_task(labels, 2, rng), _text_task(labels, 10, rng)
        scores = [metajax.fast_adapt_model(start, support, steps=5).score(texts, truth) for start in (loaded, model)]
        gains.append(scores[1] - scores[0])
    mean, interval = mean_and_interval(np.array(gains))
    assert mean > interval
