"""Bottlenecks, shifts and prefixes: layers in NumPy, attention with a prefix, learners over them, bad input."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

import metajax
from metajax import adapters, hypergrad, learners, models
from metajax.core import _tree

DECODER = models.decoder(20, width=16, depth=2, heads=4, kv_heads=2)
ENCODER = models.encoder(20, width=16, depth=2, heads=4, hidden=24, positions=8, head="tokens")
TOKENS = jnp.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
MASK = jnp.arange(6) < jnp.array([[6], [4]])
KINDS = {
    "bottleneck": lambda model: adapters.bottleneck(model, 3),
    "bitfit": lambda model: adapters.bitfit(model, where="blocks"),
    "prefix": lambda model: adapters.prefix(model, 3),
}


def scattered(params, size=0.3):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + size * rng.normal(size=leaf.shape), leaf.dtype), params)


def one_layer():
    return metajax.Model(
        lambda key, inputs: {"out": {"kernel": jax.random.normal(key, (inputs.shape[-1], 4))}},
        lambda params, inputs: inputs @ params["out"]["kernel"],
    )


def test_layers_in_numpy():
    inputs = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)

    def outputs(model):
        params = scattered(model.init(jax.random.key(0), inputs))
        return model.apply(params, inputs), jax.tree.map(np.asarray, params["out"])

    found, group = outputs(adapters.bottleneck(one_layer(), 2))
    plain = inputs @ group["kernel"]
    hidden = plain @ group["bottleneck_down"] + group["bottleneck_bias"]
    hidden = hidden * (1 + np.vectorize(math.erf)(hidden / 2**0.5)) / 2
    np.testing.assert_allclose(found, plain + hidden @ group["bottleneck_up"], rtol=1e-5, atol=1e-5)
    found, group = outputs(adapters.bitfit(one_layer()))
    np.testing.assert_allclose(found, inputs @ group["kernel"] + group["bitfit"], rtol=1e-5, atol=1e-5)
    found, group = outputs(adapters.prefix(one_layer(), 2, where=None))
    np.testing.assert_allclose(found[:, 2:], inputs @ group["kernel"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[:, :2], np.broadcast_to(group["prefix"], (2, 2, 4)))


@pytest.mark.parametrize("kind", ["bottleneck", "bitfit"])
def test_at_first_the_outputs_are_those_of_the_base(kind):
    params = DECODER.init(jax.random.key(0), TOKENS)
    model = KINDS[kind](DECODER)
    attached = adapters.attach(model, params, key=jax.random.key(1))
    np.testing.assert_array_equal(jax.jit(model.apply)(attached, TOKENS), jax.jit(DECODER.apply)(params, TOKENS))
    moved = jax.jit(model.apply)(scattered(attached), TOKENS)
    assert np.abs(moved - jax.jit(DECODER.apply)(params, TOKENS)).max() > 0.1


def softmax_with(scores, values):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)) @ values


def test_a_prefix_is_seen_by_every_query():
    """`attend` with positions in front, in NumPy: causal among the text's own, padding unseen, the prefix seen."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(2, length, 1, 4)).astype(np.float32) for length in (5, 7, 7))
    mask = np.arange(5) < np.array([[5], [3]])
    for causal in (False, True):
        seen = np.pad(mask, ((0, 0), (2, 0)), constant_values=True)[:, None, :].repeat(5, 1)
        if causal:
            seen = seen & np.tri(5, 7, 2, dtype=bool)
        scores = np.where(seen, query[:, :, 0] @ key[:, :, 0].swapaxes(1, 2) / 2.0, -np.inf)
        found = models._attention.attend(*map(jnp.asarray, (query, key, value)), jnp.asarray(mask), causal=causal)
        np.testing.assert_allclose(found, softmax_with(scores, value[:, :, 0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("base", [DECODER, ENCODER], ids=["decoder", "encoder"])
def test_prefix_in_a_transformer(base):
    inputs = {"tokens": TOKENS, "mask": MASK}
    plain = scattered(base.init(jax.random.key(0), inputs))
    model = adapters.prefix(base, 3)
    params = adapters.attach(model, plain, key=jax.random.key(1))
    found = jax.jit(model.apply)(params, inputs)
    assert found.shape == jax.jit(base.apply)(plain, inputs).shape
    # what is learned counts, and what stands in padding does not
    other = jax.jit(model.apply)(params, {"tokens": jnp.where(MASK, TOKENS, 7), "mask": MASK})
    np.testing.assert_allclose(np.asarray(found)[MASK], np.asarray(other)[MASK], rtol=1e-5, atol=1e-5)
    key = {**params["blocks"]["key"], "prefix": jnp.full_like(params["blocks"]["key"]["prefix"], 0.5)}
    moved = jax.jit(model.apply)({**params, "blocks": {**params["blocks"], "key": key}}, inputs)
    assert np.abs(moved - found)[np.asarray(MASK)].max() > 1e-3


def test_generation_through_a_cache_sees_the_prefix_once():
    model = adapters.prefix(DECODER, 3)
    params = scattered(model.init(jax.random.key(0), TOKENS), 0.5)
    text = TOKENS
    for _ in range(3):
        text = jnp.concatenate([text, jax.jit(model.apply)(params, text)[:, -1:].argmax(-1).astype(text.dtype)], axis=1)
    found = models.generate(model, params, TOKENS, length=3)
    np.testing.assert_array_equal(found["tokens"], text[:, 6:])


def _episode():
    tokens = np.random.default_rng(0).integers(1, 20, (2, 4, 6)).astype(np.int32)
    parts = [metajax.Examples(part, np.array([0, 0, 1, 1]), np.ones(4, bool), np.ones(2, bool)) for part in tokens]
    return metajax.Episode(*parts)


LEARNERS = {
    "maml": lambda model, name: (learners.maml(model, optax.sgd(0.1), 2, adapts=name), hypergrad.mixed_mode()),
    "fomaml": lambda model, name: (learners.maml(model, optax.sgd(0.1), 2, adapts=name), hypergrad.first_order()),
    "anil": lambda model, name: (learners.maml(model, optax.sgd(0.1), 2, adapts="head"), hypergrad.mixed_mode()),
    "reptile": lambda model, name: (learners.reptile(model, optax.sgd(0.1), 2, adapts=name), hypergrad.displacement()),
    "prototypical": lambda model, name: (learners.prototypical(model), hypergrad.mixed_mode()),
}
FEW = [("bottleneck", "maml"), ("prefix", "prototypical"), ("bitfit", "anil")]
CASES = [(kind, learner) for kind in ("lora", *KINDS) for learner in LEARNERS]


@pytest.mark.parametrize(
    ("kind", "learner"),
    worlds.few_by_default(CASES, lambda *case: case in FEW),
)
def test_learners_meta_train_adapters_alone(kind, learner):
    outputs = None if learner == "prototypical" else 2
    base = models.encoder(20, outputs, width=8, depth=1, heads=2, positions=8)
    model = (KINDS | {"lora": lambda model: adapters.lora(model, rank=2)})[kind](base)
    built, estimator = LEARNERS[learner](model, kind)
    outer = metajax.outer_update(
        built,
        optax.sgd(0.5),
        hypergrad=estimator,
        trainable=kind if learner != "anil" else f"{kind}|head",
        before=False,
    )
    one = _episode()
    state = outer.init(jax.random.key(0), one, scattered(built.init(jax.random.key(1), one.support.inputs), 0.1))
    after, metrics = jax.jit(outer.update)(state, jax.tree.map(lambda leaf: leaf[None], one))
    assert np.isfinite(metrics["loss"])
    same = jax.tree.map(np.array_equal, state.params, after.params)
    for path, kept in zip(_tree.paths(same), jax.tree.leaves(same), strict=True):
        trained = kind in path or (learner == "anil" and "head" in path)
        assert trained or kept, path
    assert any(kind in path and not kept for path, kept in zip(_tree.paths(same), jax.tree.leaves(same), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_merge_refuses_what_no_weight_holds(kind):
    model = KINDS[kind](DECODER)
    with pytest.raises(ValueError, match=f"model must have no {kind}, which no weight can hold"):
        adapters.merge(model, {})


REFUSALS = {
    "size": (lambda: adapters.bottleneck(DECODER, 0), "size must be"),
    "length": (lambda: adapters.prefix(DECODER, 0), "length must be"),
    "keys without values": (
        lambda: adapters.prefix(DECODER, 2, where="key").init(jax.random.key(0), TOKENS),
        "where must pick the kernels of keys and of values of the same blocks and no other, got 'key', which picks",
    ),
    "neither": (
        lambda: adapters.prefix(DECODER, 2, where="up").init(jax.random.key(0), TOKENS),
        "where must pick the kernels of keys and of values of the same blocks and no other, got 'up', which picks",
    ),
    "twice": (lambda: adapters.bitfit(adapters.bitfit(DECODER)), "no adapter called 'bitfit' yet"),
    "order": (
        lambda: adapters.prefix(adapters.lora(DECODER), 2),
        r"no adapter that edits kernels yet, got one with lora",
    ),
    "nothing": (
        lambda: adapters.bottleneck(DECODER, 2, where="nothing").init(jax.random.key(0), TOKENS),
        "must pick at least one leaf, got 'nothing'",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    call, said = REFUSALS[case]
    with pytest.raises(ValueError, match=said):
        call()
