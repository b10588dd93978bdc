"""A new column reads the frozen ones; they stay as they are, and so does what they predict."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax import strategies

INPUTS = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
FIRST = metajax.models.mlp(2, hidden=(5, 4)).init(jax.random.key(0), INPUTS)
SECOND = strategies.progressive_column(FIRST, 3, hidden=(6, 7))
THIRD = strategies.progressive_column(SECOND.init(jax.random.key(1), INPUTS), 1)


def relu(values, layer):
    return np.maximum(values @ np.array(layer["kernel"]) + np.array(layer["bias"]), 0)


def reference(params, inputs):
    """Hidden layer i of column k reads layer i - 1 of the columns k, 0, 1, ..., k - 1."""
    hidden = []
    for number in range(len(params)):
        column, values, own = params[f"column_{number}"], inputs, []
        for index in range(len(column) - 1):
            values = relu(values, column[f"layer_{index}"])
            own.append(values)
            values = np.concatenate([values, *(other[index] for other in hidden)], axis=1)
        hidden.append(own)
        outputs = values @ np.array(column["head"]["kernel"]) + np.array(column["head"]["bias"])
    return outputs


@pytest.mark.parametrize("model", [SECOND, THIRD])
def test_is_the_numpy_network(model):
    params = model.init(jax.random.key(2), INPUTS)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    np.testing.assert_allclose(model.apply(params, INPUTS), reference(params, INPUTS), rtol=1e-4, atol=1e-5)


def test_columns_before_come_as_they_are_and_widths_follow_the_first():
    params = THIRD.init(jax.random.key(2), INPUTS)
    for name, leaf in FIRST["layer_1"].items():
        np.testing.assert_array_equal(params["column_0"]["layer_1"][name], leaf)
    shapes = jax.tree.map(jnp.shape, params["column_2"])
    assert shapes == {
        "layer_0": {"kernel": (3, 5), "bias": (5,)},
        "layer_1": {"kernel": (5 + 5 + 6, 4), "bias": (4,)},
        "head": {"kernel": (4 + 4 + 7, 1), "bias": (1,)},
    }


def test_training_the_new_column_leaves_the_others():
    learner = metajax.learners.maml(SECOND, optax.sgd(0.1), adapts="^column_1/head")
    rule = optax.adam(0.1)
    outer = metajax.outer_update(learner, rule, hypergrad=metajax.hypergrad.unrolled(), trainable="^column_1/")
    examples = metajax.Examples(jnp.asarray(INPUTS), jnp.arange(6) % 3, jnp.ones(6, bool))
    episode = metajax.Episode(examples, examples)
    start = outer.init(jax.random.key(0), episode)
    assert jax.tree.leaves(start.opt_state[0].mu["column_0"]) == []
    state, _ = jax.jit(outer.update)(start, jax.tree.map(lambda leaf: leaf[None], episode))
    before, after = start.params, state.params
    assert all(map(np.array_equal, jax.tree.leaves(before["column_0"]), jax.tree.leaves(after["column_0"])))
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before["column_1"], after["column_1"])
    assert all(jax.tree.leaves(changed))
    # also the rows that read the first column
    assert np.any(after["column_1"]["head"]["kernel"][7:] != before["column_1"]["head"]["kernel"][7:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: strategies.progressive_column({"blocks": 1}, 2), r"earlier must be .* got a tree of \['blocks'\]"),
        (lambda: strategies.progressive_column(None, 2), r"earlier must be parameters of .* got a tree of \[\]"),
        (lambda: strategies.progressive_column(FIRST, 0), "outputs must be an integer of at least 1, got 0"),
        (lambda: strategies.progressive_column(FIRST, 2, hidden=(4,)), r"hidden must hold 2 widths, .* got \(4,\)"),
        (
            lambda: strategies.progressive_column(FIRST, 2, hidden=(4, 0)),
            "hidden must be an integer of at least 1, got 0",
        ),
        (
            lambda: SECOND.init(jax.random.key(0), jnp.ones([2, 5])),
            r"inputs must be of size 3, as the columns before take them, got \(5,\)",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
