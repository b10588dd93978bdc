"""What is restored: every bit, on any devices, in whole or in part, and never what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import states
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from metajax import training
from metajax.training import _checkpoint


def test_what_is_restored_is_what_was_saved_bit_for_bit(checkpoints):
    checkpoints.save(3, states.full(3), {"seconds": 1.5, "position": [1, None]})
    restored, extra = checkpoints.restore(states.full(0))
    states.assert_same(restored, states.full(3))
    assert extra == {"seconds": 1.5, "position": [1, None]}
    assert checkpoints.damaged == []
    np.testing.assert_array_equal(jax.random.normal(restored.key), jax.random.normal(states.full(3).key))


def test_a_key_of_another_generator_stays_one(checkpoints):
    state = states.small(1)._replace(key=jax.random.key(5, impl="rbg"))
    checkpoints.save(1, state, {})
    like = jax.eval_shape(lambda: state)
    states.assert_same(checkpoints.restore(like)[0], state)
    with pytest.raises(ValueError, match=r"key is uint32\[4\] in the checkpoint, uint32\[2\] here"):
        checkpoints.restore(states.small(1))


def _on(mesh_shape, spec, devices):
    names = ("task", "model")[: len(mesh_shape)]
    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(mesh_shape), names)
    return lambda leaf: NamedSharding(mesh, spec if leaf.ndim and leaf.shape[0] == 8 else PartitionSpec())


_PLACES = {
    "four": _on((4,), PartitionSpec("task"), 4),
    "two": _on((2,), PartitionSpec("task"), 2),
    "a mesh of two axes": _on((2, 4), PartitionSpec(("model", "task")), 8),
    "one": lambda leaf: SingleDeviceSharding(jax.devices()[3]),
}


@pytest.mark.parametrize(("before", "after"), [("four", after) for after in _PLACES] + [("one", "four")])
@pytest.mark.parametrize("abstract", [False, True])
def test_a_checkpoint_is_restored_on_other_devices(checkpoints, before, after, abstract):
    put = lambda state, place: jax.tree.map(lambda leaf: jax.device_put(leaf, _PLACES[place](leaf)), state)  # noqa: E731
    checkpoints.save(5, put(states.full(5), before), {})
    like = put(states.full(0), after)
    if abstract:
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like)
    restored, _ = checkpoints.restore(like)
    states.assert_same(restored, states.full(5))
    for leaf, given in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert leaf.sharding.is_equivalent_to(given.sharding, leaf.ndim)


def test_a_structure_without_places_goes_to_the_first_device(checkpoints):
    checkpoints.save(5, states.full(5), {})
    restored, _ = checkpoints.restore(jax.eval_shape(lambda: states.full(0)))
    states.assert_same(restored, states.full(5))
    assert {device for leaf in jax.tree.leaves(restored) for device in leaf.devices()} == {jax.devices()[0]}


def test_another_architecture_is_refused_with_the_leaves(checkpoints):
    checkpoints.save(1, states.full(1), {})
    with pytest.raises(ValueError, match="like must fit the checkpoint") as raised:
        checkpoints.restore(states.full(1, width=6))
    assert "params/body/conv_0/kernel is float32[8,4] in the checkpoint, float32[8,6] here" in str(raised.value)
    other = states.full(1)
    other.params["head"][1] = other.params["head"][1].astype(jnp.bfloat16)
    with pytest.raises(ValueError, match=r"params/head/1 is float32\[8\] in the checkpoint, bfloat16\[8\] here"):
        checkpoints.restore(other)
    other = states.full(1)
    other.params["tail"] = other.params.pop("head")
    with pytest.raises(ValueError, match="params/tail/0 is not in the checkpoint") as raised:
        checkpoints.restore(other)
    assert "params/head/1 is only in the checkpoint" in str(raised.value)
    with pytest.raises(ValueError, match="hypergrad_state/mean is only in the checkpoint"):
        checkpoints.restore(states.full(1)._replace(hypergrad_state=()))
    many = states.full(1)._replace(params={f"layer_{number}": jnp.ones(2) for number in range(20)})
    with pytest.raises(ValueError, match=r"and \d+ more$"):
        checkpoints.restore(many)


def test_meta_parameters_alone_are_numpy_arrays_in_their_containers(tmp_path):
    checkpoints = training.Checkpoints(tmp_path)
    checkpoints.save(4, states.full(4), {}, kind="best")
    checkpoints.close()
    params, step = _checkpoint.restore_params(tmp_path, kind="best")
    assert step == 4
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))
    states.assert_same(params, states.full(4).params)
    with pytest.raises(ValueError, match=r"there is no checkpoint in .*last"):
        _checkpoint.restore_params(tmp_path)


def test_warm_start_takes_what_is_picked(tmp_path):
    checkpoints = training.Checkpoints(tmp_path)
    checkpoints.save(1, states.full(1), {})
    checkpoints.close()
    given = {"body": {"conv_0": {"kernel": jnp.zeros((8, 4))}}, "head": [jnp.zeros(3)], "new": jnp.ones(2)}
    found = training.warm_start(tmp_path, given, where="^body/")
    states.assert_same(found["body"], states.full(1).params["body"])
    assert found["head"][0] is given["head"][0]
    assert found["new"] is given["new"]
    found = training.warm_start(tmp_path, given, where=lambda path: path.endswith("kernel"))
    states.assert_same(found["body"], states.full(1).params["body"])
    states.assert_same(training.warm_start(tmp_path, states.full(0).params), states.full(1).params)
    split = _PLACES["four"](given["body"]["conv_0"]["kernel"])
    given["body"]["conv_0"]["kernel"] = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=split)
    assert training.warm_start(tmp_path, given, where="body")["body"]["conv_0"]["kernel"].sharding == split
    given["body"]["conv_0"]["kernel"] = np.zeros((8, 4), np.float32)
    assert type(training.warm_start(tmp_path, given, where="body")["body"]["conv_0"]["kernel"]) is np.ndarray
    with pytest.raises(ValueError, match=r"params must fit the checkpoint .*: params/new is not in the checkpoint"):
        training.warm_start(tmp_path, given)
    with pytest.raises(ValueError, match=r"params/head/0 is bfloat16\[8\] in the checkpoint, float32\[3\] here"):
        training.warm_start(tmp_path, given, where="head")
    with pytest.raises(ValueError, match="where must pick at least one leaf, got 'tail'"):
        training.warm_start(tmp_path, given, where="tail")
