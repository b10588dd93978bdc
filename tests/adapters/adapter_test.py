"""From plain parameters to adapted ones and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax import adapters, models

BASE = models.decoder(20, width=16, depth=2, heads=4)
TOKENS = jnp.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
ALL = adapters.lora(adapters.prompt(adapters.ia3(BASE), 3), rank=2)


@pytest.fixture(scope="module")
def pretrained():
    return BASE.init(jax.random.key(0), TOKENS)


def test_attach_adds_what_init_has_and_touches_nothing(pretrained):
    params = adapters.attach(ALL, pretrained, key=jax.random.key(1))
    shapes = jax.eval_shape(ALL.init, jax.random.key(0), TOKENS)
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    assert all(a.shape == b.shape for a, b in zip(*map(jax.tree.leaves, (params, shapes)), strict=True))
    assert params["blocks"]["query"]["kernel"] is pretrained["blocks"]["query"]["kernel"]
    assert "lora_a" not in pretrained["blocks"]["query"]
    assert not np.array_equal(
        params["blocks"]["query"]["lora_a"],
        adapters.attach(ALL, pretrained, key=jax.random.key(2))["blocks"]["query"]["lora_a"],
    )


def test_attach_keeps_the_adapters_that_are_there(pretrained):
    """An adapter that was trained gets a second one on top."""
    one = adapters.ia3(BASE)
    trained = jax.tree.map(lambda leaf: leaf + 0.5, adapters.attach(one, pretrained, key=jax.random.key(1)))
    params = adapters.attach(ALL, trained, key=jax.random.key(2))
    np.testing.assert_array_equal(params["blocks"]["key"]["ia3"], trained["blocks"]["key"]["ia3"])
    again = adapters.attach(ALL, params, key=jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_prompt_stays_where_the_weights_are_merged(pretrained):
    with_prompt = adapters.prompt(BASE, 3)
    model = adapters.lora(with_prompt, rank=2)
    params = jax.tree.map(lambda leaf: leaf + 0.1, adapters.attach(model, pretrained, key=jax.random.key(1)))
    merged = adapters.merge(adapters.lora(BASE, rank=2), params)
    np.testing.assert_allclose(
        jax.jit(with_prompt.apply)(merged, TOKENS), jax.jit(model.apply)(params, TOKENS), atol=1e-5
    )
    for whole in (model, with_prompt):
        with pytest.raises(ValueError, match="model must have no prompt, which no weight can hold"):
            adapters.merge(whole, params)


def test_what_has_no_adapter_is_refused(pretrained):
    for model in (BASE, models.mixed_precision(adapters.lora(BASE))):
        with pytest.raises(ValueError, match=r"model must be what a function of metajax\.adapters returned"):
            adapters.merge(model, pretrained)
        with pytest.raises(ValueError, match=r"model must be what a function of metajax\.adapters returned"):
            adapters.attach(model, pretrained, key=jax.random.key(0))
    with pytest.raises(ValueError, match="params must hold the leaves of the adapter 'lora', got none"):
        adapters.merge(adapters.lora(BASE), pretrained)


def test_count():
    params = {"head": {"kernel": np.zeros([3, 4]), "bias": np.zeros(4)}, "step": np.zeros([])}
    assert [adapters.count(params, where) for where in (None, "head", "bias", "step")] == [17, 16, 4, 1]
    with pytest.raises(ValueError, match="where must pick at least one leaf, got 'lora'"):
        adapters.count(params, "lora")
