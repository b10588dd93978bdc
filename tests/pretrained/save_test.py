import jax
import numpy as np
import pytest
import worlds

import metajax

SIZES = {"vocab": 50, "width": 16, "depth": 2, "heads": 4, "kv_heads": 2}
TOKENS = np.arange(10, dtype=np.int32).reshape(2, 5)


def _save(folder, *, outputs="tokens", options=SIZES, **more):
    model = metajax.models.decoder(**SIZES, **{"tied": options.get("tied", False)}, outputs=outputs)
    params = model.init(jax.random.key(0), TOKENS)
    metajax.save_pretrained_model(
        folder, params, factory="decoder", options=options, tokenizer=worlds.word_tokenizer(50), **more
    )
    return model.apply(params, TOKENS)


@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder_gives_the_same_outputs_when_it_is_loaded(tied, tmp_path):
    wanted = _save(tmp_path / "model", options={**SIZES, "tied": tied}, max_length=12)
    loaded = metajax.load_pretrained_model(tmp_path / "model")
    np.testing.assert_array_equal(loaded.model.apply(loaded.params, TOKENS), wanted)
    assert loaded.max_length == 12
    assert loaded.tokenizer.encode("w1 w2").ids
    assert not loaded.report.missing
    assert not loaded.report.unexpected


def test_a_decoder_is_loaded_with_other_heads(tmp_path):
    _save(tmp_path / "model", max_length=12)
    features = metajax.load_pretrained_model(tmp_path / "model", head="features")
    assert features.model.apply(features.params, TOKENS).shape == (2, 16)
    assert features.report.unexpected == ("head/kernel",)
    classes = metajax.load_pretrained_model(tmp_path / "model", outputs=3)
    assert classes.model.apply(classes.params, TOKENS).shape == (2, 3)
    assert classes.report.missing == ("head/kernel",)


def test_a_decoder_of_features_adapts_to_a_task(tmp_path):
    _save(tmp_path / "model", max_length=12)
    loaded = metajax.load_pretrained_model(tmp_path / "model", head="features")
    fast = metajax.fast_adapt_model(loaded, (["w1 w2", "w1 w3", "w9 w8", "w9 w7"], ["a", "a", "b", "b"]), steps=10)
    assert fast.predict(["w1 w2", "w9 w8"]) == ["a", "b"]


def test_refusals(tmp_path):
    for length in (None, 0):
        with pytest.raises(ValueError, match=f"max_length must be an integer of at least 1, got {length}"):
            _save(tmp_path / "model", max_length=length)
    with pytest.raises(ValueError, match=r"params must hold head/kernel of shape .16, 50. for decoder"):
        _save(tmp_path / "model", outputs="features", max_length=12)
    with pytest.raises(ValueError, match=r"options of config.json must be among vocab, .* got .*'outputs'"):
        _save(tmp_path / "model", options={**SIZES, "outputs": 3}, max_length=12)
    assert not (tmp_path / "model").exists()
