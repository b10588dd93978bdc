"""Low-rank paths and learned scales: layers in NumPy, what adapts, exact hypergradients, memory, types, bad input."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

import metajax
from metajax import adapters, hypergrad, learners, models
from metajax.core import _tree

BASE = models.decoder(20, width=16, depth=2, heads=4, kv_heads=2)
TOKENS = jnp.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
base = jax.jit(BASE.apply)


def two_layers(bias=0.0):
    """A network of plain functions; its kernels are the leaves called kernel."""

    def init(key, inputs):
        sizes = {"body": (inputs.shape[-1], 6), "head": (6, 4)}
        keys = jax.random.split(key, 2)
        return {
            name: {"kernel": jax.random.normal(k, size)} for k, (name, size) in zip(keys, sizes.items(), strict=True)
        }

    def apply(params, inputs):
        return jnp.tanh(inputs @ params["body"]["kernel"] + bias) @ params["head"]["kernel"]

    return metajax.Model(init, apply)


@functools.cache
def base_params():
    return BASE.init(jax.random.key(0), TOKENS)


def init(model):
    """Parameters of an adapted `BASE`."""
    return adapters.attach(model, base_params(), key=jax.random.key(1))


def scattered(params, size=0.3):
    """Parameters at a point where nothing is special: no zero, no unit scale."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + size * rng.normal(size=leaf.shape), leaf.dtype), params)


@pytest.fixture(scope="module")
def episode():
    """Texts of two support and two query examples; the targets are the next tokens."""
    rng = np.random.default_rng(0)

    def examples():
        tokens = jnp.asarray(rng.integers(0, 20, (2, 7)), jnp.int32)
        return metajax.Examples(tokens[:, :-1], tokens[:, 1:], jnp.ones(2, bool))

    return metajax.Episode(examples(), examples())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("order", ["lora", "lora of ia3", "ia3 of lora"])
def test_a_layer_in_numpy(order):
    everything = {"where": "kernel"}
    model = {
        "lora": lambda: adapters.lora(two_layers(), rank=2, alpha=6.0, **everything),
        "lora of ia3": lambda: adapters.lora(adapters.ia3(two_layers(), **everything), rank=2, alpha=6.0, **everything),
        "ia3 of lora": lambda: adapters.ia3(adapters.lora(two_layers(), rank=2, alpha=6.0, **everything), **everything),
    }[order]()
    inputs = np.random.default_rng(0).normal(size=(5, 3))
    start = model.init(jax.random.key(0), inputs)
    params = scattered(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), start))

    def layer(inputs, group):
        plain, path = inputs @ group["kernel"], 3.0 * ((inputs @ group["lora_a"]) @ group["lora_b"])
        if order == "lora":
            return plain + path
        return (plain + path) * group["ia3"] if order == "lora of ia3" else plain * group["ia3"] + path

    body, head = (jax.tree.map(np.asarray, params[name]) for name in ("body", "head"))
    expected = layer(np.tanh(layer(inputs, body)), head)
    np.testing.assert_allclose(model.apply(params, inputs), expected, rtol=1e-12)  # NumPy inputs
    np.testing.assert_allclose(model.apply(params, jnp.asarray(inputs)), expected, rtol=1e-12)
    plain = adapters.merge(model, params)
    assert jax.tree.structure(plain) == jax.tree.structure(two_layers().init(jax.random.key(0), inputs))
    np.testing.assert_allclose(two_layers().apply(plain, inputs), expected, rtol=1e-12)


def test_every_block_of_a_decoder_has_its_own_path():
    model = adapters.lora(BASE, rank=2, alpha=4.0)
    params = scattered(init(model))
    blocks = jax.tree.map(np.asarray, params["blocks"])
    for name in ("query", "value"):
        group = blocks[name]
        sums = [group["kernel"][i] + 2.0 * group["lora_a"][i] @ group["lora_b"][i] for i in range(2)]
        blocks[name] = {"kernel": np.stack(sums)}
    expected = base({**params, "blocks": blocks}, TOKENS)
    np.testing.assert_allclose(jax.jit(model.apply)(params, TOKENS), expected, rtol=1e-4, atol=1e-5)
    merged = adapters.merge(model, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged["blocks"], blocks)


def test_scales_are_of_keys_values_and_hidden_units():
    model = adapters.ia3(BASE)
    params = scattered(init(model))
    blocks = jax.tree.map(np.asarray, params["blocks"])
    for name in ("key", "value"):
        blocks[name] = {"kernel": blocks[name]["kernel"] * blocks[name]["ia3"][:, None, :]}
    hidden = blocks["up"].pop("ia3")
    blocks["down"] = {"kernel": blocks["down"]["kernel"] * hidden[:, :, None]}  # what comes in: the hidden units
    expected = base({**params, "blocks": blocks}, TOKENS)
    np.testing.assert_allclose(jax.jit(model.apply)(params, TOKENS), expected, rtol=1e-4, atol=1e-5)
    plain = adapters.merge(model, params)
    np.testing.assert_allclose(base(plain, TOKENS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["(query|value)/kernel", None])
def test_at_first_the_outputs_are_those_of_the_base(where):
    model = adapters.ia3(adapters.lora(BASE, rank=2, where=where), where=where)
    params = init(model)
    names = {path.split("/")[-1] for path in _tree.paths(params)}
    assert names == {"kernel", "scale", "embedding", "lora_a", "lora_b", "ia3"}
    picked = 8 if where is None else 2  # with the head
    assert sum(path.endswith("lora_a") for path in _tree.paths(params)) == picked
    np.testing.assert_array_equal(jax.jit(model.apply)(params, TOKENS), base(params_of_base(params), TOKENS))


def params_of_base(tree):
    """The tree without the leaves of adapters."""
    if not isinstance(tree, dict):
        return tree
    return {name: params_of_base(leaf) for name, leaf in tree.items() if not re.match("lora|ia3", name)}


def test_the_start_of_a_path_is_random_with_variance_one_over_its_inputs():
    model = adapters.lora(two_layers(), rank=6, where="body")
    group = model.init(jax.random.key(0), jnp.ones([1, 1000]))["body"]
    np.testing.assert_allclose(np.std(group["lora_a"]) * 1000**0.5, 1.0, atol=0.05)
    assert not group["lora_b"].any()
    scanned = init(adapters.lora(BASE))["blocks"]
    draws = [scanned[name]["lora_a"][block] for name in ("query", "value") for block in range(2)]
    assert all(np.abs(one - other).max() > 0.1 for i, one in enumerate(draws) for other in draws[:i])


def test_only_the_paths_adapt_inside_a_task(episode):
    model = adapters.lora(BASE, rank=2)
    learner = learners.maml(model, optax.sgd(0.5), 2, adapts="lora")
    params = init(model)
    assert len(jax.tree.leaves(learner.problem.init(params, episode.support, None))) == 4  # what a task keeps
    adapted = jax.jit(learner.adapt)(params, episode.support).params
    same = jax.tree.map(np.array_equal, params, adapted)
    moved = {path for path, kept in zip(_tree.paths(same), jax.tree.leaves(same), strict=True) if not kept}
    assert moved == {f"blocks/{name}/lora_{side}" for name in ("query", "value") for side in "ab"}


@pytest.mark.usefixtures("x64")
def test_the_hypergradient_agrees_with_finite_differences():
    """MAML over the paths: of the start of the paths, and of the base that they stand beside."""
    model = adapters.lora(adapters.ia3(two_layers(bias=0.1), where="body"), rank=2, where="kernel")
    learner = learners.maml(model, optax.sgd(0.3), 3, adapts="lora")
    episode = metajax.Episode(worlds.examples(0, 6, 2), worlds.examples(1, 7, 2))
    start = learner.init(jax.random.key(0), episode.support.inputs)
    params = scattered(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), start))

    @jax.jit
    def objective(point):
        return learner.outer_loss(learner.adapt(point, episode.support), point, episode.query)[0]

    gradient = jax.jit(hypergrad.value_and_grad(learner, hypergrad.mixed_mode()))
    (loss, _), grads = gradient(params, episode)
    np.testing.assert_allclose(loss, objective(params), rtol=1e-12)
    for seed in range(3):
        direction = worlds.random_direction(params, seed)
        expected = worlds.finite_difference(objective, params, direction, step=1e-4)
        np.testing.assert_allclose(worlds.dot(grads, direction), expected, rtol=1e-7)
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(grads))


WIDE = adapters.lora(models.decoder(32, width=256, depth=2, heads=2), rank=2, where="blocks")
LEARNER = learners.maml(WIDE, optax.sgd(0.5), 2, adapts="lora")


@pytest.fixture(scope="module")
def meta_step():
    """A compiled meta step by mixed mode of 16 tasks under vmap, its start and its tasks."""
    outer = metajax.outer_update(
        LEARNER, optax.sgd(1.0), hypergrad=hypergrad.mixed_mode(), trainable="lora", task_batching="vmap", before=False
    )
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 16, 1, 5)), jnp.int32)
    parts = [metajax.Examples(part[..., :-1], part[..., 1:], jnp.ones([16, 1], bool)) for part in tokens]
    params = scattered(WIDE.init(jax.random.key(0), TOKENS), 0.05)
    state = outer.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], metajax.Episode(*parts)), params=params)
    return jax.jit(outer.update).lower(state, metajax.Episode(*parts)).compile(), state, metajax.Episode(*parts)


@pytest.mark.slow  # two large programs; small ones are compared above
def test_a_meta_step_moves_the_paths_alone(meta_step):
    """Against one task after the other by reverse mode."""
    update, state, tasks = meta_step
    gradient = jax.jit(hypergrad.value_and_grad(LEARNER, hypergrad.unrolled()))
    grads = [gradient(state.params, jax.tree.map(lambda leaf, i=i: leaf[i], tasks))[1] for i in range(16)]
    expected, _ = _tree.split(jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *grads), "lora")
    moves = jax.tree.map(lambda old, new: old - new, state.params, update(state, tasks)[0].params)
    picked, frozen = _tree.split(moves, "lora")
    assert worlds.relative_distance(picked, expected) < 1e-3
    assert not any(leaf.any() for leaf in jax.tree.leaves(frozen))


@pytest.mark.slow
def test_many_tasks_share_the_base(meta_step):
    """Less than a quarter of a copy of the kernels for each task; a sum of kernels and paths would keep several."""
    update, state, _ = meta_step
    kernels = sum(leaf.nbytes for leaf in jax.tree.leaves(_tree.split(state.params, "kernel")[0]))
    assert kernels > 6e6
    assert update.memory_analysis().temp_size_in_bytes < 16 * kernels / 4


@pytest.mark.parametrize(
    ("kernels", "computes"),
    worlds.few_by_default([("bfloat16", None), ("float32", "bfloat16")], lambda kernels, _: kernels == "bfloat16"),
)
def test_types_are_kept(episode, kernels, computes):
    """The paths are float32 beside bfloat16 kernels, and no step changes the type of a leaf."""
    model = adapters.ia3(adapters.lora(BASE, rank=2))
    params = jax.tree.map(lambda leaf: leaf.astype(kernels), base_params())
    params = adapters.attach(model, params, key=jax.random.key(1))
    types = {path: leaf.dtype.name for path, leaf in zip(_tree.paths(params), jax.tree.leaves(params), strict=True)}
    assert {name for path, name in types.items() if re.search("lora|ia3", path)} == {"float32"}
    assert {name for path, name in types.items() if not re.search("lora|ia3", path)} == {kernels}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(adapters.merge(model, params))} == {kernels}
    run = models.mixed_precision(model, computes) if computes else model
    outputs = jax.eval_shape(run.apply, params, TOKENS)
    assert outputs.dtype == "float32"  # logits, for the sums of a softmax
    products = re.findall(r"(\w+)\[[^\]]*\] = dot_general", str(jax.make_jaxpr(run.apply)(params, TOKENS)))
    assert len(products) == 14  # 8 kernels, 4 sides of paths, and scores and values of attention
    assert products.count("bf16") == 13  # all but the scores
    learner = learners.maml(run, optax.sgd(0.1), 2, adapts="lora|ia3")
    outer = metajax.outer_update(
        learner, optax.adam(1e-2), hypergrad=hypergrad.mixed_mode(), trainable="lora|ia3", task_batching="vmap"
    )
    before = jax.eval_shape(lambda: outer.init(jax.random.key(0), episode, params=params))
    after, _ = jax.eval_shape(outer.update, before, worlds.stack([episode, episode]))
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert (old.shape, old.dtype, old.weak_type) == (new.shape, new.dtype, new.weak_type)


def test_a_layer_that_knows_nothing_of_adapters_gets_the_sum():
    base = models.mlp(outputs=3, hidden=(5,))
    model = adapters.lora(base, rank=2, where=None)
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
    params = scattered(model.init(jax.random.key(0), inputs))
    plain = adapters.merge(model, params)
    np.testing.assert_allclose(model.apply(params, inputs), base.apply(plain, inputs), rtol=1e-5)
    assert np.abs(base.apply(plain, inputs) - base.apply(params_of_base(params), inputs)).max() > 0.1


def test_two_paths_of_one_kernel():
    model = adapters.lora(adapters.lora(BASE, rank=3, name="slow"), rank=2, alpha=8.0, name="fast")
    params = scattered(init(model))
    group = params["blocks"]["query"]
    assert {name: leaf.shape[-1] for name, leaf in group.items() if name.endswith("_a")} == {"slow_a": 3, "fast_a": 2}
    expected = group["kernel"] + group["slow_a"] @ group["slow_b"] + 4.0 * group["fast_a"] @ group["fast_b"]
    np.testing.assert_allclose(adapters.merge(model, params)["blocks"]["query"]["kernel"], expected, atol=1e-6)


CONV = metajax.Model(lambda key, inputs: {"conv": {"kernel": jnp.zeros([3, 3, 4, 4])}}, lambda params, inputs: inputs)
WHOLE = metajax.Model(
    lambda key, inputs: {"fc": {"kernel": jnp.zeros([4, 4], jnp.int8)}}, lambda params, inputs: inputs
)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: adapters.lora(BASE, rank=0), "rank must be an integer of at least 1, got 0"),
        (
            lambda: adapters.lora(BASE, rank=17),
            r"rank must be at most 16 for blocks/query/kernel \(2, 16, 16\), got 17",
        ),
        (lambda: adapters.lora(BASE, rank=9, where="value"), "rank must be at most 8 for blocks/value/kernel"),
        (lambda: adapters.lora(BASE, alpha=0.0), "alpha must be a finite number above 0, got 0.0"),
        (
            lambda: adapters.lora(BASE, where="conv"),
            "where must pick at least one leaf, got 'conv'; paths: blocks/down",
        ),
        (lambda: adapters.lora(BASE, where="scale"), "where must pick at least one leaf, got 'scale'"),
        (lambda: adapters.lora(BASE, where="("), r"where must be a regular expression, got '\('"),
        (
            lambda: adapters.lora(CONV, where="conv"),
            r"\[in, out\].*'conv', which picks conv/kernel float32 \(3, 3, 4, 4\)",
        ),
        (lambda: adapters.ia3(WHOLE, where="fc"), r"floating-point kernels .* fc/kernel int8 \(4, 4\)"),
        (lambda: adapters.lora(metajax.Model(lambda key, inputs: {"w": inputs}, None)), "leaves called kernel, got w"),
        (lambda: adapters.lora(BASE.apply), "model must be of type Model"),
        (lambda: adapters.lora(adapters.lora(BASE)), "model must have no adapter called 'lora' yet, got one with lora"),
        (
            lambda: adapters.ia3(adapters.lora(adapters.ia3(BASE))),
            "no adapter called 'ia3' yet, got one with lora, ia3",
        ),
    ],
)
def test_bad_arguments(build, text):
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(build().init, jax.random.key(0), TOKENS)


def test_parameters_without_the_leaves_are_refused():
    params = base_params()
    for model, name in ((adapters.lora(BASE), "lora"), (adapters.ia3(BASE), "ia3")):
        with pytest.raises(ValueError, match=f"params must hold the leaves of the adapter '{name}', got none"):
            model.apply(params, TOKENS)
