"""A batch of nothing: support sets are empty where training takes examples and no episodes."""

import jax
import jax.numpy as jnp
import pytest

from metajax import models

_SIZES = {"width": 16, "heads": 4, "depth": 2}


@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        (models.encoder(11, 3, **_SIZES), jnp.zeros([0, 6], jnp.int32), (0, 3)),
        (models.decoder(11, **_SIZES), jnp.zeros([0, 6], jnp.int32), (0, 6, 11)),
        (models.vit(3, patch=8, **_SIZES), jnp.zeros([0, 16, 16, 1]), (0, 3)),
    ],
    ids=["encoder", "decoder", "vit"],
)
def test_transformers_of_no_examples(model, inputs, expected):
    params = model.init(jax.random.key(0), jnp.ones([2, *inputs.shape[1:]], inputs.dtype))
    assert model.apply(params, inputs).shape == expected
