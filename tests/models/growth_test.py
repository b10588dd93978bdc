"""Growth keeps the function, and gives the moments that the large network's own gradients would have given."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds
from flax import traverse_util

import metajax
from metajax import models
from metajax.models import conv4, decoder, encoder, mlp, resnet12, vit

SMALL = {
    "layer_0": {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "bias": jnp.array([0.5, -0.5])},
    "head": {"kernel": jnp.array([[10.0], [20.0]]), "bias": jnp.array([1.0])},
}
IMAGES = np.random.default_rng(0).normal(size=(6, 16, 16, 1)).astype(np.float32)
VECTORS = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
TOKENS = np.arange(18).reshape(3, 6) % 11
BLOCKS = {"width": 16, "heads": 4, "remat": False}


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def generic(model, inputs, seed=0):
    """Parameters with no zero bias and no unit scale, made without a compiled initialisation."""
    rng = np.random.default_rng(seed)
    shapes = flat(jax.eval_shape(model.init, jax.random.key(seed), inputs))
    leaves = {
        path: jnp.asarray(0.3 * rng.normal(size=leaf.shape) + path.endswith("scale"), leaf.dtype)
        for path, leaf in shapes.items()
    }
    return traverse_util.unflatten_dict(leaves, sep="/")


def apply(model, params, inputs):
    found = model.apply(params, inputs, **dict.fromkeys(model.needs))
    return found[0] if "stats" in model.needs else found


def test_a_unit_is_copied_and_what_reads_it_is_divided():
    """A 2-2-1 network by hand: units 0, 0, 1; 10 * 4.5 + 20 * 5.5 + 1 = 156 in both."""
    large = models.widen(SMALL, 3).params(SMALL)
    np.testing.assert_array_equal(large["layer_0"]["kernel"], [[1, 1, 2], [3, 3, 4]])
    np.testing.assert_array_equal(large["layer_0"]["bias"], [0.5, 0.5, -0.5])
    np.testing.assert_array_equal(large["head"]["kernel"], [[5], [5], [20]])
    np.testing.assert_array_equal(large["head"]["bias"], [1])
    for hidden, params in (((2,), SMALL), ((3,), large)):
        assert mlp(1, hidden=hidden).apply(params, jnp.ones([1, 2])).tolist() == [[156.0]]


def test_a_layer_begins_as_the_identity():
    large = models.deepen(SMALL, 0).params(SMALL)
    assert sorted(large) == ["head", "layer_0", "layer_1"]
    np.testing.assert_array_equal(large["layer_1"]["kernel"], np.eye(2))
    np.testing.assert_array_equal(large["layer_1"]["bias"], [0, 0])
    assert mlp(1, hidden=(2, 2)).apply(large, jnp.ones([1, 2])).tolist() == [[156.0]]


def test_layers_are_put_in_behind_those_that_are_named():
    params = mlp(1, hidden=(4, 3)).init(jax.random.key(0), VECTORS)
    large = models.deepen(params, (0, 1, 1)).params(params)
    shapes = [large[f"layer_{index}"]["kernel"].shape for index in range(5)]
    assert shapes == [(3, 4), (4, 4), (4, 3), (3, 3), (3, 3)]
    np.testing.assert_array_equal(large["layer_2"]["kernel"], params["layer_1"]["kernel"])


def state_of(params, optimizer, grads, trainable=None, steps=7):
    """The state of a run that has seen one gradient, and its meta step."""
    learner = metajax.learners.prototypical(mlp(1, hidden=(2,)))
    outer = metajax.outer_update(learner, optimizer, hypergrad=metajax.hypergrad.unrolled(), trainable=trainable)
    state = outer.init(jax.random.key(3), EPISODE, params)
    trained = params if trainable is None else {"layer_0": {"kernel": None, "bias": None}, "head": params["head"]}
    grads = grads if trainable is None else {"layer_0": {"kernel": None, "bias": None}, "head": grads["head"]}
    opt_state = optimizer.update(grads, state.opt_state, trained)[1]
    return state._replace(opt_state=opt_state, step=jnp.asarray(steps, jnp.int32)), outer


EPISODE = metajax.Episode(
    *[metajax.Examples(jnp.ones([2, 2]), jnp.arange(2), jnp.ones(2, bool), jnp.ones(2, bool))] * 2
)
# of the sum of the outputs at (1, 1): the hidden units are 4.5 and 5.5
GRADS = {
    "layer_0": {"kernel": jnp.array([[10.0, 20.0], [10.0, 20.0]]), "bias": jnp.array([10.0, 20.0])},
    "head": {"kernel": jnp.array([[4.5], [5.5]]), "bias": jnp.array([1.0])},
}


def test_the_moments_of_adam_by_hand():
    """Of the sum of the outputs at (1, 1), a copy has half the gradient, and what reads it all of it."""
    state, outer = state_of(SMALL, optax.adam(0.1), GRADS)
    grown = models.grow_state(state, models.widen(SMALL, 3), outer, EPISODE)
    mu, nu = grown.opt_state[0].mu, grown.opt_state[0].nu
    np.testing.assert_allclose(mu["layer_0"]["bias"], 0.1 * np.array([5, 5, 20]), rtol=1e-6)
    np.testing.assert_allclose(nu["layer_0"]["bias"], 0.001 * np.array([25, 25, 400]), rtol=1e-4)
    np.testing.assert_allclose(mu["layer_0"]["kernel"], 0.1 * np.array([[5, 5, 20]] * 2), rtol=1e-6)
    np.testing.assert_allclose(mu["head"]["kernel"], 0.1 * np.array([[4.5], [4.5], [5.5]]), rtol=1e-6)
    np.testing.assert_allclose(nu["head"]["kernel"], 0.001 * np.square([[4.5], [4.5], [5.5]]), rtol=1e-4)
    assert int(grown.opt_state[0].count) == 1
    assert int(grown.step) == 7
    assert jnp.array_equal(jax.random.key_data(grown.key), jax.random.key_data(state.key))
    np.testing.assert_array_equal(grown.params["head"]["kernel"], [[5], [5], [20]])


@pytest.mark.parametrize(
    ("optimizer", "field", "power"),
    [
        (optax.sgd(0.1, momentum=0.9), "trace", 1),
        (optax.chain(optax.clip_by_global_norm(1e9), optax.adam(optax.cosine_decay_schedule(0.1, 9))), "mu", 1),
        (optax.apply_if_finite(optax.rmsprop(0.1), 3), "nu", 2),
        (optax.adagrad(0.1, initial_accumulator_value=0.0), "sum_of_squares", 2),
        (optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(), "acc_grads", 1),
    ],
)
def test_other_rules_carry_theirs(optimizer, field, power):
    state, outer = state_of(SMALL, optimizer, GRADS)
    grown = models.grow_state(state, models.widen(SMALL, 3), outer, EPISODE)
    before, after = (optax.tree_utils.tree_get(one.opt_state, field)["layer_0"]["bias"] for one in (state, grown))
    np.testing.assert_allclose(after, np.array(before)[[0, 0, 1]] / np.array([2, 2, 1]) ** power, rtol=1e-6)
    counts = [[leaf for leaf in jax.tree.leaves(one.opt_state) if leaf.ndim == 0] for one in (state, grown)]
    np.testing.assert_array_equal(*map(np.array, counts))
    again, _ = jax.jit(outer.update)(grown, jax.tree.map(lambda leaf: leaf[None], EPISODE))
    assert jax.tree.structure(again) == jax.tree.structure(grown)


def test_what_is_frozen_grows_and_has_no_moments():
    state, outer = state_of(SMALL, optax.adam(0.1), GRADS, trainable="head")
    grown = models.grow_state(state, models.widen(SMALL, 3), outer, EPISODE)
    assert grown.params["layer_0"]["bias"].shape == (3,)
    assert grown.opt_state[0].mu["layer_0"] == {"kernel": None, "bias": None}
    np.testing.assert_allclose(grown.opt_state[0].mu["head"]["kernel"], [[0.45], [0.45], [0.55]], rtol=1e-6)
    deeper = models.grow_state(state, models.deepen(SMALL, 0), outer, EPISODE)
    assert deeper.opt_state[0].mu["layer_1"] == {"kernel": None, "bias": None}


def test_a_new_layer_has_no_moments():
    state, outer = state_of(SMALL, optax.adam(0.1), GRADS)
    grown = models.grow_state(state, models.deepen(SMALL, 0), outer, EPISODE)
    mu = grown.opt_state[0].mu
    np.testing.assert_array_equal(mu["layer_1"]["kernel"], np.zeros([2, 2]))
    np.testing.assert_allclose(mu["layer_0"]["kernel"], 0.1 * GRADS["layer_0"]["kernel"])


@pytest.mark.parametrize("optimizer", [optax.adafactor(0.1, min_dim_size_to_factor=1), optax.adadelta(0.1)])
def test_what_is_no_moment_is_refused(optimizer):
    state, outer = state_of(SMALL, optimizer, GRADS)
    with pytest.raises(ValueError, match=r"state.opt_state must hold moments of the gradients .* got '"):
        models.grow_state(state, models.widen(SMALL, 3), outer, EPISODE)


def conv(policy, outputs, width, depth=2, pool=True):
    return conv4(outputs, width=width, depth=depth, pool=pool, normalisation=policy)


WIDE = {
    "mlp": (mlp(3, hidden=(5, 4)), mlp(3, hidden=(8, 9)), VECTORS, (8, 9), "batch"),
    "conv4 batch": (conv("batch", 3, 8), conv("batch", 3, 12), IMAGES, 12, "batch"),
    "conv4 strided": (conv("batch", 3, 8, 3, False), conv("batch", 3, 20, 3, False), IMAGES, 20, "batch"),
    "conv4 support": (conv("support", 3, 8), conv("support", 3, 11), IMAGES, 11, "support"),
    "conv4 none": (conv("none", 3, 8), conv("none", 3, 11), IMAGES, 11, "none"),
    "conv4 layer": (conv("layer", 3, 8), conv("layer", 3, 24), IMAGES, 24, "layer"),
    "conv4 group": (conv("group", 3, 8), conv("group", 3, 16), IMAGES, 16, "group"),
    "decoder": (
        decoder(11, depth=2, hidden=12, **BLOCKS),
        decoder(11, depth=2, hidden=17, **BLOCKS),
        TOKENS,
        17,
        "batch",
    ),
    "vit": (
        vit(3, patch=8, depth=2, hidden=12, **BLOCKS),
        vit(3, patch=8, depth=2, hidden=24, **BLOCKS),
        IMAGES,
        24,
        "batch",
    ),
    "encoder": (
        encoder(11, 3, depth=2, hidden=12, **BLOCKS),
        encoder(11, 3, depth=2, hidden=17, **BLOCKS),
        TOKENS,
        17,
        "batch",
    ),
}
FAST = ("mlp", "conv4 strided", "conv4 none", "conv4 group", "decoder")
DEEP = {
    "mlp": (mlp(3, hidden=(5, 4)), mlp(3, hidden=(5, 5, 4, 4)), VECTORS, (0, 1)),
    "decoder": (
        decoder(11, depth=2, kv_heads=2, qk_norm=True, **BLOCKS),
        decoder(11, depth=5, kv_heads=2, qk_norm=True, **BLOCKS),
        TOKENS,
        (0, 1, 1),
    ),
    "vit": (vit(3, patch=8, depth=2, **BLOCKS), vit(3, patch=8, depth=4, **BLOCKS), IMAGES, (0, 0)),
    "encoder": (encoder(11, 3, depth=2, **BLOCKS), encoder(11, 3, depth=5, **BLOCKS), TOKENS, (0, 1, 1)),
}


def compare(small, large, inputs, params, growth):
    """Compares outputs, and gradients of what was there before; gives those of the large network."""
    grown = growth.params(params)
    wanted = jax.eval_shape(large.init, jax.random.key(0), inputs)
    assert jax.tree.map(jnp.shape, grown) == jax.tree.map(lambda leaf: leaf.shape, wanted)

    def evaluated(model, params):
        def loss(params):
            outputs = apply(model, params, inputs)
            return jnp.sum(jnp.sin(outputs)), outputs

        grads, outputs = jax.jit(jax.grad(loss, has_aux=True))(params)
        return outputs, flat(grads)

    (outputs, before), (grown_outputs, after) = evaluated(small, params), evaluated(large, grown)
    np.testing.assert_allclose(grown_outputs, outputs, rtol=1e-5, atol=1e-5)
    old = growth.moments({path: jnp.ones_like(leaf) for path, leaf in before.items()}, 1)
    for power in (1, 2):
        told = growth.moments({path: leaf**power for path, leaf in before.items()}, power)
        assert sorted(told) == sorted(after)
        for path, leaf in told.items():
            known = np.array(old[path]) != 0
            wanted = np.array(after[path])[known] ** power
            limit = 1e-6 + 1e-4 * np.abs(wanted).max(initial=0)
            np.testing.assert_allclose(np.array(leaf)[known], wanted, rtol=1e-3, atol=limit, err_msg=path)
    return after


@pytest.mark.parametrize("name", worlds.few_by_default(list(WIDE), lambda name: name in FAST))
def test_widening_keeps_the_function_and_gives_the_gradients(name):
    small, large, inputs, widths, policy = WIDE[name]
    params = generic(small, inputs)
    compare(small, large, inputs, params, models.widen(params, widths, normalisation=policy))


@pytest.mark.parametrize("name", ["mlp", "conv4 batch", "decoder"])
def test_noise_that_sums_to_zero_over_copies_keeps_the_function(name):
    small, large, inputs, widths, policy = WIDE[name]
    params = generic(small, inputs)
    noisy = models.widen(params, widths, normalisation=policy, noise=0.3, key=jax.random.key(1)).params(params)
    plain = models.widen(params, widths, normalisation=policy).params(params)
    outputs = jax.jit(lambda params: apply(large, params, inputs))
    np.testing.assert_allclose(outputs(noisy), outputs(plain), rtol=1e-5, atol=1e-5)
    changed = [path for path, leaf in flat(noisy).items() if not np.allclose(leaf, flat(plain)[path], atol=1e-2)]
    read = {"mlp": ["head/kernel", "layer_1/kernel"], "decoder": ["blocks/down/kernel"]}
    assert sorted(changed) == read.get(name, ["block_1/kernel", "head/kernel"])


@pytest.mark.parametrize("name", worlds.few_by_default(DEEP, lambda name: name in FAST))
def test_deepening_keeps_the_function_and_gives_the_gradients(name):
    small, large, inputs, after = DEEP[name]
    params = generic(small, inputs)
    grads = compare(small, large, inputs, params, models.deepen(params, after))
    if name != "mlp":  # a block that was put in is trained from the first step on
        for part in ("out", "down"):
            assert np.all(np.abs(grads[f"blocks/{part}/kernel"]).max((1, 2)) > 1e-6)


@pytest.mark.parametrize("policy", ["batch", "none"])
def test_features_without_a_head_keep_their_distances(policy):
    small, large = (conv(policy, None, width) for width in (8, 12))
    params = generic(small, IMAGES)
    growth = models.widen(params, 12, normalisation=policy)

    def judged(model):
        def loss(params):
            features = apply(model, params, IMAGES)
            distances = jnp.sum(jnp.square(features[:, None] - features), axis=-1)
            return jnp.sum(jnp.sin(distances / 50)), distances

        return jax.jit(jax.grad(loss, has_aux=True))

    grown, judge = growth.params(params), judged(large)
    (before, distances), (after, grown_distances) = judged(small)(params), judge(grown)
    np.testing.assert_allclose(grown_distances, distances, rtol=1e-4, atol=1e-4)
    told = growth.moments(flat(before), 1)
    for path, leaf in flat(after).items():
        np.testing.assert_allclose(told[path], leaf, rtol=1e-3, atol=1e-3 * float(jnp.max(jnp.abs(leaf))), err_msg=path)
    noisy = models.widen(params, 12, normalisation=policy, noise=0.01, key=jax.random.key(0)).params(params)
    assert not np.allclose(noisy["block_1"]["kernel"], grown["block_1"]["kernel"], atol=1e-4)
    scale = float(jnp.max(distances))
    np.testing.assert_allclose(judge(noisy)[1], distances, atol=0.05 * scale)


def test_copies_part_only_with_noise():
    small, large = mlp(1, hidden=(4,)), mlp(1, hidden=(8,))
    params = generic(small, VECTORS)

    rule = optax.adam(0.05)

    @jax.jit
    def step(params, opt_state):
        grads = jax.grad(lambda p: jnp.mean(jnp.square(large.apply(p, VECTORS) - VECTORS[:, :1])))(params)
        updates, opt_state = rule.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    def after_training(noise):
        grown = models.widen(params, 8, noise=noise, key=jax.random.key(0)).params(params)
        opt_state = rule.init(grown)
        for _ in range(5):
            grown, opt_state = step(grown, opt_state)
        kernel = np.array(grown["layer_0"]["kernel"])
        return np.abs(kernel[:, 0::2] - kernel[:, 1::2]).max()

    assert after_training(0.0) < 1e-6
    assert after_training(0.5) > 1e-2


def test_stacked_blocks_repeat_all_of_them():
    params = {"blocks": {"out": {"kernel": jnp.arange(2.0)[:, None, None]}}, "norm": {"scale": jnp.ones(1)}}
    growth = models.stack_blocks(params, 5)
    assert growth.params(params)["blocks"]["out"]["kernel"].ravel().tolist() == [0, 1, 0, 1, 0]
    assert growth.moments({"blocks/out/kernel": jnp.array([3.0, 4.0])}, 2)["blocks/out/kernel"].tolist() == [
        3,
        4,
        3,
        4,
        3,
    ]


CONV = jax.eval_shape(conv("layer", None, 8).init, jax.random.key(0), IMAGES)
LORA = metajax.adapters.lora(vit(3, patch=8, depth=2, **BLOCKS)).init(jax.random.key(0), IMAGES)
RESNET = jax.eval_shape(resnet12(widths=(8,)).init, jax.random.key(0), IMAGES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.widen(SMALL, 1), "widths must be at least 2 for layer_0, got 1"),
        (lambda: models.widen(SMALL, 2.5), "widths must be an integer of at least 1, got 2.5"),
        (lambda: models.widen(SMALL, (3, 3)), r"widths must hold one width for each of the 1 layers, got \(3, 3\)"),
        (lambda: models.widen(SMALL, 3, noise=0.1), "key must be given for a noise of 0.1, got None"),
        (lambda: models.widen(SMALL, 3, noise=-1.0), "noise must be a finite number of at least 0, got -1.0"),
        (
            lambda: models.widen(CONV, 12, normalisation="layer"),
            "widths must be a multiple of 8 for block_0, got 12",
        ),
        (lambda: models.widen(CONV, 16, normalisation="rms"), "normalisation must be one of 'batch', .* got 'rms'"),
        (
            lambda: models.widen(RESNET, 16),
            "params must be those of metajax.models.mlp .* or of conv4, got a tree of",
        ),
        (
            lambda: models.deepen(CONV, 0),
            "params must be those of metajax.models.mlp .* decoder, vit or encoder, got a tree of",
        ),
        (lambda: models.widen(LORA, 99), "without adapters, got a tree of .*lora_a"),
        (
            lambda: models.widen(generic(vit(3, patch=8, depth=2, hidden=12, **BLOCKS), IMAGES), 11),
            "widths must be at least 12 for the hidden layers of the blocks, got 11",
        ),
        (lambda: models.deepen(SMALL, 1), "after must hold numbers of layers, from 0 to 0, got 1"),
        (lambda: models.deepen(SMALL, (0, -1)), r"after must hold numbers of layers, from 0 to 0, got \(0, -1\)"),
        (lambda: models.deepen(LORA, 0), "without adapters, got a tree of .*lora_a"),
        (lambda: models.stack_blocks(SMALL, 4), r"params must be those of a decoder, .* got a tree of \['head'"),
        (
            lambda: models.stack_blocks({"blocks": {"out": {"kernel": jnp.ones([3, 1, 1])}}}, 2),
            "depth must be an integer of at least 3, got 2",
        ),
        (lambda: models.grow_state(None, None, None, None), "growth must be of type Growth, got None"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
