"""InfoNCE against NumPy, the queue, the average, what no gradient reaches, views, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

import metajax
from metajax import learners, models, training

FLAT = metajax.Model(lambda key, x: {"kernel": jnp.eye(3)}, lambda params, x: x.reshape(len(x), -1) @ params["kernel"])
AS_IS = {"view": lambda key, images: images, "dim": 4, "hidden": 5}
RNG = np.random.default_rng(0)
IMAGES = 100 * RNG.normal(size=(2, 1, 1, 3))  # long vectors: what keeps a length above 0 plays no part


def dense(layer, values):
    return values @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)


def head(params, values):
    return dense(params["head"], np.maximum(dense(params["layer_0"], values), 0))


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def vectors(params, images):
    return head(params["head"], images.reshape(len(images), -1) @ np.asarray(params["backbone"]["kernel"], np.float64))


def info_nce(logits, targets):
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return -np.mean(np.log(shifted[np.arange(len(targets)), targets] / shifted.sum(1)))


def started(learner, seed=0):
    """Parameters whose average is not the network of now."""
    params = learner.init(jax.random.key(seed), IMAGES)
    if "momentum" in params:
        params["momentum"] = jax.tree.map(lambda leaf: 0.7 * leaf + 0.05, params["momentum"])
    return params


def query_loss(learner, params, images=IMAGES):
    query = metajax.Examples(images, np.zeros(len(images), int), np.ones(len(images), bool))
    return learner.outer_loss(None, params, query)


def test_the_loss_of_two_orthogonal_images_worked_by_hand(x64):
    identity = {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}
    params = {"backbone": {"kernel": jnp.eye(3)}, "head": {"layer_0": identity, "head": identity}}
    images = np.eye(3)[:2].reshape(2, 1, 1, 3)
    plain = learners.contrastive(FLAT, temperature=0.5, **{**AS_IS, "dim": 3, "hidden": 3})
    # each view: its other view at a cosine of 1, two views of the other image at 0
    loss, aux = query_loss(plain, params, images)
    np.testing.assert_allclose(loss, np.log(np.exp(2) + 2) - 2, rtol=1e-7)
    assert float(aux.metrics["accuracy"]) == 1
    assert (aux.outputs, aux.state, aux.collected) == (None, (), ())
    queue = jnp.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0]])
    moco = learners.contrastive(FLAT, momentum=0.5, queue=2, temperature=0.5, **{**AS_IS, "dim": 3, "hidden": 3})
    loss, aux = query_loss(moco, {**params, "momentum": params, "queue": queue}, images)
    # the first query sees the queue at 0 and -1, the second at 0 and 0
    by_hand = (np.log(np.exp(2) + 1 + np.exp(-2)) - 2 + np.log(np.exp(2) + 2) - 2) / 2
    np.testing.assert_allclose(loss, by_hand, rtol=1e-7)


def test_a_queue_is_first_in_first_out_and_the_average_moves_by_its_share(x64):
    learner = learners.contrastive(FLAT, momentum=0.9, queue=6, temperature=0.3, **AS_IS)
    params = started(learner)
    loss, aux = query_loss(learner, params)
    now = {name: params[name] for name in ("backbone", "head")}
    average = jax.tree.map(lambda old, new: 0.9 * np.asarray(old) + 0.1 * np.asarray(new), params["momentum"], now)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), aux.state["momentum"], average)
    keys = unit(vectors(average, IMAGES))
    np.testing.assert_allclose(aux.collected["keys"], keys, rtol=1e-9)
    gathered = metajax.Collected(jax.tree.map(lambda leaf: leaf[None], aux.collected), jnp.ones(1, bool))
    new = learner.update_state(params, aux.state, gathered)
    np.testing.assert_array_equal(new["queue"][4:], aux.collected["keys"])
    np.testing.assert_array_equal(new["queue"][:4], params["queue"][2:])
    assert new["momentum"] is aux.state["momentum"]
    assert new["backbone"] is params["backbone"]
    queries = unit(vectors(now, IMAGES))
    right, others = np.sum(queries * keys, 1, keepdims=True), queries @ np.asarray(params["queue"]).T
    np.testing.assert_allclose(loss, info_nce(np.concatenate([right, others], 1) / 0.3, [0, 0]), rtol=1e-9)


def test_without_a_queue_the_batch_and_a_predictor_serve(x64):
    scaled = {**AS_IS, "view": lambda key, images: images * jax.random.uniform(key, images.shape)}
    learner = learners.contrastive(FLAT, momentum=0.5, temperature=0.3, **scaled)
    params = started(learner)
    loss, aux = query_loss(learner, params)
    one, other = (np.asarray(scaled["view"](key, IMAGES)) for key in jax.random.split(jax.random.key(0)))
    average = aux.state["momentum"]
    logits = [
        unit(head(params["predictor"], vectors(params, query))) @ unit(vectors(average, key)).T / 0.3
        for query, key in ((one, other), (other, one))
    ]
    np.testing.assert_allclose(loss, np.mean([info_nce(half, [0, 1]) for half in logits]), rtol=1e-7)


@pytest.mark.parametrize("queue", worlds.few_by_default([0, 4], lambda queue: queue == 4))
def test_no_gradient_reaches_keys_queue_or_average(x64, queue):
    """With a momentum of 0 the keys come from the parameters of now: only stopping keeps them constant."""
    learner = learners.contrastive(FLAT, momentum=0.0, queue=queue, temperature=0.3, **AS_IS)
    params = started(learner)
    gradient = jax.grad(lambda params: query_loss(learner, params)[0])(params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient.get("momentum"))), "the average"
    assert queue == 0 or not gradient["queue"].any()
    keys = unit(vectors(params, IMAGES))

    def with_constant_keys(kernel):
        moved = vectors({**params, "backbone": {"kernel": kernel}}, IMAGES)
        if queue:
            queries = unit(moved)
            right = np.sum(queries * keys, 1, keepdims=True)
            return info_nce(np.concatenate([right, queries @ np.asarray(params["queue"]).T], 1) / 0.3, [0, 0])
        return info_nce(unit(head(params["predictor"], moved)) @ keys.T / 0.3, [0, 1])

    kernel, step = np.asarray(params["backbone"]["kernel"]), 1e-6
    for place in [(0, 0), (1, 2)]:
        moved = np.zeros((3, 3))
        moved[place] = step
        difference = (with_constant_keys(kernel + moved) - with_constant_keys(kernel - moved)) / (2 * step)
        np.testing.assert_allclose(gradient["backbone"]["kernel"][place], difference, rtol=1e-5, atol=1e-9)


def test_the_update_is_pure_trains_only_the_network_and_is_compiled_once():
    model = models.conv4(width=8, depth=2, normalisation="group")
    outer = training.moco(model, optax.adam(1e-2), momentum=0.9, queue=8, dim=8, hidden=8)
    images = jnp.asarray(RNG.integers(0, 256, (4, 8, 8, 3)), jnp.uint8)
    first = outer.init(jax.random.key(0), images)
    update = jax.jit(outer.update)
    state, metrics = update(first, images)
    again, _ = update(first, images)
    jax.tree.map(np.testing.assert_array_equal, state.params, again.params)
    assert set(metrics) == {"loss", "accuracy", "grad_norm"}
    np.testing.assert_array_equal(state.params["queue"][:4], first.params["queue"][4:])
    # the average of the first step is of parameters that have not moved yet
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.params["momentum"], first.params["momentum"]
    )
    moments = state.opt_state[0].mu
    assert not jax.tree.leaves((moments["momentum"], moments["queue"]))
    update(state, images)
    assert update._cache_size() == 1
    assert training.encoder_params(state) is state.params["backbone"]


@pytest.mark.parametrize(
    "make", worlds.few_by_default([training.simclr, training.moco], lambda make: make is training.moco)
)
def test_what_is_learned_feeds_other_learners_and_classifies_by_itself(make):
    options = {} if make is training.simclr else {"queue": 4}
    model = models.conv4(width=8, depth=1, normalisation="layer")
    images = jnp.asarray(RNG.integers(0, 256, (4, 8, 8, 3)), jnp.uint8)
    outer = make(model, optax.sgd(0.1), **options)
    state = metajax.training.fit(outer, outer.init(jax.random.key(0), images), [images] * 2, steps=2)
    support = metajax.Examples(images[:2], jnp.array([0, 1]), jnp.ones(2, bool), jnp.ones(2, bool))
    metric = metajax.learners.prototypical(model, distance="cosine")
    expected = metric.predict(metric.adapt(training.encoder_params(state), support), images)
    itself = learners.contrastive(model)
    np.testing.assert_array_equal(itself.predict(itself.adapt(state.params, support), images), expected)


@pytest.mark.slow
def test_a_view_is_a_crop_of_the_image_by_hand():
    """The first images that get no other colours, against interpolation line by line."""
    key, images = jax.random.key(3), RNG.random((40, 6, 9, 3)).astype(np.float32)
    views = np.asarray(learners.random_view(key, images))
    draws = [jax.random.uniform(jax.random.fold_in(key, row), [10]) for row in range(40)]
    size, ratio, top, left, flip, jitter, grey, *_ = np.stack(draws).T
    plain = np.flatnonzero((jitter >= 0.8) & (grey >= 0.2))
    assert len(plain) > 2
    for index in plain:
        area, stretch = 0.2 + 0.8 * size[index], (4 / 3) ** (ratio[index] - 0.5)
        lines = []
        for side, part, place in ((6, np.sqrt(area) * stretch, top), (9, np.sqrt(area) / stretch, left)):
            part = min(part, 1)
            lines.append((np.arange(side) + 0.5) * part + place[index] * (1 - part) * side - 0.5)
        found = images[index]
        for axis, places in enumerate(lines):
            old = np.arange(found.shape[axis])
            found = np.apply_along_axis(lambda line, new, old: np.interp(new, old, line), axis, found, places, old)
        found = found[:, ::-1] if flip[index] < 0.5 else found
        np.testing.assert_allclose(views[index], found, atol=1e-5)


def test_views_keep_to_the_range_and_follow_the_key():
    images = RNG.integers(0, 256, (200, 8, 8, 3)).astype(np.uint8)
    views = np.asarray(learners.random_view(jax.random.key(0), images))
    assert views.min() >= 0
    assert views.max() <= 1
    np.testing.assert_array_equal(views, learners.random_view(jax.random.key(0), images))
    np.testing.assert_allclose(views, learners.random_view(jax.random.key(0), images / np.float32(255)), atol=1e-6)
    assert np.abs(views - learners.random_view(jax.random.key(1), images)).mean() > 0.1
    grey = np.ptp(views, axis=3).max((1, 2)) < 1e-6
    assert 0.1 < grey.mean() < 0.3
    assert learners.random_view(jax.random.key(0), images[..., :1]).shape == (200, 8, 8, 1)


@pytest.mark.parametrize(
    "options",
    worlds.few_by_default([{}, {"momentum": 0.9}, {"momentum": 0.9, "queue": 5}], lambda options: "queue" in options),
)
def test_padding_is_no_image(options, x64):
    """Neither its content nor its amount counts, and no key of it comes into the queue."""
    learner = learners.contrastive(FLAT, temperature=0.3, **options, **{**AS_IS, "view": jitter})
    params = started(learner)
    outer = metajax.outer_update(learner, optax.sgd(0.1), hypergrad=metajax.hypergrad.unrolled(), before=False)

    def step(images, mask):
        part = metajax.Examples(images, np.zeros(len(images), int), mask, np.ones(1, bool))
        episode = jax.tree.map(jnp.asarray, metajax.Episode(part, part))
        state = outer.init(jax.random.key(0), episode, params)
        return jax.jit(outer.update)(state, jax.tree.map(lambda leaf: leaf[None], episode))

    expected, known = step(IMAGES, np.ones(2, bool))
    for filling in (0.0, 7.0, np.nan):
        images = np.concatenate([IMAGES, np.full([3, 1, 1, 3], filling)])
        state, metrics = step(images, np.arange(5) < 2)
        for name in known:
            np.testing.assert_allclose(metrics[name], known[name], rtol=1e-12)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13), state.params, expected.params
        )


def jitter(key, images):
    """A view that draws for each image from a key of its own."""
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(images)))
    return images * jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:]))(keys)


@pytest.mark.slow
def test_keys_of_several_tasks_come_into_the_queue_in_order_and_are_of_unit_length():
    """Over tasks one after the other, side by side, in chunks, and over devices; a task of padding brings none."""
    learner = learners.contrastive(FLAT, momentum=0.9, queue=8, **AS_IS)
    images = RNG.normal(size=(4, 2, 1, 1, 3)).astype(np.float32)
    mask = np.ones((4, 2), bool)
    mask[1] = mask[2, 0] = False
    part = metajax.Examples(images, np.zeros((4, 2), int), mask, np.ones((4, 1), bool))
    episodes = jax.tree.map(jnp.asarray, metajax.Episode(part, part))
    one = jax.tree.map(lambda leaf: leaf[0], episodes)

    def make(batching, axis_name=None):
        return metajax.outer_update(
            learner, optax.sgd(0.0), hypergrad=metajax.hypergrad.unrolled(),
            task_batching=batching, before=False, axis_name=axis_name,
        )  # fmt: skip

    start = make("vmap").init(jax.random.key(0), one, started(learner))
    average = optax.incremental_update(
        {name: start.params[name] for name in ("backbone", "head")}, start.params["momentum"], 0.1
    )
    keys = [unit(vectors(average, images[task])) for task in range(4)]
    expected = np.concatenate([np.asarray(start.params["queue"])[5:], keys[0], keys[2][1:], keys[3]])
    mesh = metajax.parallel.make_mesh(devices=jax.devices()[:4])
    updates = {batching: make(batching).update for batching in ("vmap", "scan", 2)}
    updates["shard"] = metajax.parallel.shard(make("auto"), mesh).update
    updates["axis"] = jax.shard_map(
        make("auto", "task").update, mesh=jax.sharding.Mesh(np.array(jax.devices()[:2]), ("task",)),
        in_specs=(jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("task")),
        out_specs=jax.sharding.PartitionSpec(),
    )  # fmt: skip
    for name, update in updates.items():
        state, _ = jax.jit(update)(start, episodes)
        np.testing.assert_allclose(state.params["queue"], expected, atol=1e-6, err_msg=str(name))
        np.testing.assert_allclose(np.linalg.norm(state.params["queue"], axis=1), 1, atol=1e-5)


def test_bad_input_is_refused():
    group, batch = (models.conv4(width=8, depth=1, normalisation=policy) for policy in ("group", "batch"))
    learners.contrastive(batch)  # two views in one batch: nothing leaks
    for options, text in (
        ({"queue": 4}, "queue must be 0 without momentum, got 4"),
        ({"queue": -1}, "queue must be an integer of at least 0, got -1"),
        ({"momentum": 1.0}, "momentum must be a number of at least 0 and below 1, got 1.0"),
        ({"momentum": -0.1}, "momentum must be a number of at least 0 and below 1, got -0.1"),
        ({"temperature": 0}, "temperature must be a finite number above 0, got 0"),
        ({"dim": 0}, "dim must be an integer of at least 1, got 0"),
        ({"hidden": 0}, "hidden must be an integer of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=text):
            learners.contrastive(group, **options)
    with pytest.raises(ValueError, match="model must not normalise by statistics of the batch"):
        training.moco(batch, optax.sgd(0.1))
    with pytest.raises(ValueError, match="momentum must be a number"):
        training.moco(group, optax.sgd(0.1), momentum=None)
    with pytest.raises(ValueError, match="model must be of type Model, got 5"):
        training.simclr(5, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"images must be \[n, height, width, c\], got shape \(4, 8\)"):
        learners.random_view(jax.random.key(0), jnp.zeros([4, 8]))
