"""Meshes and rules: what they give, and what is refused."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from metajax import parallel
from metajax.parallel import _rules


def test_the_free_axis_takes_what_is_left():
    mesh = parallel.make_mesh(task=-1, fsdp=2, model=2, devices=jax.devices()[:8])
    assert dict(mesh.shape) == {"task": 2, "fsdp": 2, "model": 2}
    assert parallel.num_groups(mesh) == 4


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ((3, 1, 1), "mesh must divide the 8 devices into its axes, got task=3, fsdp=1, model=1"),
        ((-1, 3, 1), "mesh must divide the 8 devices into its axes, got task=-1, fsdp=3, model=1"),
        ((-1, -1, 1), "mesh must leave at most one axis at -1, got task=-1, fsdp=-1, model=1"),
        ((0, 1, 1), "mesh.task must be an integer of at least 1, got 0"),
    ],
)
def test_meshes_that_are_refused(sizes, text):
    with pytest.raises(ValueError, match=text):
        parallel.make_mesh(*sizes, devices=jax.devices()[:8])


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ([("nothing", P("fsdp"))], "rules must each match a parameter, got 'nothing'; paths: bias, kernel"),
        ([("[", P("fsdp"))], r"rules must be regular expressions, got '\['"),
        ([("kernel", P(None, "fsdp"))], r"rules must divide kernel evenly, got shape \(4, 3\) .*: 3 over 2"),
        ([("bias", P(None, "model"))], r"rules give bias of shape \(3,\) the spec .* more dimensions"),
        ([("kernel", P("task"))], "rules must divide kernel along 'fsdp' or 'model', got 'task'"),
    ],
)
def test_rules_that_are_refused(rules, text):
    mesh = parallel.make_mesh(2, 2, 2, devices=jax.devices()[:8])
    with pytest.raises(ValueError, match=text):
        parallel.partition_specs({"kernel": jnp.ones([4, 3]), "bias": jnp.ones(3)}, mesh, rules)


def test_the_first_rule_that_matches_counts_and_moments_follow_their_parameter():
    mesh = parallel.make_mesh(2, 2, 2, devices=jax.devices()[:8])
    params = {"a": {"kernel": jnp.ones([4, 2])}, "b": {"kernel": jnp.ones([4, 2])}}
    specs = parallel.partition_specs(params, mesh, [("a/", P("model")), ("kernel", P("fsdp"))])
    assert specs == {"a": {"kernel": P("model")}, "b": {"kernel": P("fsdp")}}
    state = optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(params)
    adam = _rules.like_params(state, params, specs)[1][0]
    assert adam.mu == specs
    assert adam.count == P()


def test_bytes_of_asynchronous_collectives_count_once():
    text = """
      %g = (f32[4]{0}, f32[16]{0}) all-gather-start(%a), channel_id=1
      %d = f32[16]{0} all-gather-done(%g)
      %r = bf16[8,2]{1,0} reduce-scatter(%b), channel_id=2
      %s = pred[] all-reduce(%c), channel_id=3
    """
    assert parallel.collective_bytes(text) == {"all-gather": 64, "reduce-scatter": 32, "all-reduce": 1}
