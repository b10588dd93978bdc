"""Selection by path, split and merge."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, PartitionSpec

from metajax.core import _tree

TREE = {"body": [{"kernel": 1, "bias": 2}, {"kernel": 3}], "head": {"kernel": 4}}


def test_paths():
    assert _tree.paths(TREE) == ["body/0/bias", "body/0/kernel", "body/1/kernel", "head/kernel"]


@pytest.mark.parametrize(
    ("where", "picked"),
    [
        ("head", [4]), ("kernel$", [1, 3, 4]), ("^body/0", [2, 1]), ("body.*kernel", [1, 3]), (None, [2, 1, 3, 4]),
        (lambda path: path.count("/") == 2, [2, 1, 3]),
    ],
)  # fmt: skip
def test_split_picks_and_merge_undoes(where, picked):
    chosen, rest = _tree.split(TREE, where)
    assert jax.tree.leaves(chosen) == picked
    assert sorted(jax.tree.leaves(chosen) + jax.tree.leaves(rest)) == [1, 2, 3, 4]
    assert _tree.fill(chosen, rest) == TREE
    assert _tree.fill(rest, chosen) == TREE
    assert _tree.fill(TREE, None) is TREE


def test_nothing_picked_names_the_argument_and_the_paths():
    message = r"adapts must pick at least one leaf, got 'tail'; paths: body/0/bias, .*head/kernel"
    with pytest.raises(ValueError, match=message):
        _tree.split(TREE, "tail", name="adapts")


def test_no_regular_expression():
    with pytest.raises(ValueError, match=r"trainable must be a regular expression, got '\('"):
        _tree.split(TREE, "(", name="trainable")


def test_vary_marks_what_is_shared_and_leaves_the_rest():
    mesh = Mesh(jax.devices()[:2], ("task",))
    seen = {}

    def body(shared, own):
        seen["before"] = _tree.varying_axes(shared), _tree.varying_axes(own), _tree.varying_axes((shared, own))
        both = _tree.vary((shared, own), ["task"])
        seen["after"] = _tree.varying_axes(both[0]), _tree.varying_axes(both[1])
        return both

    specs = PartitionSpec(), PartitionSpec("task")
    jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=(specs[1], specs[1]))(jnp.zeros(3), jnp.arange(4.0))
    assert seen == {"before": ([], ["task"], ["task"]), "after": (["task"], ["task"])}
