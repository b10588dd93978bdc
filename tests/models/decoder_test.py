"""The decoder: causal, blind to padding, and the same however its blocks are computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax import models

MODEL = models.decoder(20, width=16, depth=3, heads=4, kv_heads=2)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0), jnp.zeros([1, 4], jnp.int32))


TOKENS = jnp.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


def test_later_tokens_are_not_seen(params):
    apply = jax.jit(MODEL.apply)
    whole, changed = apply(params, TOKENS), apply(params, TOKENS.at[:, 4].set(7))
    np.testing.assert_allclose(changed[:, :4], whole[:, :4], atol=1e-6)
    assert np.abs(changed[:, 4:] - whole[:, 4:]).max() > 1e-3


def test_positions_matter(params):
    """Attention without positions would give the last token the same logits in any order of those before it."""
    last = MODEL.apply(params, TOKENS)[:, -1]
    swapped = MODEL.apply(params, TOKENS[:, jnp.array([1, 0, 2, 3, 4, 5])])[:, -1]
    assert np.abs(last - swapped).max() > 1e-3


def test_padding_is_not_seen(params):
    mask = jnp.arange(6) < jnp.array([[4], [6]])
    apply = jax.jit(MODEL.apply)
    whole = apply(params, {"tokens": TOKENS, "mask": mask})
    other = apply(params, {"tokens": jnp.where(mask, TOKENS, 0), "mask": mask})
    np.testing.assert_allclose(other[0, :4], whole[0, :4], atol=1e-6)
    np.testing.assert_allclose(whole[1], apply(params, TOKENS)[1], atol=1e-6)
    assert np.isfinite(whole).all()


def test_blocks_are_applied_one_after_the_other(params):
    """A decoder of one block whose parameters are those of one of three."""
    one = models.decoder(20, width=16, depth=1, heads=4, kv_heads=2)
    first = {**params, "blocks": jax.tree.map(lambda leaf: leaf[:1], params["blocks"])}
    still = jax.tree.map(lambda leaf: leaf.at[1:].set(0), params["blocks"])
    np.testing.assert_allclose(
        one.apply(first, TOKENS), MODEL.apply({**params, "blocks": still}, TOKENS), atol=1e-6
    )  # a block of zeros adds nothing


def test_recomputed_blocks_have_the_same_gradient(params):
    plain = models.decoder(20, width=16, depth=3, heads=4, kv_heads=2, remat=False)
    loss = lambda model: lambda params: jnp.sum(jnp.square(model.apply(params, TOKENS)))  # noqa: E731
    one, other = jax.jit(jax.grad(loss(MODEL)))(params), jax.jit(jax.grad(loss(plain)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, other)


def test_the_program_does_not_grow_with_depth():
    texts = []
    for depth in (2, 8):
        model = models.decoder(20, width=16, depth=depth, heads=4)
        params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
        texts.append(jax.jit(model.apply).lower(params, TOKENS).as_text())
    assert abs(len(texts[1]) - len(texts[0])) < 0.02 * len(texts[0])


def llama(params, tokens, mask, *, heads, size, theta, epsilon, tied):
    """Llama, Qwen2 and Qwen3 as Hugging Face computes them, in NumPy: `[length]` tokens of one text to logits."""
    length, half = len(tokens), size // 2
    positions = np.maximum(np.cumsum(mask) - 1, 0)
    angles = positions[:, None] * (1.0 / theta ** (np.arange(0, size, 2) / size))
    cos, sin = (np.tile(part(angles), 2)[:, None] for part in (np.cos, np.sin))
    turned = lambda x: x * cos + np.concatenate([-x[..., half:], x[..., :half]], -1) * sin  # noqa: E731
    norm = lambda x, scale: x / np.sqrt(np.mean(x**2, -1, keepdims=True) + epsilon) * scale  # noqa: E731
    linear = lambda x, part: x @ part["kernel"] + part.get("bias", 0)  # noqa: E731
    seen = np.tril(np.ones([length, length], bool)) & mask
    values = params["embed"]["embedding"][tokens]
    for place in range(len(params["blocks"]["out"]["kernel"])):
        block = jax.tree.map(lambda leaf: leaf[place], params["blocks"])  # noqa: B023
        normed = norm(values, block["attention_norm"]["scale"])
        query, key, value = (
            linear(normed, block[part]).reshape(length, -1, size) for part in ("query", "key", "value")
        )
        if "query_norm" in block:
            query, key = (norm(part, block[name]["scale"]) for name, part in (("query_norm", query), ("key_norm", key)))
        query, key = turned(query), turned(key)
        key, value = (np.repeat(part, heads // part.shape[1], axis=1) for part in (key, value))
        scores = np.where(seen[:, None], np.einsum("qhd,khd->qhk", query, key) / np.sqrt(size), -1e30)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("qhk,khd->qhd", weights / weights.sum(-1, keepdims=True), value)
        values = values + linear(mixed.reshape(length, -1), block["out"])
        normed = norm(values, block["mlp_norm"]["scale"])
        gate = linear(normed, block["gate"])
        values = values + linear(gate / (1 + np.exp(-gate)) * linear(normed, block["up"]), block["down"])
    return norm(values, params["norm"]["scale"]) @ (
        params["embed"]["embedding"].T if tied else params["head"]["kernel"]
    )


MASK = np.array([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1]], bool)
TEXTS = jnp.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8], [9, 7, 9, 3, 2, 3]])


@pytest.mark.parametrize(
    ("tied", "qk_norm"), [pytest.param(False, False, marks=pytest.mark.slow), (True, False), (True, True)]
)
def test_llama_and_qwen_by_hand(x64, tied, qk_norm):
    """Biases, norms of heads, tied embeddings and a head size of its own; padding behind, in front and between."""
    options = {"heads": 4, "theta": 50.0}
    model = models.decoder(
        20, width=12, depth=2, kv_heads=2, head_size=6, hidden=10, norm_epsilon=0.1, qkv_bias=tied, tied=tied,
        qk_norm=qk_norm, dtype=jnp.float64, **options,
    )  # fmt: skip
    shapes, rng = jax.eval_shape(model.init, jax.random.key(0), TEXTS), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape), shapes)
    assert ("head" in params) is not tied
    assert ("key_norm" in params["blocks"]) is qk_norm
    assert {name for name, part in params["blocks"].items() if "bias" in part} == (
        {"query", "key", "value"} if tied else set()
    )
    spoiled = jnp.where(MASK, TEXTS, 99)  # no token at all
    found = jax.jit(model.apply)(params, {"tokens": spoiled, "mask": MASK})
    for row, (tokens, mask) in enumerate(zip(np.asarray(TEXTS), MASK, strict=True)):
        logits = llama(params, tokens, mask, size=6, epsilon=0.1, tied=tied, **options)
        np.testing.assert_allclose(found[row][mask], logits[mask], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_classes_and_features_are_of_the_last_token(params, masked):
    inputs = {"tokens": TEXTS, "mask": MASK} if masked else TEXTS
    classify, features = (
        models.decoder(20, width=16, depth=3, heads=4, kv_heads=2, outputs=outputs) for outputs in (5, "features")
    )
    head = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
    states = jax.jit(features.apply)({name: leaf for name, leaf in params.items() if name != "head"}, inputs)
    last = np.array([3, 5, 5]) if masked else np.array([5, 5, 5])
    np.testing.assert_allclose(
        states @ params["head"]["kernel"], jax.jit(MODEL.apply)(params, inputs)[np.arange(3), last], atol=1e-5
    )
    found = jax.jit(classify.apply)({**params, "head": {"kernel": head}}, inputs)
    np.testing.assert_allclose(found, states @ head, atol=1e-5)
    trees = [jax.eval_shape(model.init, jax.random.key(0), TEXTS) for model in (classify, features)]
    assert trees[0]["head"]["kernel"].shape == (16, 5)
    assert "head" not in trees[1]


def test_logits_of_the_places_that_are_read(params):
    inputs = {"tokens": TEXTS, "mask": MASK}
    read = jnp.array([[0, 3], [5, 2], [3, 5]])
    apply = jax.jit(MODEL.apply)
    found = apply(params, {**inputs, "read": read})
    np.testing.assert_allclose(found, apply(params, inputs)[np.arange(3)[:, None], read], atol=1e-6)


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_text_in_pieces_is_the_text(params, masked):
    """Each piece sees those before it through the cache alone; what stands in front of all texts is cached once."""
    front, texts = TEXTS[:1, :3], TEXTS[:, 3:]
    mask = MASK[:, 3:] if masked else np.ones([3, 3], bool)
    whole = {
        "tokens": jnp.concatenate([jnp.broadcast_to(front, (3, 3)), texts], axis=1),
        "mask": np.concatenate([np.array([[True, False, True]] * 3), mask], axis=1),
    }
    apply = jax.jit(MODEL.apply)
    expected = apply(params, whole)[:, 3:]
    _, cache = apply(params, {"tokens": front, "mask": np.array([[True, False, True]]), "cache": {}})
    assert cache["key"].shape == cache["value"].shape == (3, 1, 3, 2, 4)
    piece = {"tokens": texts, "mask": mask} if masked else {"tokens": texts}
    found, new = apply(params, {**piece, "cache": cache})
    np.testing.assert_allclose(found[mask], expected[mask], atol=1e-5)
    assert new["key"].shape == (3, 3, 3, 2, 4)
    np.testing.assert_array_equal(new["mask"], mask)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"heads": 3}, "heads must divide width, 16, into even parts, got 3"),
        ({"heads": 16}, "heads must divide width, 16, into even parts, got 16"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads must divide heads, 4, got 3"),
        ({"kv_heads": 0}, "kv_heads must be an integer of at least 1, got 0"),
        ({"hidden": 0}, "hidden must be an integer of at least 1, got 0"),
        ({"rope_scaling": "linear"}, "rope_scaling must be None or a dict with a rope_type, got 'linear'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor of rope_scaling must be a finite number above 0, got None"),
        ({"qk_norm": 1}, "qk_norm must be of type bool, got 1"),
        ({"tied": "no"}, "tied must be of type bool, got 'no'"),
        ({"depth": 0}, "depth must be an integer of at least 1, got 0"),
        ({"theta": 0.0}, "theta must be"),
        ({"head_size": 5}, "head_size must be even, got 5"),
        ({"norm_epsilon": 0.0}, "norm_epsilon must be a finite number above 0, got 0.0"),
        ({"outputs": "words"}, "outputs must be 'tokens', 'features' or a number of classes, got 'words'"),
        ({"outputs": 0}, "outputs must be 'tokens', 'features' or a number of classes, got 0"),
    ],
)
def test_bad_arguments(options, text):
    with pytest.raises(ValueError, match=text):
        models.decoder(20, width=16, **{"heads": 4, **options})
