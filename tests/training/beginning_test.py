"""What a run takes of another one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metajax
from metajax import training

NETWORK = {"block": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "head": {"bias": jnp.ones(4)}}
FRESH = jax.tree.map(jnp.zeros_like, NETWORK)


@pytest.fixture
def run(tmp_path):
    def save(params, step=7):
        checkpoints = training.Checkpoints(tmp_path / "checkpoints")
        checkpoints.save(step, metajax.MetaState(params, (), (), jnp.array(step), jax.random.key(0)), {})
        checkpoints.close()
        return tmp_path

    return save


def test_a_head_that_fits_is_taken_and_one_that_does_not_stays(run):
    folder = run(NETWORK)
    found = training.begin_with(folder, FRESH)
    jax.tree.map(np.testing.assert_array_equal, found.params, NETWORK)
    assert (found.step, found.taken, found.new) == (7, ("block/kernel", "head/bias"), ())
    found = training.begin_with(folder, {**FRESH, "head": {"bias": jnp.zeros(9)}})
    assert found.params["head"]["bias"].shape == (9,)
    np.testing.assert_array_equal(found.params["block"]["kernel"], NETWORK["block"]["kernel"])
    assert str(found) == f"begins with 1 array of {folder} (step 7); new: head/bias"


def test_a_network_that_is_a_part_fits_one_that_is_not_both_ways(run):
    parts = {"backbone": {"block": NETWORK["block"]}, "head": {"kernel": jnp.ones(2)}}
    folder = run(parts)
    found = training.begin_with(folder, FRESH)
    np.testing.assert_array_equal(found.params["block"]["kernel"], NETWORK["block"]["kernel"])
    assert found.new == ("head/bias",)
    fresh = jax.tree.map(jnp.zeros_like, parts)
    found = training.begin_with(folder, fresh)
    np.testing.assert_array_equal(found.params["backbone"]["block"]["kernel"], NETWORK["block"]["kernel"])
    np.testing.assert_array_equal(found.params["head"]["kernel"], fresh["head"]["kernel"])
    assert found.new == ("head/kernel",), "what is beside the network is no part of it"


def test_numbers_take_the_type_of_here(run):
    found = training.begin_with(run(NETWORK), jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), FRESH))
    assert found.params["block"]["kernel"].dtype == jnp.bfloat16


def test_another_network_or_none_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        training.begin_with(tmp_path / "nothing", FRESH)
    folder = run(NETWORK)
    text = r"init must be a run of the same network, got .*: block/kernel is \(2, 3\) there, \(3, 3\) here"
    with pytest.raises(ValueError, match=text):
        training.begin_with(folder, {"block": {"kernel": jnp.zeros([3, 3])}})
    with pytest.raises(ValueError, match=r"other/kernel is not there, \(1,\) here"):
        training.begin_with(folder, {**FRESH, "other": {"kernel": jnp.zeros(1)}})
    with pytest.raises(ValueError, match="block/kernel is there, not here"):  # what was learned is not left out
        training.begin_with(folder, {"head": {"bias": jnp.zeros(4)}})
    with pytest.raises(ValueError, match="nothing fits"):
        training.begin_with(run({"head": {"bias": jnp.zeros(4)}}, step=8), {"head": {"bias": jnp.zeros(5)}})
