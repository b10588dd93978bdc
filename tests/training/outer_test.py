"""The meta step: ways to batch tasks, devices, weights, what is trained, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds
from jax.sharding import Mesh, PartitionSpec

import metajax
from metajax import hypergrad, learners, models

_STEPS, _TASKS = 20, 8
_LEARNERS = {
    "maml": learners.maml(models.mlp(3, hidden=(5,)), optax.sgd(0.1), 2),
    "prototypical": learners.prototypical(models.mlp(4, hidden=(5,))),
}


def _episodes(tasks=_TASKS, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)

    def examples(each):
        targets = np.tile(np.repeat(np.arange(3), each), (tasks, 1))
        inputs = rng.normal(size=(tasks, 3 * each, 4)) + targets[..., None]
        return metajax.Examples(
            inputs.astype(dtype), targets.astype(np.int32), np.ones(targets.shape, bool), np.ones((tasks, 3), bool)
        )

    return jax.tree.map(jnp.asarray, metajax.Episode(examples(1), examples(2)))


def _task(episodes, index=0):
    return jax.tree.map(lambda leaf: leaf[index], episodes)


def _make(learner="maml", estimator=None, **options):
    estimator = estimator or hypergrad.mixed_mode()
    return metajax.outer_update(_LEARNERS[learner], optax.adam(1e-2), hypergrad=estimator, **options)


def _start(outer, dtype=jnp.float64):
    state = jax.jit(outer.init)(jax.random.key(0), _task(_episodes()))
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), state.params)
    return outer.init(jax.random.key(0), _task(_episodes()), params=params)


def _run(update, state, steps=_STEPS, dtype=np.float64):
    for step in range(steps):
        state, metrics = update(state, _episodes(seed=step, dtype=dtype))
    return state, metrics


def _distance(tree, other):
    difference = jax.tree.map(lambda a, b: a - b, tree, other)
    return float(optax.tree.norm(difference) / optax.tree.norm(other))


def _over_devices(outer, count=4):
    mesh = Mesh(np.array(jax.devices()[:count]), ("task",))
    same, split = PartitionSpec(), PartitionSpec("task")
    return jax.shard_map(outer.update, mesh=mesh, in_specs=(same, split), out_specs=(same, same))


# what is batched does not depend on the learner: the default run holds the one with an inner loop
@pytest.fixture(params=worlds.few_by_default(_LEARNERS, lambda name: name == "maml"))
def reference(request, x64):
    outer = _make(request.param, task_batching="vmap")
    return request.param, *_run(jax.jit(outer.update), _start(outer))


def test_all_ways_to_run_tasks_agree_in_float64(reference):
    name, expected, known = reference

    def over_devices(batching, count):
        return _over_devices(_make(name, task_batching=batching, axis_name="task", before=count == 8), count)

    updates = {batching: _make(name, task_batching=batching, before=False).update for batching in ("scan", 4)}
    updates |= {"8 devices": over_devices("auto", 8), "2 devices, chunks": over_devices(2, 2)}
    start = _start(_make(name))
    for label, update in updates.items():
        state, metrics = _run(jax.jit(update), start)
        assert _distance(state.params, expected.params) < 1e-9, label
        for metric in metrics:
            np.testing.assert_allclose(metrics[metric], known[metric], rtol=1e-8, err_msg=label)


@pytest.mark.slow  # the map over devices of old programs, compiled for 8 devices; shard_map is compared above
def test_pmap_agrees_in_float64(reference):
    name, expected, _ = reference
    outer = _make(name, axis_name="task", before=False)
    update = jax.pmap(outer.update, axis_name="task", in_axes=(None, 0), out_axes=None)

    def spread(state, episodes):
        return update(state, jax.tree.map(lambda leaf: leaf.reshape(8, -1, *leaf.shape[1:]), episodes))

    assert _distance(_run(spread, _start(outer))[0].params, expected.params) < 1e-9


@pytest.mark.slow  # what the agreement in float64 says of 20 steps
def test_first_gradients_agree_in_float32():
    found = {}
    for batching in ("vmap", "scan", 2):
        outer = metajax.outer_update(
            _LEARNERS["maml"], optax.sgd(1.0), hypergrad=hypergrad.mixed_mode(), task_batching=batching,
            before=False,
        )  # fmt: skip
        start = _start(outer, jnp.float32)
        state, _ = _run(jax.jit(outer.update), start, 1, np.float32)
        found[batching] = jax.tree.map(lambda a, b: a - b, start.params, state.params)
    assert _distance(found["scan"], found["vmap"]) < 1e-5
    assert _distance(found[2], found["vmap"]) < 1e-5


def test_a_task_whose_query_is_padding_weighs_nothing(x64):
    episodes = _episodes()
    empty = episodes.query._replace(
        mask=episodes.query.mask.at[3:].set(False), inputs=episodes.query.inputs.at[3:].set(jnp.nan)
    )
    outer = _make()
    start = _start(outer)
    state, metrics = jax.jit(outer.update)(start, episodes._replace(query=empty))
    expected, known = jax.jit(outer.update)(start, jax.tree.map(lambda leaf: leaf[:3], episodes))
    assert _distance(state.params, expected.params) < 1e-12
    np.testing.assert_allclose(metrics["loss"], known["loss"], rtol=1e-12)
    nothing = episodes._replace(query=empty._replace(mask=jnp.zeros_like(empty.mask)))
    _, metrics = jax.jit(outer.update)(start, nothing)
    assert metrics["grad_norm"] == 0


def test_metrics_before_adaptation_are_those_of_the_start(x64):
    outer = _make()
    start = _start(outer)
    _, metrics = jax.jit(outer.update)(start, _episodes())
    learner = _LEARNERS["maml"]

    @functools.partial(jax.jit, static_argnums=1)
    def loss(episode, steps):
        adapted = learner.adapt(start.params, episode.support, num_steps=steps)
        return learner.outer_loss(adapted, start.params, episode.query)[0]

    for name, steps in (("loss_before", 0), ("loss", None)):
        expected = np.mean([loss(_task(_episodes(), index), steps) for index in range(_TASKS)])
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-10)
    assert metrics["inner_loss"].shape == (2,)
    assert "loss_before" not in jax.eval_shape(_make(before=False).update, start, _episodes())[1]


def test_what_is_not_trainable_is_shared_and_may_hold_integers(x64):
    network = models.mlp(3, hidden=(5,))

    def init(key, inputs):
        return {"network": network.init(key, inputs), "shift": jnp.arange(4)}

    model = metajax.Model(init, lambda params, inputs: network.apply(params["network"], inputs + params["shift"]))
    learner = learners.maml(model, optax.sgd(0.1), adapts="head")
    for estimator in (hypergrad.mixed_mode(), hypergrad.displacement()):
        outer = metajax.outer_update(learner, optax.adam(1e-2), hypergrad=estimator, trainable="head")
        start = outer.init(jax.random.key(0), _task(_episodes()))
        state, _ = jax.jit(outer.update)(start, _episodes())
        np.testing.assert_array_equal(state.params["shift"], start.params["shift"])
        np.testing.assert_array_equal(
            state.params["network"]["layer_0"]["kernel"], start.params["network"]["layer_0"]["kernel"]
        )
        assert np.any(state.params["network"]["head"]["kernel"] != start.params["network"]["head"]["kernel"])
        assert len(jax.tree.leaves(start.opt_state)) == 1 + 2 * 2  # a count, and two moments of kernel and bias


def test_new_values_of_untrained_meta_parameters_are_averaged_and_written():
    base = learners.prototypical(models.mlp(4))

    def outer_loss(adapted, meta_params, query, *, key=None):
        loss, aux = base.outer_loss(adapted, meta_params["model"], query, key=key)
        return loss, aux._replace(state={"mean": jnp.mean(query.inputs)})

    learner = metajax.Learner(
        lambda key, inputs: {"model": base.init(key, inputs), "mean": jnp.zeros([])},
        lambda meta_params, support, **rest: base.adapt(meta_params["model"], support, **rest),
        base.predict,
        outer_loss,
        update_state=lambda meta_params, averaged, collected: {**meta_params, **averaged},
    )
    outer = metajax.outer_update(learner, optax.sgd(0.1), hypergrad=hypergrad.unrolled(), trainable="model")
    episodes = _episodes(dtype=np.float32)
    state, metrics = jax.jit(outer.update)(outer.init(jax.random.key(0), _task(episodes)), episodes)
    np.testing.assert_allclose(state.params["mean"], np.mean(episodes.query.inputs), rtol=1e-5)
    assert "state" not in metrics


def test_it_composes_with_scan_donation_clipping_and_eval_shape():
    outer = metajax.outer_update(
        _LEARNERS["maml"],
        optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0)), 3),
        hypergrad=hypergrad.mixed_mode(),
    )
    episodes = _episodes(dtype=np.float32)
    shapes = jax.eval_shape(lambda key: outer.init(key, _task(episodes)), jax.random.key(0))
    start = outer.init(jax.random.key(0), _task(episodes))
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, shapes, start)
    assert all(jax.tree.leaves(same))
    before = jax.tree.map(np.asarray, start.params)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), episodes)
    state, metrics = jax.jit(lambda s, e: jax.lax.scan(outer.update, s, e), donate_argnums=0)(start, several)
    assert metrics["loss"].shape == (3,)
    moved = optax.tree.norm(jax.tree.map(lambda a, b: a - b, state.params, before))
    assert 0 < moved <= 3.01e-3
    bad = episodes._replace(query=episodes.query._replace(inputs=episodes.query.inputs * jnp.nan))
    held = jax.tree.map(np.asarray, state.params)
    after, _ = jax.jit(outer.update)(state, bad)
    jax.tree.map(np.testing.assert_array_equal, after.params, held)
    assert jax.tree.map(lambda leaf: leaf.dtype, after.params) == jax.tree.map(lambda leaf: leaf.dtype, before)


@pytest.mark.slow  # a mesh too; test_steps_and_keys counts the keys of tasks
def test_task_keys_are_those_of_the_global_task():
    noisy = metajax.Model(
        lambda key, inputs: jnp.zeros([4, 3]),
        lambda w, inputs, key: (inputs + jax.random.normal(key, inputs.shape)) @ w,
        ("key",),
    )
    learner = learners.maml(noisy, optax.sgd(0.1))
    episodes = _episodes(dtype=np.float32)
    results = []
    for batching in ("vmap", "scan"):
        outer = metajax.outer_update(learner, optax.sgd(0.1), hypergrad=hypergrad.unrolled(), task_batching=batching)
        results.append(jax.jit(outer.update)(outer.init(jax.random.key(0), _task(episodes)), episodes)[0].params)
    spread = metajax.parallel.shard(outer, metajax.parallel.make_mesh(devices=jax.devices()[:4]))
    start = spread.init(jax.random.key(0), _task(episodes))
    results.append(jax.jit(spread.update)(start, episodes)[0].params)
    np.testing.assert_allclose(results[0], results[1], atol=1e-6)
    np.testing.assert_allclose(results[0], results[2], atol=1e-6)


_SHARED_STARTS = {
    "everything adapts, the head is trained": (
        learners.maml(models.mlp(3, hidden=(5,)), optax.adam(0.05, eps_root=1e-8), 2), "head", hypergrad.mixed_mode()
    ),
    "ANIL, the body is trained": (
        learners.maml(models.mlp(3, hidden=(5,)), optax.sgd(0.1), 2, adapts="head"), "layer", hypergrad.unrolled()
    ),
    "displacement": (
        learners.reptile(models.mlp(3, hidden=(5,)), optax.adam(0.05, b1=0.0), 2), "head", hypergrad.displacement()
    ),
    "a head from zero": (learners.finetune(models.mlp(4, hidden=(5,)), optax.sgd(0.5), 3), None, hypergrad.unrolled()),
}  # fmt: skip


# the first is the longest to compile; the others are frozen, differentiated through, displaced, and zeros
@pytest.mark.parametrize("case", worlds.few_by_default(_SHARED_STARTS, lambda case: case.startswith("ANIL")))
@pytest.mark.slow
def test_what_starts_the_same_on_all_devices_adapts_on_each(case, x64):
    """Frozen parameters and zeros are shared by the devices; their inner gradients must not be summed over them."""
    learner, trainable, estimator = _SHARED_STARTS[case]
    options = {"hypergrad": estimator, "trainable": trainable, "task_batching": "scan", "before": False}
    outer = metajax.outer_update(learner, optax.sgd(0.5), **options)
    spread = metajax.outer_update(learner, optax.sgd(0.5), axis_name="task", **options)
    start = _start(outer)
    found, metrics = jax.jit(_over_devices(spread))(start, _episodes())
    expected, known = jax.jit(outer.update)(start, _episodes())
    assert _distance(expected.params, start.params) > 1e-4
    assert _distance(found.params, expected.params) < 1e-12
    np.testing.assert_allclose(metrics["loss"], known["loss"], rtol=1e-12)


def test_devices_without_a_task_that_counts(x64):
    """Tasks are weighed over all devices together, not on each."""
    episodes = _episodes()
    empty = episodes.query._replace(
        mask=episodes.query.mask.at[1:].set(False), inputs=episodes.query.inputs.at[1:].set(jnp.nan)
    )
    start = _start(_make())
    spread = jax.jit(_over_devices(_make(axis_name="task", before=False)))
    found, metrics = spread(start, episodes._replace(query=empty))
    expected, known = jax.jit(_make(before=False).update)(start, jax.tree.map(lambda leaf: leaf[:1], episodes))
    assert _distance(found.params, expected.params) < 1e-12
    np.testing.assert_allclose(metrics["accuracy"], known["accuracy"], rtol=1e-12)


@pytest.mark.slow  # a Conv4 twice over 20 steps
def test_batch_statistics_in_float32_drift_little():
    """A small Conv4: the loss after 20 steps within 1e-2 between one task at a time and all at once."""
    learner = learners.maml(models.conv4(3, width=4, depth=1), optax.sgd(0.1))
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(3), (4, 2))
    images = rng.normal(size=(4, 6, 8, 8, 1)) + labels[..., None, None, None]
    examples = metajax.Examples(jnp.array(images, jnp.float32), jnp.array(labels), jnp.ones([4, 6], bool))
    found = []
    for batching in ("scan", "vmap"):
        outer = metajax.outer_update(
            learner, optax.adam(1e-2), hypergrad=hypergrad.mixed_mode(), task_batching=batching, before=False
        )
        episodes = metajax.Episode(examples, examples)
        state, update = outer.init(jax.random.key(0), _task(episodes)), jax.jit(outer.update)
        for _ in range(_STEPS):
            state, metrics = update(state, episodes)
        found.append(float(metrics["loss"]))
    np.testing.assert_allclose(*found, rtol=1e-2)


def test_auto_is_one_of_the_fixed_choices():
    assert metajax.training.choose_task_batching("cpu", 28 * 28 * 80) == "scan"
    assert metajax.training.choose_task_batching("cpu", 30) == "vmap"
    assert metajax.training.choose_task_batching("tpu", 28 * 28 * 80) == "vmap"
    start, episodes = _start(_make(), jnp.float32), _episodes(dtype=np.float32)
    sizes = [
        len(str(jax.make_jaxpr(_make(task_batching=batching).update)(start, episodes)))
        for batching in ("auto", "vmap", "scan")
    ]
    assert sizes[0] == sizes[1] != sizes[2]


def test_given_parameters_are_copied_so_that_the_state_can_be_donated():
    outer = _make()
    params = _start(outer, jnp.float32).params
    state = outer.init(jax.random.key(0), _task(_episodes()), params=params)
    update = jax.jit(outer.update, donate_argnums=0)
    for step in range(2):
        state, _ = update(state, _episodes(seed=step, dtype=np.float32))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params))  # a donated array cannot be read


def test_new_values_are_not_written_where_no_task_counts():
    base = learners.prototypical(metajax.Model(lambda key, x: {"w": jnp.eye(4)}, lambda params, x: x @ params["w"]))

    def outer_loss(adapted, meta_params, query, *, key=None):
        loss, aux = base.outer_loss(adapted, meta_params, query, key=key)
        return loss, aux._replace(state={"mean": jnp.mean(query.inputs)})

    learner = base._replace(
        init=lambda key, inputs: {"w": jnp.eye(4), "mean": jnp.array(7.0)}, outer_loss=outer_loss,
        update_state=lambda meta_params, averaged, collected: {**meta_params, **averaged},
    )  # fmt: skip
    outer = metajax.outer_update(learner, optax.sgd(0.1), hypergrad=hypergrad.unrolled(), trainable="w")
    episodes = _episodes(dtype=np.float32)
    start, update = outer.init(jax.random.key(0), _task(episodes)), jax.jit(outer.update)
    nothing = episodes.query._replace(mask=jnp.zeros_like(episodes.query.mask))
    state, _ = update(start, episodes._replace(query=nothing))
    assert float(state.params["mean"]) == 7.0
    # and only tasks that count have a part in the mean
    half = episodes.query._replace(mask=episodes.query.mask.at[2:].set(False))
    state, _ = update(start, episodes._replace(query=half))
    np.testing.assert_allclose(state.params["mean"], np.mean(episodes.query.inputs[:2]), rtol=1e-5)


def test_steps_and_keys():
    """The key stays, the step counts, and every step and task derives a key of its own from both."""
    seen = []

    def apply(params, inputs, key):
        if key is not None:
            jax.debug.callback(lambda bits: seen.append(int(bits)), jax.random.bits(key))
        return inputs @ params

    learner = learners.maml(metajax.Model(lambda key, x: jnp.zeros([4, 3]), apply, ("key",)), optax.sgd(0.1))
    outer = metajax.outer_update(
        learner, optax.sgd(0.1), hypergrad=hypergrad.first_order(), task_batching="scan", before=False
    )
    episodes = _episodes(2, dtype=np.float32)
    state, update = outer.init(jax.random.key(3), _task(episodes)), jax.jit(outer.update)
    for step in (1, 2):
        state, _ = update(state, episodes)
        assert int(state.step) == step
    jax.effects_barrier()
    # 2 steps x 2 tasks x (one inner and one outer forward pass)
    assert len(set(seen)) == 8


@pytest.mark.parametrize("where", ["inner", "outer"])
def test_optimizers_that_ask_for_the_value_get_the_loss(where):
    asking = optax.polyak_sgd(max_learning_rate=0.1, eps=1e-8)  # else not finite at a zero gradient
    inner, optimizer = (asking, optax.sgd(0.1)) if where == "inner" else (optax.sgd(0.1), asking)
    learner = metajax.learners.maml(metajax.models.mlp(outputs=2, hidden=(3,)), inner)
    outer = metajax.outer_update(learner, optimizer, hypergrad=metajax.hypergrad.unrolled())
    examples = metajax.Examples(jnp.eye(4), jnp.array([0, 0, 1, 1]), jnp.ones(4, bool), jnp.ones(2, bool))
    episode = metajax.Episode(examples, examples)
    episodes = jax.tree.map(lambda leaf: leaf[None], episode)
    state = outer.init(jax.random.key(0), episode)
    losses, update = [], jax.jit(outer.update)
    for _ in range(3):
        state, metrics = update(state, episodes)
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[1] < losses[0]


def test_what_is_refused():
    episodes = _episodes(dtype=np.float32)
    with pytest.raises(ValueError, match="task_batching must be one of 'auto', 'vmap', 'scan', got 'pmap'"):
        _make(task_batching="pmap")
    with pytest.raises(ValueError, match="task_batching must be an integer of at least 1, got 0"):
        _make(task_batching=0)
    outer = _make(task_batching=3)
    with pytest.raises(ValueError, match="must divide the number of tasks 8, got a chunk size of 3"):
        outer.update(outer.init(jax.random.key(0), _task(episodes)), episodes)
    with pytest.raises(ValueError, match="trainable must pick at least one leaf, got 'tail'"):
        _make(trainable="tail").init(jax.random.key(0), _task(episodes))
    with pytest.raises(ValueError, match=r"trainable must be a regular expression, got '\['"):
        _make(trainable="[").init(jax.random.key(0), _task(episodes))
    outer = _make()
    start = outer.init(jax.random.key(0), _task(episodes))
    broken = episodes._replace(query=jax.tree.map(lambda leaf: leaf[:2], episodes.query))
    scalar = episodes._replace(query=episodes.query._replace(targets=jnp.array(1)))
    nothing = jax.tree.map(lambda leaf: leaf[:0], episodes)
    for wrong, sizes in ((broken, "2, 8"), (scalar, "8, None"), (nothing, "0")):
        with pytest.raises(ValueError, match=f"one leading task axis on every leaf, got leading sizes {sizes}"):
            outer.update(start, wrong)
