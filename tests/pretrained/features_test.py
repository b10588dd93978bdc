"""Features of a frozen model: those of single examples, whatever the bucket; kept on disk, made anew when damaged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metajax
from metajax import data, pretrained
from metajax.pretrained import _features

MODEL = metajax.models.encoder(20, width=8, depth=1, heads=2, positions=6)
LENGTHS = np.array([2, 6, 1, 3, 4, 6, 5, 2])


@pytest.fixture(scope="module")
def source():
    rng = np.random.default_rng(0)
    mask = np.arange(6) < LENGTHS[:, None]
    tokens = np.where(mask, rng.integers(1, 20, mask.shape), 0).astype(np.int32)
    return data.ClassSource(
        "texts", "train", {"tokens": tokens, "mask": mask}, np.arange(8) % 2, ("a", "b"), nodes={"x": ["b"]},
        lengths=LENGTHS, length_buckets=(2, 4, 6), truncated=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def params(source):
    return MODEL.init(jax.random.key(0), source.inputs)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METAJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def count(monkeypatch):
    """How often the model is applied."""
    calls, compute = [], _features._compute
    monkeypatch.setattr(_features, "_compute", lambda *given: (calls.append(1), compute(*given))[1])
    return calls


def test_features_are_those_of_whole_texts_and_the_rest_stays(source, params, cache):
    found = pretrained.features(MODEL, params, source, cache=False)
    np.testing.assert_allclose(found.inputs, MODEL.apply(params, source.inputs), atol=1e-5)
    assert found.inputs.dtype == np.float32
    assert (found.labels is source.labels, found.class_names, found.truncated) == (True, ("a", "b"), 1)
    assert found.nodes["x"].tolist() == [1]
    assert (found.lengths, found.length_buckets) == (None, ())
    assert not cache.exists()


def test_what_is_kept_is_what_was_made(source, params, cache, count):
    first = pretrained.features(MODEL, params, source)
    (file,) = cache.iterdir()
    np.testing.assert_array_equal(pretrained.features(MODEL, params, source).inputs, first.inputs)
    assert len(count) == 1
    file.write_bytes(file.read_bytes()[:-50])
    np.testing.assert_array_equal(pretrained.features(MODEL, params, source).inputs, first.inputs)
    assert len(count) == 2
    np.testing.assert_array_equal(pretrained.features(MODEL, params, source).inputs, first.inputs)
    assert len(count) == 2
    assert list(cache.iterdir()) == [file]


def test_other_weights_texts_and_heads_have_features_of_their_own(source, params, cache, count):
    tokens = source.inputs["tokens"].copy()
    tokens[0, 0] = 1 + tokens[0, 0] % 19
    cls = metajax.models.encoder(20, width=8, depth=1, heads=2, positions=6, head="cls")
    cases = [
        (MODEL, params, source),
        (cls, params, source),
        (MODEL, jax.tree.map(lambda leaf: jnp.asarray(leaf) * 1.01, params), source),
        (MODEL, params, dataclasses.replace(source, inputs={**source.inputs, "tokens": tokens})),
    ]
    found = [pretrained.features(*case).inputs for case in cases]
    assert len(count) == len(list(cache.iterdir())) == 4
    assert all(not np.allclose(found[0], other) for other in found[1:])


def test_what_has_no_features_is_refused(source, params):
    with pytest.raises(ValueError, match="model must map each example by itself, got one that needs mask"):
        pretrained.features(MODEL._replace(needs=("mask",)), params, source)
    with pytest.raises(ValueError, match="source must be"):
        pretrained.features(MODEL, params, data.sinusoids())


def test_outputs_that_are_no_vectors_are_refused(source):
    model = metajax.models.decoder(20, width=8, depth=1, heads=2)
    params = model.init(jax.random.key(0), source.inputs)
    with pytest.raises(ValueError, match=r"such as a decoder with head='features', got outputs of shape \(1, 6, 20\)"):
        pretrained.features(model, params, source, cache=False)
