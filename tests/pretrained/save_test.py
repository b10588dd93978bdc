import json
import pathlib

import jax
import numpy as np
import pytest
import worlds

import metajax

SIZES = {"vocab": 50, "width": 16, "depth": 2, "heads": 4, "kv_heads": 2}
TOKENS = np.arange(10, dtype=np.int32).reshape(2, 5)


def _save(folder, *, outputs="tokens", options=SIZES, **more):
    model = metajax.models.decoder(**SIZES, tied=options.get("tied", False), outputs=outputs)
    params = model.init(jax.random.key(7), TOKENS)  # key 0 is that of leaves which loading makes anew
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


@pytest.mark.parametrize("outputs", ["features", 3])
def test_a_decoder_without_a_head_of_tokens_gives_features(outputs, tmp_path):
    wanted = _save(tmp_path / "model", outputs=outputs, max_length=12)
    loaded = metajax.load_pretrained_model(tmp_path / "model")
    found = loaded.model.apply(loaded.params, TOKENS)
    assert found.shape == (2, 16)
    if outputs == "features":
        np.testing.assert_array_equal(found, wanted)
    with pytest.raises(ValueError, match="head must be one of 'features', got 'tokens'"):
        metajax.load_pretrained_model(tmp_path / "model", head="tokens")


@pytest.fixture
def arguments():
    params = metajax.models.decoder(**SIZES).init(jax.random.key(7), TOKENS)
    return {"params": params, "factory": "decoder", "options": SIZES, "max_length": 12}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": None}, "max_length must be an integer of at least 1, got None"),
        ({"max_length": 0}, "max_length must be an integer of at least 1, got 0"),
        ({"image": (3, 3, 3)}, r"image must not be given for decoder, got \(3, 3, 3\)"),
        ({"factory": "encoder"}, "max_length must not be given for encoder, got 12"),
        ({"tokenizer": "tokenizer.json"}, "tokenizer must be one of the tokenizers library, got 'tokenizer.json'"),
        ({"options": {}}, "options must hold vocab for decoder, got {}"),
        ({"options": {**SIZES, "outputs": 3}}, "options must be among vocab, .* got .*'outputs'"),
        ({"options": {**SIZES, "theta": np.float32(10)}}, "options must be what JSON can hold, got .*theta"),
        ({"options": {**SIZES, "tied": "no"}}, "tied must be of type bool, got 'no'"),
        ({"options": {**SIZES, "tied": True}}, "params must not hold head/kernel of all tokens where options say tied"),
        ({"options": {**SIZES, "depth": 3}}, r"params must hold blocks/.* of shape \(3, .* got shape \(2, "),
        ({"params": {}}, "params must hold .* got only "),
        (
            {"tokenizer": worlds.word_tokenizer(80)},
            "tokenizer must have at most 50 tokens, the rows of the table of embeddings, got 80",
        ),
    ],
)
def test_refusals(change, message, arguments, tmp_path):
    with pytest.raises(ValueError, match=message):
        metajax.save_pretrained_model(tmp_path / "model", **arguments | change)
    assert not list(tmp_path.iterdir())


def test_adapters_are_merged_first(arguments, tmp_path):
    adapted = metajax.adapters.lora(metajax.models.decoder(**SIZES)).init(jax.random.key(7), TOKENS)
    with pytest.raises(
        ValueError, match=r"no leaves but those of decoder .* got blocks/.*lora_a.* merge adapters first"
    ):
        metajax.save_pretrained_model(tmp_path / "model", **arguments | {"params": adapted})


@pytest.mark.parametrize("config", ['{"port": 80}', '{"model_type": "bert"}', '{"model_type": "metajax"}'])
def test_a_folder_that_no_save_wrote_is_left_alone(config, arguments, tmp_path):
    (tmp_path / "config.json").write_text(config)
    if "metajax" in config:
        (tmp_path / "notes.txt").write_text("mine")
    before = {file.name: file.read_text() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="path must be a new folder or that of an earlier save, with no files but"):
        metajax.save_pretrained_model(tmp_path, **arguments)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == before


def test_an_earlier_save_is_replaced_or_stays(arguments, tmp_path, monkeypatch):
    metajax.save_pretrained_model(tmp_path / "model", **arguments)
    metajax.save_pretrained_model(tmp_path / "model", **arguments | {"max_length": 20})
    assert metajax.load_pretrained_model(tmp_path / "model").max_length == 20
    rename = pathlib.Path.rename

    def fails(self, target):
        if self.name == "new":
            raise OSError("no room")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", fails)
    with pytest.raises(OSError, match="no room"):
        metajax.save_pretrained_model(tmp_path / "model", **arguments)
    assert metajax.load_pretrained_model(tmp_path / "model").max_length == 20
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


LLAMA = {
    "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factory": None}, "factory of config.json must be one of 'conv4', .* got None"),
        ({"max_length": -3}, "max_length of config.json must be an integer of at least 1, got -3"),
        ({"model_type": ["metajax"]}, "model_type of .* must be one of .* got "),
        ({"options": {**SIZES, "width": "x"}}, "width must be an integer of at least 1, got 'x'"),
        (
            {**LLAMA, "num_attention_heads": 0},
            "num_attention_heads .* at least 1, got 0",
        ),
        ({**LLAMA, "rope_scaling": "x"}, "describes no llama"),
    ],
)
def test_a_damaged_config_is_refused(change, message, arguments, tmp_path):
    metajax.save_pretrained_model(tmp_path / "model", **arguments)
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        metajax.load_pretrained_model(tmp_path / "model")


@pytest.mark.parametrize("outputs", ["tokens", 0])
def test_outputs_is_a_number(outputs, arguments, tmp_path):
    metajax.save_pretrained_model(tmp_path / "model", **arguments)
    with pytest.raises(ValueError, match=f"outputs must be an integer of at least 1, got {outputs!r}"):
        metajax.load_pretrained_model(tmp_path / "model", outputs=outputs)


@pytest.mark.parametrize(
    ("factory", "options", "heads"),
    [
        ("encoder", {"vocab": 50, "width": 16, "depth": 1, "heads": 2, "positions": 8, "head": "cls"}, ("cls", "mean")),
        ("vit", {"width": 16, "depth": 1, "heads": 2, "pooling": "mean"}, ("mean", "cls")),
    ],
)
def test_what_was_saved_is_loaded_with_heads_that_share_its_parameters(factory, options, heads, tmp_path):
    inputs, given = (TOKENS, {}) if factory == "encoder" else (np.ones([2, 16, 16, 3]), {"image": (16, 16, 3)})
    make = getattr(metajax.models, factory)
    params = make(**options).init(jax.random.key(7), inputs)
    metajax.save_pretrained_model(tmp_path / "model", params, factory=factory, options=options, **given)
    for head, asked in zip(heads, (None, heads[1]), strict=True):
        loaded = metajax.load_pretrained_model(tmp_path / "model", head=asked)
        wanted = make(**options | {"pooling" if factory == "vit" else "head": head}).apply(params, inputs)
        np.testing.assert_allclose(loaded.model.apply(loaded.params, inputs), wanted, atol=1e-5)
