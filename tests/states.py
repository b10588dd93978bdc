"""States to save, and what makes two of them the same."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metajax


class _Moments(NamedTuple):
    mean: object
    rest: object


def full(seed=0, width=4):
    """A state with all that a state may hold: bf16, integers, lists, masks, empty states, keys."""
    params = {
        "body": {"conv_0": {"kernel": jax.random.normal(jax.random.key(seed), (8, width))}},
        "head": [jnp.arange(8, dtype=jnp.bfloat16) + seed, jnp.full(8, seed, jnp.float32)],
    }
    mask = {"body": True, "head": [False, True]}
    optimizer = optax.chain(optax.clip(1.0), optax.masked(optax.adam(1e-3), mask))
    hypergrad = _Moments(jnp.arange(16.0).reshape(8, 2) * seed, {"keys": jax.random.split(jax.random.key(seed), 8)})
    return metajax.MetaState(
        params, optimizer.init(params), hypergrad, jnp.array(seed, jnp.int32), jax.random.key(seed + 1)
    )


def _plain(state):
    return jax.tree.map(
        lambda leaf: np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf),
        state,
    )


def assert_same(ours, theirs):
    """Structure, types, shapes and bits."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(_plain(ours)), jax.tree.leaves(_plain(theirs)), strict=True):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def small(step):
    """A state that tells its step."""
    return metajax.MetaState(
        {"w": jnp.arange(6.0) * step}, (), (), jnp.array(step, jnp.int32), jax.random.key(step)
    )  # fmt: skip
