"""The Vision Transformer against NumPy; how its blocks are computed, adapters, learners, types, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds
from parity import numpy_reference as reference

import metajax
from metajax import adapters, learners, models

SIZES = {"patch": 4, "width": 12, "depth": 2, "heads": 3}
MODEL = models.vit(worlds.WAYS, **SIZES)
IMAGES = np.random.default_rng(1).normal(size=(3, 8, 12, 2))  # 2 by 3 patches


def scattered(params, size=0.3):
    """Parameters with no zero and no unit scale."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + size * rng.normal(size=leaf.shape), leaf.dtype), params)


@functools.cache
def init():
    """Parameters of `MODEL` for the images of `worlds`."""
    return jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros([1, 8, 8, 1]))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("outputs", "pooling"), [(5, "cls"), (None, "mean")])
def test_is_the_numpy_network(outputs, pooling):
    model = models.vit(outputs, **SIZES, hidden=20, norm_epsilon=1e-3, pooling=pooling)
    params = jax.jit(model.init)(jax.random.key(0), IMAGES)
    params = scattered(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params))
    expected = reference.vit(jax.tree.map(np.asarray, params), IMAGES, patch=4, heads=3, epsilon=1e-3, pooling=pooling)
    found = jax.jit(model.apply)(params, IMAGES)
    assert found.shape == (3, outputs or 12)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)  # JAX's softmax of attention is in float32


@pytest.mark.slow
def test_recomputed_blocks_have_the_same_gradient():
    params, images = scattered(init()), worlds.examples(0, 3, 0, images=True, dtype=jnp.float32).inputs
    slopes, programs = [], []
    for remat in (True, False):
        model = models.vit(worlds.WAYS, **SIZES, remat=remat)
        slope = jax.jit(jax.grad(lambda params, model=model: jnp.sum(jnp.square(model.apply(params, images)))))
        programs.append(str(jax.make_jaxpr(slope)(params)))
        slopes.append(slope(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *slopes)
    assert ["remat" in program for program in programs] == [True, False]


def test_the_program_does_not_grow_with_depth():
    texts = []
    for depth in (2, 8):
        model = models.vit(**{**SIZES, "depth": depth})
        params = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
        texts.append(jax.jit(model.apply).lower(params, IMAGES).as_text())
    assert abs(len(texts[1]) - len(texts[0])) < 0.02 * len(texts[0])


def test_the_published_sizes():
    """ViT-S/16 and ViT-B/16 without a head: the counts of Touvron et al. 2021 less 1000 (width + 1) of the head."""
    photo = jnp.zeros([1, 224, 224, 3])
    for options, count in (({}, 22_050_664), ({"width": 768, "heads": 12}, 86_567_656)):
        model = models.vit(**options)
        params = jax.eval_shape(model.init, jax.random.key(0), photo)
        assert adapters.count(params) == count - 1000 * (options.get("width", 384) + 1)


def test_types():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1)).astype(np.uint8)
    model = models.vit(**SIZES, dtype=jnp.bfloat16)
    params = jax.jit(model.init)(jax.random.key(0), pixels)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    program = str(jax.make_jaxpr(model.apply)(params, pixels))
    assert "bf16[2,5,12]" in program  # the stream: float32 images do not widen it
    features = jax.jit(model.apply)(params, pixels)
    assert features.dtype == jnp.float32
    wide = jax.jit(models.vit(**SIZES).apply)(
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), jnp.asarray(pixels, jnp.float32) / 255
    )
    np.testing.assert_allclose(features, wide, atol=0.1)


@pytest.mark.slow
def test_tasks_adapt_beside_one_base():
    """The inner loop of MAML on adapters, tasks under vmap: each moves its leaves of the adapters alone."""
    model = adapters.ia3(adapters.lora(MODEL, rank=2, where="(query|value|embed)"))
    learner = learners.maml(model, optax.sgd(0.5), 2, adapts="lora|ia3")
    tasks = [worlds.examples(seed, 6, 2, images=True, dtype=jnp.float32) for seed in range(2)]
    params = scattered(adapters.attach(model, init(), key=jax.random.key(1)), 0.1)
    adapt = jax.jit(jax.vmap(learner.adapt, in_axes=(None, 0)))
    together = adapt(params, worlds.stack(tasks)).params
    swapped = adapt(params, worlds.stack(tasks[::-1])).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[::-1], b, rtol=1e-4, atol=1e-5), swapped, together)
    assert not np.allclose(together["embed"]["lora_b"][0], together["embed"]["lora_b"][1], atol=1e-3)
    moved = {path for path, distance in worlds.distances(together, params).items() if distance}
    low_rank = {f"{layer}/lora_{side}" for layer in ("embed", "blocks/query", "blocks/value") for side in "ab"}
    assert moved == low_rank | {f"blocks/{layer}/ia3" for layer in ("key", "value", "up")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", worlds.few_by_default(["maml", "prototypical"], lambda kind: kind != "maml"))
def test_a_learner_trains_every_leaf(kind):
    still = {"blocks/key/bias"}  # no softmax sees it
    if kind == "maml":
        learner, params = learners.maml(MODEL, optax.sgd(0.1), 1), init()
    else:
        learner = learners.prototypical(models.vit(**SIZES, pooling="mean"))
        params = {name: group for name, group in init().items() if name != "head"}
        still |= {"norm/bias"}  # no distance sees it
    episode = worlds.episode(worlds.Row(learner, images=True), dtype=jnp.float32)
    outer = metajax.outer_update(learner, optax.sgd(0.1), hypergrad=metajax.hypergrad.unrolled(), before=False)
    state = outer.init(jax.random.key(0), episode, params=params)
    after, metrics = jax.jit(outer.update)(state, worlds.stack([episode, episode]))
    assert np.isfinite(metrics["loss"])
    assert {path for path, moved in worlds.distances(after.params, params).items() if not moved > 1e-6} == still


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outputs": 0}, "outputs must be an integer of at least 1, got 0"),
        ({"patch": 0}, "patch must be an integer of at least 1, got 0"),
        ({"hidden": 0}, "hidden must be an integer of at least 1, got 0"),
        ({"width": 100}, "heads must divide width, 100, got 6"),
        ({"norm_epsilon": 0.0}, "norm_epsilon must be a finite number above 0, got 0.0"),
        ({"pooling": "max"}, "pooling must be one of 'cls', 'mean', got 'max'"),
        ({"dtype": jnp.int32}, "dtype must be a floating-point type"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        models.vit(**options)


def test_refusals_when_the_images_are_seen():
    for shape in ([1, 8, 10, 1], [1, 0, 8, 1]):
        with pytest.raises(ValueError, match=r"patch must divide the height and the width of the images, .* got 4"):
            MODEL.init(jax.random.key(0), jnp.ones(shape))
    with pytest.raises(ValueError, match=r"inputs must be images \[n, height, width, channels\], got .* \(8,\)"):
        MODEL.init(jax.random.key(0), jnp.ones([2, 8]))
    params = MODEL.init(jax.random.key(0), jnp.ones([1, 8, 8, 1]))
    with pytest.raises(ValueError, match=r"images of 4 patches, for which .* got 6 patches of 4 by 4 .* \(8, 12, 1\)"):
        MODEL.apply(params, jnp.ones([1, 8, 12, 1]))
