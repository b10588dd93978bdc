"""adapt_model and fast_adapt_model on texts: what goes on, what is shared, what is saved and what is refused."""

import json

import jax
import numpy as np
import pytest

import metajax
from metajax.adaptation import FastModel, _fast

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra 'text'")
pytest.importorskip("safetensors", reason="needs the extra 'text'")

OPTIONS = {"vocab": 64, "width": 16, "depth": 1, "heads": 2, "positions": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    words = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *(f"w{k}" for k in range(62))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    params = metajax.models.encoder(**OPTIONS).init(jax.random.key(0), np.zeros([1, 1], np.int32))
    folder = tmp_path_factory.mktemp("base") / "model"
    metajax.save_pretrained_model(folder, params, factory="encoder", options=OPTIONS, tokenizer=tokenizer)
    return metajax.load_pretrained_model(folder)


def task(seed, each=4, classes=3):
    rng = np.random.default_rng(seed)
    texts = [f"w{8 * c + rng.integers(8)} w{40 + rng.integers(20)}" for c in range(classes) for _ in range(each)]
    return texts, [f"class {c}" for c in range(classes) for _ in range(each)]


def test_tasks_follow_each_other_and_the_result_predicts_after_a_reload(base, tmp_path):
    options = {"steps": 2, "shots": 1, "queries": 2, "rank": 2}
    first = metajax.adapt_model(base, task(0), **options)
    kept = jax.tree.map(np.array, first.state.params)
    second = metajax.adapt_model(first, [task(1), task(2)], **options)
    assert (int(first.state.step), int(second.state.step)) == (2, 4)
    jax.tree.map(np.testing.assert_array_equal, first.state.params, kept)
    assert second.frozen is first.frozen

    fast = metajax.fast_adapt_model(second, task(3), steps=3)
    texts, labels = task(4)
    proba = fast.predict_proba(texts)
    np.testing.assert_allclose(proba.sum(axis=1), 1, rtol=1e-6)
    assert fast.predict(texts) == [fast.classes_[place] for place in proba.argmax(axis=1)]
    fast.save(tmp_path / "fast")
    again = FastModel.load(tmp_path / "fast")
    np.testing.assert_array_equal(again.predict_proba(texts), proba)

    traces = _fast._adapt._cache_size()
    metajax.fast_adapt_model(second, task(5, each=5, classes=2), steps=3)
    metajax.fast_adapt_model(base, task(6), steps=3, rank=2)
    assert _fast._adapt._cache_size() == traces  # one compilation for all of them

    with pytest.raises(ValueError, match="labels must be among the classes of the support set"):
        fast.score(texts, ["none"] * len(labels))
    told = json.loads((tmp_path / "fast" / "fast_model.json").read_text())
    (tmp_path / "fast" / "fast_model.json").write_text(json.dumps({**told, "rank": 3}))
    with pytest.raises(ValueError, match="lora_a of shape"):
        FastModel.load(tmp_path / "fast")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (3, "task must be a folder"),
        ("no/such/file.jsonl", "does not exist"),
        ((["w1", "w2"], ["a", "a"]), "two classes at least"),
        ((["w1", " "], ["a", "b"]), "an empty text at index 1"),
        ((["w1", "w2"], ["a"]), "labels must be one for each of the 2 inputs"),
        ((["w1", "w2"], ["a", 1]), "labels must be all texts or all integers"),
    ],
)
def test_what_is_no_task_is_refused(base, bad, message):
    with pytest.raises(ValueError, match=message):
        metajax.fast_adapt_model(base, bad)


def test_too_few_examples_are_refused_with_the_number_needed(base):
    with pytest.raises(ValueError, match="5 \\+ 5 = 10"):
        metajax.adapt_model(base, task(0))
