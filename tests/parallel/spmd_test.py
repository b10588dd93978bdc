"""The meta step on meshes of simulated devices: agreement over 20 steps, and what it communicates."""

import functools

import jax
import numpy as np
import optax
import pytest
import worlds
from jax.sharding import PartitionSpec as P

import metajax
from metajax import parallel

_TENSOR = [("layer_0/kernel", P("fsdp", "model")), ("layer_0/bias", P("model"))]


def _outer(num_steps=2, **options):
    learner = metajax.learners.maml(metajax.models.mlp(outputs=2, hidden=(8,)), optax.sgd(0.1), num_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2))
    return metajax.outer_update(learner, optimizer, hypergrad=metajax.hypergrad.mixed_mode(), **options)


def _episodes(tasks, size=4, dtype=np.float64):
    rng = np.random.default_rng(0)

    def examples(size):
        return metajax.Examples(
            rng.normal(size=(tasks, size, 4)).astype(dtype), np.tile(np.arange(size) % 2, (tasks, 1)),
            np.ones((tasks, size), bool),
        )  # fmt: skip

    return metajax.Episode(examples(4), examples(size))


def _one(episodes):
    return jax.tree.map(lambda leaf: leaf[0], episodes)


def _run(outer, episodes, steps=20):
    params = jax.tree.map(lambda leaf: leaf.astype(np.float64), _outer().init(jax.random.key(0), _one(episodes)).params)
    state, update = outer.init(jax.random.key(0), _one(episodes), params=params), jax.jit(outer.update)
    for _ in range(steps):
        state, metrics = update(state, episodes)
    return state, metrics


@functools.cache
def _on_one_device():
    return _run(_outer(), _episodes(8))


_MESHES = [
    ((2, 1, 1), ()),
    ((8, 1, 1), ()),
    ((2, 4, 1), parallel.largest_axis(4, at_least=8)),
    ((1, 8, 1), parallel.largest_axis(8, at_least=8)),
    ((1, 1, 4), _TENSOR),
    ((2, 2, 2), _TENSOR),
]


# the default run divides the tasks alone, and all three; the others are special cases of these
@pytest.mark.parametrize(
    ("sizes", "rules"), worlds.few_by_default(_MESHES, lambda sizes, _: sizes in ((8, 1, 1), (2, 2, 2)))
)
def test_every_mesh_gives_what_one_device_gives(sizes, rules, x64):
    episodes = _episodes(8)
    expected, known = _on_one_device()
    mesh = parallel.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    state, metrics = _run(parallel.shard(_outer(), mesh, rules), episodes)
    assert worlds.relative_distance(state.params, expected.params) < 1e-9
    for name in known:
        np.testing.assert_allclose(metrics[name], known[name], rtol=1e-8, err_msg=name)


@pytest.mark.parametrize(
    "learner", worlds.few_by_default(["prototypical", "maml_support_statistics"], lambda name: name == "prototypical")
)
def test_convolutions_of_tasks_under_vmap_on_each_device(learner):
    """Two tasks on each of two devices: the gradient of a kernel is not summed over devices before its time."""
    model = metajax.models.conv4(4, width=4, depth=2, normalisation="support")
    learner = (
        metajax.learners.prototypical(model) if learner == "prototypical"
        else metajax.learners.maml(model, optax.sgd(0.3), 2)
    )  # fmt: skip
    outer = metajax.outer_update(
        learner, optax.sgd(0.1), hypergrad=metajax.hypergrad.mixed_mode(), task_batching="vmap"
    )
    row = worlds.LEARNERS["maml_support_statistics"]
    episodes = worlds.stack([worlds.episode(row, seed, dtype=np.float32) for seed in range(4)])
    mesh = parallel.make_mesh(2, 1, 1, devices=jax.devices()[:2])
    found = []
    for step in (outer, parallel.shard(outer, mesh)):
        state = step.init(jax.random.key(0), _one(episodes))
        found.append(jax.jit(step.update)(state, episodes)[0].params)
    assert worlds.relative_distance(*found) < 1e-5


def test_parameters_and_moments_lie_where_the_rules_say_and_stay_there():
    episodes, mesh = _episodes(8, dtype=np.float32), parallel.make_mesh(2, 2, 2)
    outer = parallel.shard(_outer(), mesh, _TENSOR)
    state = outer.init(jax.random.key(0), _one(episodes))
    traced = []

    def counted(state, episodes):
        traced.append(1)
        return outer.update(state, episodes)

    update = jax.jit(counted, donate_argnums=0)
    for _ in range(2):
        kernels = [state.params["layer_0"]["kernel"], state.opt_state[1][0].mu["layer_0"]["kernel"]]
        assert [kernel.sharding.spec for kernel in kernels] == [P("fsdp", "model")] * 2
        assert {shard.data.shape for shard in kernels[0].addressable_shards} == {(2, 4)}
        state, _ = update(state, episodes)
    assert len(traced) == 1


def test_given_parameters_are_an_argument_and_may_lie_on_one_device():
    episodes, mesh = _episodes(4, dtype=np.float32), parallel.make_mesh(1, 4, devices=jax.devices()[:4])
    outer = parallel.shard(_outer(), mesh, [("layer_0/kernel", P("fsdp"))])
    given = jax.device_put(_outer().init(jax.random.key(1), _one(episodes)).params, jax.devices()[5])
    state = outer.init(jax.random.key(0), _one(episodes), params=given)
    assert state.params["layer_0"]["kernel"].sharding.spec == P("fsdp")
    jax.tree.map(np.testing.assert_array_equal, state.params, given)


def _bytes(sizes, rules=(), *, num_steps=2, each=1, size=4):
    mesh = parallel.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    episodes = _episodes(each * parallel.num_groups(mesh), size, np.float32)
    outer = parallel.shard(_outer(num_steps), mesh, rules)
    state = outer.init(jax.random.key(0), _one(episodes))
    placed = jax.device_put(episodes, parallel.task_sharding(mesh))
    return parallel.collective_bytes(jax.jit(outer.update).lower(state, placed).compile().as_text())


def test_a_data_parallel_step_reduces_the_hypergradient_and_nothing_that_grows():
    params = 4 * (4 * 8 + 8 + 8 * 2 + 2)
    found = _bytes((8, 1, 1))
    assert set(found) == {"all-reduce"}
    assert params <= found["all-reduce"] <= params + 64  # and the metrics, a few scalars
    assert _bytes((2, 1, 1), each=3, size=12) == found  # other devices, tasks and examples
    longer = _bytes((8, 1, 1), num_steps=5)["all-reduce"]
    assert longer - found["all-reduce"] == 8 * 3  # for each inner step its loss, and in how many tasks it counts


def test_what_is_divided_is_gathered_once_and_scattered_once():
    found = _bytes((1, 8, 1), [("layer_0/kernel", P(None, "fsdp"))])
    assert found["all-gather"] == 4 * 4 * 8
    assert "all-to-all" not in found
    assert found == _bytes((1, 8, 1), [("layer_0/kernel", P(None, "fsdp"))], each=2, size=8)


@pytest.mark.slow  # tests/training/outer_test.py weighs tasks that are padding, with devices and without
def test_padded_tasks_weigh_nothing(x64):
    episodes = _episodes(6)
    mesh = parallel.make_mesh(4, devices=jax.devices()[:4])
    outer = parallel.shard(_outer(), mesh)
    with pytest.raises(ValueError, match="a multiple of 4 groups of devices, got 6"):
        _run(outer, episodes, 1)
    expected, known = _run(_outer(), episodes, 3)
    state, metrics = _run(outer, parallel.pad_tasks(episodes, parallel.num_groups(mesh)), 3)
    assert worlds.relative_distance(state.params, expected.params) < 1e-9
    np.testing.assert_allclose(metrics["loss"], known["loss"], rtol=1e-9)


def test_only_a_bare_meta_step_can_be_sharded():
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    for outer in (_outer(axis_name="task"), metajax.training.augment(_outer())):
        with pytest.raises(ValueError, match="outer must come from outer_update, without axis_name"):
            parallel.shard(outer, mesh)


def test_a_frozen_base_is_divided_and_gets_no_gradient():
    episodes, mesh = _episodes(4, dtype=np.float32), parallel.make_mesh(1, 4, devices=jax.devices()[:4])
    outer = parallel.shard(_outer(trainable="layer_1|head"), mesh, [("layer_0/kernel", P("fsdp"))])
    state = outer.init(jax.random.key(0), _one(episodes))
    before = np.asarray(state.params["layer_0"]["kernel"])
    placed = jax.device_put(episodes, parallel.task_sharding(mesh))
    compiled = jax.jit(outer.update).lower(state, placed).compile()
    found = parallel.collective_bytes(compiled.as_text())
    assert found["all-gather"] == 4 * 4 * 8
    assert found["all-reduce"] <= 4 * (8 * 2 + 2) + 64
    after = compiled(state, placed)[0]
    np.testing.assert_array_equal(after.params["layer_0"]["kernel"], before)
