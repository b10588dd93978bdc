"""A learned prompt is what the same embeddings as tokens would be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax import adapters, learners, models
from metajax.core import _tree

BASE = models.decoder(20, width=16, depth=2, heads=4, kv_heads=2)
MODEL = adapters.prompt(BASE, 3)
TOKENS = jnp.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
FRONT = jnp.array([7, 11, 2])


@pytest.fixture(scope="module")
def params():
    params = MODEL.init(jax.random.key(0), TOKENS)
    return {**params, "prompt": params["embed"]["embedding"][FRONT]}


@pytest.mark.parametrize("masked", [False, True])
def test_a_prompt_of_tokens_is_those_tokens(params, masked):
    mask = jnp.arange(6) < jnp.array([[4], [6]])
    longer = jnp.concatenate([jnp.broadcast_to(FRONT, (2, 3)), TOKENS], axis=1)
    plain = {name: leaf for name, leaf in params.items() if name != "prompt"}
    inputs, all_inputs = TOKENS, longer
    if masked:
        inputs = {"tokens": TOKENS, "mask": mask}
        all_inputs = {"tokens": longer, "mask": jnp.concatenate([jnp.ones([2, 3], bool), mask], axis=1)}
    apply = jax.jit(BASE.apply)
    expected = apply(plain, all_inputs)[:, 3:]
    np.testing.assert_allclose(jax.jit(MODEL.apply)(params, inputs), expected, atol=1e-5)
    assert np.abs(expected - apply(plain, inputs)).max() > 1e-2


def test_it_starts_as_embeddings_of_tokens(params):
    drawn = MODEL.init(jax.random.key(3), TOKENS)
    for row in np.asarray(drawn["prompt"]):
        assert np.any(np.all(row == np.asarray(drawn["embed"]["embedding"]), axis=1))
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), BASE.init(jax.random.key(0), TOKENS))
    narrow = adapters.attach(MODEL, narrow, key=jax.random.key(1))
    assert narrow["prompt"].dtype == jnp.float32
    assert jax.eval_shape(MODEL.apply, narrow, TOKENS).dtype == jnp.float32  # logits


def test_it_alone_adapts(params):
    learner = learners.maml(MODEL, optax.sgd(0.5), 3, adapts="^prompt$")
    support = metajax.Examples(TOKENS[:, :-1], TOKENS[:, 1:], jnp.ones(2, bool))

    @jax.jit
    def losses(params):
        adapted = learner.adapt(params, support)
        return adapted.params, [learner.problem.loss(tree, tree, support, 0, None) for tree in (params, adapted.params)]

    after, (before, now) = losses(params)
    assert now < before - 0.1
    same = jax.tree.map(np.array_equal, params, after)
    assert [path for path, kept in zip(_tree.paths(same), jax.tree.leaves(same), strict=True) if not kept] == ["prompt"]


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: adapters.prompt(BASE, 0), "length must be an integer of at least 1, got 0"),
        (lambda: adapters.prompt(BASE, 3, where="words"), "where must pick at least one leaf, got 'words'"),
        (lambda: adapters.prompt(BASE, 3, where="query"), r"where must pick one table .*'query', .*\[\(2, 16, 16\)\]"),
        (lambda: adapters.prompt(MODEL, 3), "model must have no adapter called 'prompt' yet"),
        (lambda: adapters.prompt(BASE.init, 3), "model must be of type Model"),
    ],
)
def test_bad_arguments(build, text):
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(build().init, jax.random.key(0), TOKENS)


def test_parameters_without_it_are_refused():
    with pytest.raises(ValueError, match="params must hold the leaves of the adapter 'prompt', got none"):
        MODEL.apply(BASE.init(jax.random.key(0), TOKENS), TOKENS)
