"""A frozen base beside the state gives what the same base in the state gives, wherever a state goes."""

import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import states
import worlds
from jax.sharding import PartitionSpec as P

import metajax
from metajax import data, hypergrad, models, parallel, replay, training
from metajax.core import merge, split

_MODEL = metajax.models.mlp(outputs=worlds.WAYS, hidden=(8,))
_WHERE = "head"  # trained; the rest is the base
_KEY = jax.random.key(2)


def _learner(model=_MODEL, **options):
    return metajax.learners.maml(model, optax.sgd(0.1), 2, adapts=_WHERE, **options)


def _outer(model=_MODEL, **options):
    estimator = options.pop("hypergrad", hypergrad.mixed_mode())
    learner = options.pop("learner", None) or _learner(model)
    return metajax.outer_update(learner, optax.adam(1e-2), hypergrad=estimator, trainable=_WHERE, **options)


def _episodes(tasks=4, start=0):
    row = worlds.LEARNERS["maml_support_statistics"]  # of images
    return worlds.stack([worlds.episode(row, seed, dtype=np.float32) for seed in range(start, start + tasks)])


def _one(episodes):
    return jax.tree.map(lambda leaf: leaf[0], episodes)


def _params(model=_MODEL):
    return model.init(jax.random.key(1), _one(_episodes()).support.inputs)


def _begin(outer, **options):
    """The state with all in it, and that without the base, and the base."""
    params = _params()
    trained, frozen = split(params, _WHERE)
    inside = outer.init(_KEY, _one(_episodes()), params, **options)
    return inside, outer.init(_KEY, _one(_episodes()), trained, frozen=frozen, **options), frozen


def _assert_same(inside, outside, frozen, rtol=1e-5):
    """The base is in no place of the state beside it, and all else is the same."""
    assert not set(_paths(outside.params)) & set(_paths(frozen))
    tree = merge(outside.params, frozen)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), tree, inside.params)
    opt = zip(*(jax.tree.leaves(state.opt_state) for state in (inside, outside)), strict=True)
    for a, b in opt:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
    assert int(inside.step) == int(outside.step)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), split(tree, _WHERE)[0], split(_params(), _WHERE)[0])
    assert all(distance > 1e-3 for distance in jax.tree.leaves(moved)), "training moves what is trained"


def _paths(tree):
    return [worlds.path_name(path) for path, _ in jax.tree.leaves_with_path(tree)]


_BRIGHTER = data.random_affine(shift=0.2)


def _replayed(outer):
    def losses(params, items):
        """Of each task; the base must be among the parameters."""
        return jax.vmap(lambda one: metajax.core.outer_objective(_learner(), params, one)[0])(items)

    return replay.replayed(outer, replay.prioritised(8), 2, priority=losses)


WRAPPERS = {
    "plain": lambda outer: outer,
    "scan": lambda outer: _outer(task_batching="scan"),
    "in chunks": lambda outer: _outer(task_batching=2),
    "averaged": training.averaged,
    "skip_nonfinite": training.skip_nonfinite,
    "augment": lambda outer: training.augment(outer, _BRIGHTER),
    "replayed": lambda outer: replay.replayed(outer, replay.reservoir(8), 2),
    "all of them": lambda outer: training.augment(
        training.skip_nonfinite(replay.replayed(training.averaged(outer), replay.reservoir(8), 2)), _BRIGHTER
    ),
}


@pytest.mark.parametrize("name", worlds.few_by_default(WRAPPERS, lambda name: name in ("plain", "all of them")))
def test_fit(name):
    outer = WRAPPERS[name](_outer())
    inside, outside, frozen = _begin(outer)
    metrics = {"inside": [], "outside": []}
    batches = [_episodes(start=4 * number) for number in range(3)]
    record = lambda which: [lambda step, state, found: metrics[which].append(found)]  # noqa: E731
    inside = training.fit(outer, inside, batches, steps=3, callbacks=record("inside"))
    outside = training.fit(outer, outside, batches, steps=3, frozen=frozen, callbacks=record("outside"))
    if name in ("averaged", "all of them"):
        average = training.averaged_params(outside)
        assert not set(_paths(average)) & set(_paths(frozen))
        whole = training.averaged_params(inside)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), merge(average, frozen), whole)
        inside, outside = (state._replace(opt_state=state.opt_state.inner) for state in (inside, outside))
    _assert_same(inside, outside, frozen)
    for one, other in zip(metrics["inside"], metrics["outside"], strict=True):
        assert sorted(one) == sorted(other)
        for metric in one:
            np.testing.assert_allclose(one[metric], other[metric], rtol=1e-4, atol=1e-6, err_msg=metric)
    assert all(leaf.is_deleted() is False for leaf in jax.tree.leaves(frozen)), "it is never donated"


@pytest.mark.slow
def test_priorities_of_replayed_tasks_see_the_base():
    pytest.importorskip("flashbax")
    outer = _replayed(_outer())
    inside, outside, frozen = _begin(outer)
    batches = [_episodes(start=4 * number) for number in range(3)]
    inside = training.fit(outer, inside, batches, steps=3)
    outside = training.fit(outer, outside, batches, steps=3, frozen=frozen)
    _assert_same(inside, outside, frozen)
    memories = zip(*(jax.tree.leaves(state.hypergrad_state) for state in (inside, outside)), strict=True)
    assert all(np.allclose(a, b, rtol=1e-4) for a, b in memories)


@pytest.mark.slow
def test_fit_on_device():
    outer = _outer()
    inside, outside, frozen = _begin(outer)
    pool = _episodes(6)
    sample = lambda pool, key: jax.tree.map(lambda leaf: leaf[jax.random.randint(key, (), 0, 6)], pool)  # noqa: E731
    run = functools.partial(training.fit_on_device, outer, data=pool, sample=sample, batch=4, steps=5, chunk=2)
    inside, outside = run(inside), run(outside, frozen=frozen)
    _assert_same(inside, outside, frozen)


@pytest.mark.slow
def test_the_two_halves_of_a_meta_step():
    outer = _outer()
    inside, outside, frozen = _begin(outer)
    whole, _ = outer.update(outside, _episodes(), frozen)
    total, per_task = jax.jit(outer.partial_sums)(outside, _episodes(), frozen)
    by_halves, _ = jax.jit(outer.apply_updates)(outside, total, per_task, frozen)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), by_halves.params, whole.params)
    _assert_same(outer.update(inside, _episodes())[0], by_halves, frozen)


_MESHES = {
    "tasks": ({"task": 4}, ()),
    "parameters": ({"task": 1, "fsdp": 4}, [("layer_0/kernel", P("fsdp")), ("head/kernel", P("fsdp"))]),
    "both and the model": (
        {"task": 2, "fsdp": 2, "model": 2}, [("layer_0/kernel", P("fsdp", "model")), ("head/kernel", P("fsdp"))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", worlds.few_by_default(_MESHES, lambda name: name == "parameters"))
def test_shard(name, caplog):
    sizes, rules = _MESHES[name]
    mesh = parallel.make_mesh(**sizes, devices=jax.devices()[: np.prod(list(sizes.values()))])
    inside, _, frozen = _begin(_outer())
    outer = parallel.shard(_outer(), mesh, rules)
    _, outside, _ = _begin(outer)
    placed = parallel.put(frozen, parallel.frozen_shardings(frozen, mesh, rules))
    if "fsdp" in sizes:
        shards = placed["layer_0"]["kernel"].addressable_shards
        assert shards[0].data.shape[0] == frozen["layer_0"]["kernel"].shape[0] // sizes["fsdp"]
    batches = [_episodes(start=4 * number) for number in range(3)]
    inside = training.fit(_outer(), inside, batches, steps=3)
    update = jax.jit(outer.update)
    with jax.log_compiles():
        for batch in batches:
            outside, _ = update(outside, batch, placed)
    assert sum("Compiling jit(update)" in line for line in caplog.messages) == 1
    _assert_same(inside, outside, frozen)


@pytest.mark.parametrize("name", worlds.few_by_default(["truncation", "evolution"], lambda name: name == "truncation"))
def test_estimators_that_keep_a_state(name):
    estimator = {
        "truncation": hypergrad.persistent_truncation(1),
        "evolution": hypergrad.persistent_evolution(sigma=1e-2, pairs=2, steps=1),
    }[name]
    outer = _outer(hypergrad=estimator)
    inside, outside, frozen = _begin(outer, num_tasks=4)
    for number in range(3):
        inside, _ = outer.update(inside, _episodes(start=4 * number))
        outside, _ = outer.update(outside, _episodes(start=4 * number), frozen)
    _assert_same(inside, outside, frozen)


@pytest.mark.slow
def test_curriculum_and_a_network_that_grows():
    large = metajax.models.mlp(outputs=worlds.WAYS, hidden=(12,))
    outer = _outer()
    inside, outside, frozen = _begin(outer)
    inside, outside = outer.update(inside, _episodes())[0], outer.update(outside, _episodes(), frozen)[0]
    grown = _outer(large)
    widen = models.widen(inside.params, 12)
    one = _one(_episodes())
    wide_inside = models.grow_state(inside, widen, grown, one)
    wide_outside = models.grow_state(outside, widen, grown, one, frozen=frozen)
    wide_frozen = models.grow_frozen(outside, widen, frozen)
    wide_inside = grown.update(wide_inside, _episodes(start=4))[0]
    wide_outside = grown.update(wide_outside, _episodes(start=4), wide_frozen)[0]
    tree = merge(wide_outside.params, wide_frozen)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), tree, wide_inside.params)
    source, spec = data.sinusoids(), data.EpisodeSpec(1, 4, 4)
    learner = metajax.learners.maml(metajax.models.mlp(1), optax.sgd(0.1), adapts="head", task=metajax.tasks.regression)
    outer = metajax.outer_update(learner, optax.adam(1e-2), hypergrad=hypergrad.first_order(), trainable="head")
    one = data.episode(source, spec, seed=0, index=0)
    params = learner.init(jax.random.key(0), one.support.inputs)
    trained, frozen = split(params, "head")
    stages = [training.Stage(spec, 2), training.Stage(data.EpisodeSpec(1, 6, 4), 2)]
    ended = [
        training.curriculum(outer, outer.init(_KEY, one, begun, frozen=base), source, stages, batch=2, frozen=base)[0]
        for begun, base in ((params, None), (trained, frozen))
    ]
    tree = merge(ended[1].params, frozen)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), tree, ended[0].params)


def test_validation_scores_both_together(tmp_path):
    outer = _outer()
    _, outside, frozen = _begin(outer)
    seen = []

    def score(params):
        seen.append(_paths(params))
        return {"validation_accuracy": 0.5}

    checkpoints = training.Checkpoints(tmp_path / "checkpoints", base=training.params_sha256(frozen))
    recorder = training.Recorder(None, every=1)
    validation = training.Validation(
        score, recorder, every=1, checkpoints=checkpoints, better=("validation_accuracy", 1), frozen=frozen
    )
    training.fit(outer, outside, [_episodes()], steps=1, frozen=frozen, callbacks=[recorder, validation])
    assert seen == [_paths(_params())]
    checkpoints.close()


def test_a_checkpoint_holds_no_base_and_goes_on_with_no_other(tmp_path):
    outer = _outer()
    _, state, frozen = _begin(outer)
    base = training.params_sha256(frozen)
    checkpoints = training.Checkpoints(tmp_path, base=base)
    state, _ = outer.update(state, _episodes(), frozen)
    checkpoints.save(1, state, {"seconds": 1.0})
    restored, _ = checkpoints.restore(state)
    states.assert_same(restored, state)
    checkpoints.close()
    told = json.loads((tmp_path / "last" / "1" / "seal.json").read_text())
    assert told["base"] == base
    other = jax.tree.map(lambda leaf: leaf + 1, frozen)
    for wrong in (training.params_sha256(other), None):
        again = training.Checkpoints(tmp_path, base=wrong)
        with pytest.raises(ValueError, match=f"base must be that of the checkpoint in .*, {base}; "):
            again.restore(state)
        again.close()
        with pytest.raises(ValueError, match="base must be that of the checkpoint"):
            training.warm_start(tmp_path, state.params, base=wrong)
    again = training.Checkpoints(tmp_path, base=base)
    states.assert_same(again.restore(state)[0], state)
    again.close()
    taken = training.warm_start(tmp_path, jax.tree.map(jnp.zeros_like, state.params), base=base)
    jax.tree.map(np.testing.assert_array_equal, taken, state.params)


def test_a_checkpoint_without_a_base_is_restored_over_none(tmp_path):
    outer = _outer()
    _, state, frozen = _begin(outer)
    checkpoints = training.Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    checkpoints.close()
    again = training.Checkpoints(tmp_path, base=training.params_sha256(frozen))
    with pytest.raises(ValueError, match=r"base must be None for the checkpoint in .*, which stands on none, got"):
        again.restore(state)
    again.close()
    with pytest.raises(ValueError, match=r"base must be a hash such as params_sha256\(frozen\), or None, got dict"):
        training.Checkpoints(tmp_path, base=frozen)


def test_a_checkpoint_has_the_size_of_what_is_trained(tmp_path):
    """At most 1.05 times the trained parameters and the optimizer's state, and 32 kB."""
    model = metajax.adapters.lora(metajax.models.decoder(512, width=64, depth=6, heads=4), rank=4)
    learner = metajax.learners.maml(model, optax.sgd(0.1), 1, adapts="lora", task=metajax.tasks.next_token_prediction)
    outer = metajax.outer_update(learner, optax.adam(1e-3), hypergrad=hypergrad.first_order(), trainable="lora")
    tokens = jnp.zeros([2, 8], jnp.int32)
    examples = metajax.Examples(tokens, tokens, jnp.ones(2, bool))
    trained, frozen = split(model.init(jax.random.key(0), tokens), "lora")
    state = outer.init(jax.random.key(0), metajax.Episode(examples, examples), trained, frozen=frozen)
    checkpoints = training.Checkpoints(tmp_path, base=training.params_sha256(frozen))
    checkpoints.save(1, state, {"position": 0, "seconds": 1.0})
    checkpoints.close()
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    there = sum(os.path.getsize(path) for path in (tmp_path / "last" / "1").rglob("*") if path.is_file())
    assert there <= 1.05 * size((state.params, state.opt_state)) + 32_000
    assert there < size(frozen) / 2


WRONG = {
    "another structure": (
        lambda trained, frozen: {**frozen, "layer_1": None}, "frozen must have the structure of the meta-parameters"
    ),
    "a leaf in both": (
        lambda trained, frozen: _params(), "frozen must have None where the meta-parameters have a leaf, got 'head/"
    ),
    "no base": (lambda trained, frozen: None, "frozen must have a leaf where the state has none, got none for layer_0"),
    "a part of it": (
        lambda trained, frozen: {**frozen, "layer_0": {"kernel": frozen["layer_0"]["kernel"], "bias": None}},
        "frozen must have a leaf where the state has none, got none for layer_0/bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_base_that_does_not_fit_is_refused(name):
    wrong, message = WRONG[name]
    outer = _outer()
    _, state, frozen = _begin(outer)
    with pytest.raises(ValueError, match=message):
        training.fit(outer, state, [_episodes()], steps=1, frozen=wrong(state.params, frozen))
    assert not state.step.is_deleted(), "nothing is donated where nothing runs"


def test_a_base_of_another_shape_is_refused():
    outer = _outer()
    _, state, frozen = _begin(outer)
    wrong = jax.tree.map(lambda leaf: leaf[..., :5], frozen)
    with pytest.raises((TypeError, ValueError)):
        training.fit(outer, state, [_episodes()], steps=1, frozen=wrong)


def test_the_learner_makes_no_leaf_that_the_base_has():
    outer = _outer()
    _, state, frozen = _begin(outer)
    made = outer.init(_KEY, _one(_episodes()), frozen=frozen)
    assert jax.tree.structure(made) == jax.tree.structure(state)
    assert not set(_paths(made.params)) & set(_paths(frozen))
