"""Modules of flax as pure models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import metajax
from metajax import models

_X = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


class _Noisy(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, inputs):
        return self.dropout(self.norm(self.linear(inputs)))


class _LinenNoisy(linen.Module):
    @linen.compact
    def __call__(self, inputs, deterministic=True):
        values = linen.BatchNorm(use_running_average=False)(linen.Dense(4)(inputs))
        return linen.Dropout(0.5)(values, deterministic=deterministic)


def test_nnx_parameters_are_a_plain_tree_and_apply_is_the_module():
    model = models.from_nnx(lambda rngs: nnx.Linear(3, 2, rngs=rngs))
    params = model.init(jax.random.key(0), _X)
    assert jax.tree.map(jnp.shape, params) == {"bias": (2,), "kernel": (3, 2)}
    np.testing.assert_allclose(model.apply(params, _X), _X @ params["kernel"] + params["bias"], rtol=1e-5)
    other = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_array_equal(model.apply(other, _X), 0)
    np.testing.assert_allclose(model.apply(params, _X), _X @ params["kernel"] + params["bias"], rtol=1e-5)


@pytest.mark.parametrize(
    "model", [models.from_nnx(_Noisy, needs=("key",)), models.from_linen(_LinenNoisy(), needs=("key",))],
    ids=["nnx", "linen"],
)  # fmt: skip
def test_dropout_follows_the_key_and_state_does_not_leak(model):
    params = model.init(jax.random.key(0), _X)
    apply = jax.jit(lambda params, key: model.apply(params, _X, key=key))
    one, again, other = (apply(params, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other)
    silent = model.apply(params, _X, key=None)
    np.testing.assert_array_equal(silent, model.apply(params, _X, key=None))
    assert np.all(silent != 0)
    assert all("dropout" not in path for path in params)


def test_batch_normalisation_of_a_linen_module_uses_the_call():
    model = models.from_linen(linen.BatchNorm(use_running_average=False))
    outputs = model.apply(model.init(jax.random.key(0), _X), _X)
    np.testing.assert_allclose(outputs.mean(0), 0, atol=1e-5)


def test_wrapped_models_differentiate_and_map():
    model = models.from_nnx(lambda rngs: nnx.Linear(3, 2, rngs=rngs))
    params = model.init(jax.random.key(0), _X)
    loss = lambda params, x: jnp.sum(model.apply(params, x) ** 2)  # noqa: E731
    grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, jnp.stack([_X, 2 * _X]))
    np.testing.assert_allclose(grads["kernel"][0], jax.grad(loss)(params, _X)["kernel"], rtol=1e-5)


def test_mlp_against_numpy_and_its_refusals():
    model = models.mlp(2, hidden=(4,))
    params = model.init(jax.random.key(0), _X)
    hidden = np.maximum(_X @ params["layer_0"]["kernel"] + params["layer_0"]["bias"], 0)
    np.testing.assert_allclose(
        model.apply(params, _X), hidden @ params["head"]["kernel"] + params["head"]["bias"], rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="outputs must be an integer of at least 1, got 0"):
        models.mlp(0)
    with pytest.raises(ValueError, match="hidden must be an integer of at least 1, got -2"):
        models.mlp(2, hidden=(-2,))


def test_unsigned_images_are_scaled():
    images = np.array([[0, 255, 51]], np.uint8)
    linear = models.from_linen(linen.Dense(2))
    params = linear.init(jax.random.key(0), images)
    np.testing.assert_allclose(linear.apply(params, images), linear.apply(params, images / np.float32(255)), rtol=1e-6)


class _NormedAndNoisy(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.dropout = nnx.BatchNorm(3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, inputs):
        return self.dropout(self.norm(inputs))


def test_without_a_key_dropout_is_off_and_batch_normalisation_still_normalises():
    model = models.from_nnx(_NormedAndNoisy, needs=("key",))
    inputs = 100 + 10 * _X
    params = model.init(jax.random.key(0), inputs)
    silent = model.apply(params, inputs, key=None)
    np.testing.assert_allclose(silent, (inputs - inputs.mean(0)) / inputs.std(0), rtol=1e-3, atol=1e-3)
    assert np.any(model.apply(params, inputs, key=jax.random.key(1)) == 0)


class _Masking(linen.Module):
    @linen.compact
    def __call__(self, inputs, mask):
        outputs = linen.Dense(2)(inputs)
        return outputs if mask is None else jnp.where(mask[:, None], outputs, 0)


def test_a_linen_module_that_takes_a_mask():
    model = models.from_linen(_Masking(), needs=("mask",))
    params = model.init(jax.random.key(0), _X)
    mask = jnp.arange(len(_X)) < 2
    outputs = model.apply(params, _X, mask=mask)
    assert np.all(outputs[:2] != 0)
    assert np.all(outputs[2:] == 0)


class _NnxNormed(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(3, 5, rngs=rngs), nnx.BatchNorm(5, rngs=rngs)

    def __call__(self, inputs):
        return self.norm(self.first(inputs))


class _LinenNormed(linen.Module):
    @linen.compact
    def __call__(self, inputs):
        return linen.BatchNorm(use_running_average=False)(linen.Dense(5)(inputs))


_NORMED = {
    "nnx": lambda **options: models.from_nnx(_NnxNormed, **options),
    "linen": lambda **options: models.from_linen(_LinenNormed(), **options),
}


@pytest.mark.parametrize("name", _NORMED)
def test_padding_stays_out_of_the_statistics_of_a_batch_normalisation(name):
    model = _NORMED[name](needs=("mask",))
    padded, mask = np.concatenate([_X, np.full_like(_X, 7)]), np.arange(2 * len(_X)) < len(_X)
    params = model.init(jax.random.key(0), _X)
    alone = model.apply(params, _X, mask=mask[: len(_X)])
    np.testing.assert_allclose(alone.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(model.apply(params, padded, mask=mask)[: len(_X)], alone, rtol=1e-5, atol=1e-6)
    assert np.isfinite(model.apply(params, _X, mask=mask[len(_X) :])).all(), "all of it is padding"
    learner = metajax.learners.maml(model, optax.sgd(0.1), 2)
    targets = np.arange(len(mask)) % 2
    few = metajax.Examples(_X, targets[: len(_X)], mask[: len(_X)])
    plain = learner.predict(learner.adapt(params, few), _X, mask=mask[: len(_X)])
    adapted = learner.adapt(params, metajax.Examples(padded, targets, mask))
    np.testing.assert_allclose(learner.predict(adapted, padded, mask=mask)[: len(_X)], plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", _NORMED)
def test_a_batch_normalisation_that_counts_padding_says_so(name):
    model = _NORMED[name]()
    params = model.init(jax.random.key(0), _X)
    with pytest.warns(UserWarning, match=r'padding counts in the statistics .*: give needs=\("mask",\)'):
        model.apply(params, _X)
