"""What no gradient trains: averages and collected values are the same however the tasks are run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

import metajax
from metajax import hypergrad, parallel

_KEPT = [True, True, False, True, True, True, False, True]  # tasks that count
_LARGE = 2**24 + 1  # an integer that float32 does not hold


def _learner(update_state=None):
    """Keeps a mean of the inputs, a queue of one key a task, and a number of updates."""
    base = metajax.learners.maml(metajax.models.mlp(worlds.WAYS, hidden=(6,)), optax.sgd(0.1), 1)

    def init(key, inputs):
        return {
            "model": base.init(key, inputs), "mean": jnp.zeros([4]), "queue": jnp.zeros([12, 4]),
            "updates": jnp.array(_LARGE, jnp.int32),
        }  # fmt: skip

    def outer_loss(adapted, meta_params, query, *, key=None):
        loss, aux = base.outer_loss(adapted, meta_params["model"], query, key=key)
        kept = query.mask.astype(jnp.float32)
        mean = (query.inputs * kept[:, None]).sum(axis=0) / jnp.maximum(kept.sum(), 1)
        unit = mean / jnp.maximum(jnp.linalg.norm(mean), 1e-9)
        state = {"mean": mean, "updates": meta_params["updates"] + 2}
        return loss, aux._replace(state=state, collected={"key": unit})

    def write(meta_params, averaged, collected):
        kept = collected.values["key"][jnp.argsort(~collected.counts, stable=True)]  # padding last
        number = collected.counts.sum()
        both = jnp.concatenate([jnp.where(jnp.arange(len(kept))[:, None] < number, kept, 0), meta_params["queue"]])
        queue = jnp.take(both, (jnp.arange(12) + (jnp.arange(12) >= number) * (len(kept) - number)), axis=0)
        return {**meta_params, **averaged, "queue": queue}

    return metajax.Learner(
        init, lambda meta_params, support, **rest: base.adapt(meta_params["model"], support, **rest), base.predict,
        outer_loss, update_state=write if update_state is None else update_state,
    )  # fmt: skip


def _episodes():
    row = worlds.LEARNERS["maml"]
    tasks = [worlds.episode(row, seed, dtype=np.float32) for seed in range(len(_KEPT))]
    empty = lambda part: worlds.with_nan(part._replace(mask=jnp.zeros_like(part.mask)), jnp.ones(len(part.mask), bool))  # noqa: E731
    return worlds.stack(
        [task if kept else metajax.Episode(*map(empty, task)) for task, kept in zip(tasks, _KEPT, strict=True)]
    )


def _outer(**options):
    return metajax.outer_update(
        _learner(), optax.sgd(0.1), hypergrad=hypergrad.unrolled(), trainable="^model/", **options
    )


def _run(outer, steps=2):
    episodes = _episodes()
    state = outer.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], episodes))
    update = jax.jit(outer.update)
    for _ in range(steps):
        state, metrics = update(state, episodes)
    return state.params, metrics


@functools.cache
def _by_hand():
    """The mean of the inputs and the keys, task by task, in NumPy."""
    query = _episodes().query
    means = [
        np.asarray(x)[np.asarray(m)].mean(axis=0)
        for x, m, kept in zip(query.inputs, query.mask, _KEPT, strict=True)
        if kept
    ]
    return np.mean(means, axis=0), [mean / np.linalg.norm(mean) for mean in means]


WAYS = {
    "vmap": lambda: _outer(task_batching="vmap"),
    "scan": lambda: _outer(task_batching="scan"),
    "chunks": lambda: _outer(task_batching=2),
    **{
        f"{count} devices": lambda count=count: parallel.shard(
            _outer(), parallel.make_mesh(task=count, devices=jax.devices()[:count])
        )
        for count in (1, 2, 4)
    },
    "parameters over devices": lambda: parallel.shard(
        _outer(), parallel.make_mesh(task=2, fsdp=2, devices=jax.devices()[:4]), parallel.largest_axis(2, at_least=8)
    ),
}


@pytest.mark.parametrize("way", worlds.few_by_default(WAYS, lambda way: way in ("chunks", "2 devices")))
def test_all_ways_write_the_same(way):
    params, metrics = _run(WAYS[way]())
    mean, keys = _by_hand()
    np.testing.assert_allclose(params["mean"], mean, rtol=1e-5)
    assert params["updates"].dtype == jnp.int32
    assert int(params["updates"]) == _LARGE + 4
    queue = np.asarray(params["queue"])
    np.testing.assert_allclose(queue[: len(keys)], keys, rtol=1e-5, err_msg="in the order of the tasks")
    np.testing.assert_allclose(queue[len(keys) :], keys, rtol=1e-5, err_msg="those of the step before behind them")
    np.testing.assert_allclose(np.linalg.norm(queue, axis=1), 1, rtol=1e-5)
    expected, expected_metrics = _run(_outer(task_batching="vmap"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, expected)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-5)


def test_where_no_task_counts_nothing_is_written():
    outer, episodes = _outer(), _episodes()
    empty = jax.tree.map(lambda leaf: leaf[jnp.array([2, 6])], episodes)
    state = outer.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], episodes))
    after, _ = jax.jit(outer.update)(state, empty)
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


def test_pmap_writes_the_same():
    outer, episodes = _outer(axis_name="tasks"), _episodes()
    state = outer.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], episodes))
    divided = jax.tree.map(lambda leaf: leaf.reshape(4, 2, *leaf.shape[1:]), episodes)
    update = jax.pmap(outer.update, axis_name="tasks", in_axes=(None, 0), out_axes=None)
    params = update(state, divided)[0].params
    expected = _run(_outer(), steps=1)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, expected)


def _state_of(**values):
    """A meta step whose learner gives such an `Aux`, and writes what it is told to."""
    base = _learner()

    def outer_loss(adapted, meta_params, query, *, key=None):
        loss, aux = base.outer_loss(adapted, meta_params, query, key=key)
        return loss, aux._replace(**values["aux"](query) if "aux" in values else {})

    learner = base._replace(outer_loss=outer_loss, **{k: v for k, v in values.items() if k == "update_state"})
    return metajax.outer_update(learner, optax.sgd(0.1), hypergrad=hypergrad.unrolled(), trainable="^model/")


WRONG = {
    "no function writes it": (
        {"update_state": None}, "learner.update_state must be given where outer_loss gives Aux.state or Aux.collected"
    ),
    "another structure": (
        {"update_state": lambda params, averaged, collected: averaged},
        "update_state must return meta-parameters of the structure that it gets",
    ),
    "another shape": (
        {"update_state": lambda params, averaged, collected: {**params, "mean": jnp.zeros(3)}},
        r"update_state must not change mean, which has shape \(4,\), got \(3,\)",
    ),
    "integers that differ": (
        {"aux": lambda query: {"state": {"mean": jnp.zeros(4), "updates": jnp.int32(100 * query.inputs[0, 0])}}},
        "integers of Aux.state must be the same in all tasks",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name):
    values, message = WRONG[name]
    outer, episodes = _state_of(**values), _episodes()
    state = outer.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], episodes))
    known = name == "integers that differ"  # values, which tracing does not see
    with pytest.raises(ValueError, match=message):
        outer.update(state, episodes) if known else jax.eval_shape(outer.update, state, episodes)
