"""A new column reads the frozen ones; they stay as they are, and so does what they predict."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds
from parity import numpy_reference

import metajax
from metajax import models

INPUTS = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
FIRST = metajax.models.mlp(2, hidden=(5, 4)).init(jax.random.key(0), INPUTS)
SECOND = models.progressive_column(FIRST, 3, hidden=(6, 7))
IMAGES = np.random.default_rng(1).normal(size=(3, 9, 8, 2)).astype(np.float32)
BATCH = {"pool": True, "normalisation": "batch"}
CONV = metajax.models.conv4(2, width=3, depth=2).init(jax.random.key(0), IMAGES)
THIRD = models.progressive_column(SECOND.init(jax.random.key(1), INPUTS), 1)


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


def conv_reference(params, images, policy, pool):
    hidden = []
    for number in range(len(params)):
        column, values, own = params[f"column_{number}"], images, []
        for index in range(len(column) - 1):
            block = {"block_0": column[f"block_{index}"]}
            flat, _ = numpy_reference.conv4(block, values, policy=policy, pool=pool)
            height, breadth = ((size // 2 if pool else -(-size // 2)) for size in values.shape[1:3])
            own.append(flat.reshape(len(images), height, breadth, -1))
            values = np.concatenate([own[-1], *(other[index] for other in hidden)], axis=-1)
        hidden.append(own)
        outputs = values.reshape(len(images), -1) @ column["head"]["kernel"] + column["head"]["bias"]
    return outputs


@pytest.mark.parametrize(
    ("policy", "pool"),
    worlds.few_by_default([("batch", True), ("layer", False), ("none", True)], lambda policy, pool: policy == "layer"),
)
def test_columns_of_convolutions_are_the_numpy_network(policy, pool):
    options = {"normalisation": policy, "pool": pool}
    first = metajax.models.conv4(2, width=3, depth=2, **options).init(jax.random.key(0), IMAGES)
    second = models.progressive_column(first, 4, hidden=(2, 5), **options)
    model = models.progressive_column(second.init(jax.random.key(1), IMAGES), 1, **options)
    params = jax.tree.map(lambda leaf: leaf + 0.1, model.init(jax.random.key(2), IMAGES))
    assert params["column_2"]["block_1"]["kernel"].shape == (3, 3, 3 + 3 + 2, 3)
    expected = conv_reference(jax.tree.map(np.array, params), IMAGES, policy, pool)
    np.testing.assert_allclose(model.apply(params, IMAGES), expected, rtol=1e-4, atol=1e-4)


def test_padding_enters_no_batch_statistics_of_columns():
    model = models.progressive_column(CONV, 2, **BATCH)
    params = model.init(jax.random.key(1), IMAGES)
    padded, mask = np.concatenate([IMAGES, 9 * IMAGES]), np.arange(6) < 3
    np.testing.assert_allclose(
        model.apply(params, padded, mask=mask)[:3], model.apply(params, IMAGES), rtol=1e-4, atol=1e-5
    )


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
        (lambda: models.progressive_column({"blocks": 1}, 2), r"earlier must be .* got a tree of \['blocks'\]"),
        (lambda: models.progressive_column(None, 2), r"earlier must be parameters of .* got a tree of \[\]"),
        (lambda: models.progressive_column(FIRST, 0), "outputs must be an integer of at least 1, got 0"),
        (lambda: models.progressive_column(FIRST, 2, hidden=(4,)), r"hidden must hold 2 widths, .* got \(4,\)"),
        (
            lambda: models.progressive_column(FIRST, 2, hidden=(4, 0)),
            "hidden must be an integer of at least 1, got 0",
        ),
        (
            lambda: SECOND.init(jax.random.key(0), jnp.ones([2, 5])),
            r"inputs must be of the size .* got \(5,\), of which .* would read \(5, 4\) numbers instead of \(3, 4\)",
        ),
        (lambda: models.progressive_column(FIRST, 2, pool=True), "pool must not be given beside .* mlp, got True"),
        (
            lambda: models.progressive_column(FIRST, 2, normalisation="layer"),
            "normalisation must not be given beside columns of mlp, got 'layer'",
        ),
        (
            lambda: models.progressive_column(CONV, 2, normalisation="batch"),
            "pool must be True or False, as the columns before were built, got None",
        ),
        (lambda: models.progressive_column(CONV, 2, pool=True), "normalisation must be .*, got None"),
        (
            lambda: models.progressive_column(CONV, 2, pool=True, normalisation="support"),
            "normalisation must be one of .*, got 'support'",
        ),
        (
            lambda: models.progressive_column(CONV, 2, pool=True, normalisation="none"),
            "normalisation must be that of the columns before, got 'none'",
        ),
        (
            lambda: models.progressive_column(CONV, 2, **BATCH).init(jax.random.key(0), IMAGES[:, :, :3]),
            r"inputs must be of the size .* would read \(2, 0\) numbers instead of \(2, 12\)",
        ),
        (
            lambda: models.progressive_column(CONV, 2, **{**BATCH, "pool": False}).init(jax.random.key(0), IMAGES),
            r"inputs must be of the size .*, and halved as there, .* would read \(2, 18\) numbers instead of \(2, 12\)",
        ),
        (
            lambda: models.progressive_column({"block_0": {"conv_0": 1}, "head": 1}, 2),
            r"earlier must be .* got a tree of \['block_0', 'head'\]",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
