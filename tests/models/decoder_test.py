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


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"heads": 3}, "heads must divide width, 16, into even parts, got 3"),
        ({"heads": 16}, "heads must divide width, 16, into even parts, got 16"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads must divide heads, 4, got 3"),
        ({"depth": 0}, "depth must be an integer of at least 1, got 0"),
        ({"theta": 0.0}, "theta must be"),
    ],
)
def test_bad_arguments(options, text):
    with pytest.raises(ValueError, match=text):
        models.decoder(20, width=16, **{"heads": 4, **options})
