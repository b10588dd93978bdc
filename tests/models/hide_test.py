"""Hidden tokens: how many, which ones, when; that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax import hypergrad, learners, models

ENCODER = models.encoder(20, width=16, depth=1, heads=2)
TEXT = {"tokens": jnp.tile(jnp.arange(10), (300, 1)), "mask": jnp.arange(10) < jnp.full([300, 1], 7)}
SEEN = metajax.Model(lambda key, inputs: {}, lambda params, inputs: inputs["mask"])


def test_each_token_but_the_first_is_hidden_by_itself():
    seen = np.asarray(models.hide_tokens(SEEN, 0.3).apply({}, TEXT, key=jax.random.key(0)))
    assert seen[:, 0].all(), "a text is never empty"
    assert not seen[:, 7:].any(), "padding stays padding"
    share = 1 - seen[:, 1:7].mean(axis=0)
    assert np.all(np.abs(share - 0.3) < 4 * (0.3 * 0.7 / 300) ** 0.5), "in every position"
    assert np.abs(np.corrcoef(seen[:, 1:7].T) - np.eye(6)).max() < 0.25, "independently"


def test_without_a_key_and_with_a_share_of_0_nothing_is_hidden():
    params = ENCODER.init(jax.random.key(0), TEXT)
    plain = ENCODER.apply(params, TEXT)
    np.testing.assert_array_equal(models.hide_tokens(ENCODER, 0.3).apply(params, TEXT), plain)
    np.testing.assert_array_equal(models.hide_tokens(ENCODER, 0.0).apply(params, TEXT, key=jax.random.key(1)), plain)


def test_what_is_hidden_has_no_part_in_the_output():
    key, hiding = jax.random.key(5), models.hide_tokens(ENCODER, 0.5)
    params = hiding.init(jax.random.key(0), TEXT)
    hidden = ~models.hide_tokens(SEEN, 0.5).apply({}, TEXT, key=key)
    other = {**TEXT, "tokens": jnp.where(hidden, 19, TEXT["tokens"])}
    found, again = (hiding.apply(params, text, key=key) for text in (TEXT, other))
    np.testing.assert_allclose(found, again, atol=1e-6)
    assert np.abs(found - hiding.apply(params, TEXT)).max() > 0.01


def test_support_and_query_are_hidden_by_keys_of_their_own():
    model = metajax.Model(SEEN.init, lambda params, inputs: inputs["mask"].astype(float))
    learner, half = (
        learners.prototypical(models.hide_tokens(model, 0.5)),
        {name: leaf[:2] for name, leaf in TEXT.items()},
    )
    part = metajax.Examples(half, jnp.arange(2), jnp.ones(2, bool), jnp.ones(2, bool))
    fn = hypergrad.value_and_grad(learner, hypergrad.unrolled())
    (_, aux), _ = fn({}, metajax.Episode(part, part), key=jax.random.key(0))
    assert np.all(np.diagonal(aux.outputs) < 0), "else a text would be its own prototype, at no distance"


@pytest.mark.slow
def test_each_key_hides_others_in_a_meta_step():
    hiding = models.hide_tokens(ENCODER, 0.5)
    params = hiding.init(jax.random.key(0), TEXT)
    one = {name: leaf[:1] for name, leaf in TEXT.items()}
    learner = learners.prototypical(hiding)
    support = metajax.Examples(one, jnp.zeros(1, int), jnp.ones(1, bool), jnp.ones(1, bool))
    outer = metajax.outer_update(learner, optax.sgd(0.0), hypergrad=hypergrad.unrolled())
    episodes = jax.tree.map(lambda leaf: leaf[None], metajax.Episode(support, support))
    distances = set()
    state = outer.init(jax.random.key(3), metajax.Episode(support, support))
    adapt = jax.jit(lambda key: learner.adapt(params, support, key=key).head[0])
    for seed in range(3):
        head = adapt(jax.random.key(seed))
        distances.add(round(float(jnp.sum((head - ENCODER.apply(params, one)[0]) ** 2)), 6))
    assert len(distances) == 3, "each key hides others"
    assert jnp.isfinite(outer.update(state, episodes)[1]["loss"]), "a meta step gives the keys"


@pytest.mark.parametrize(
    ("model", "share", "message"),
    [
        (ENCODER, 1.0, "share must be a number of at least 0 and below 1, got 1.0"),
        (ENCODER, -0.1, "share must be a number of at least 0 and below 1, got -0.1"),
        (models.hide_tokens(ENCODER, 0.1), 0.1, "model must need no key of its own, got one that needs key"),
        ("encoder", 0.1, "model must be of type Model, got"),
    ],
)
def test_refusals(model, share, message):
    with pytest.raises(ValueError, match=message):
        models.hide_tokens(model, share)
