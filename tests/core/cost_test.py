"""Operations and bytes, counted by hand."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from metajax.core import _cost
from metajax.parallel import make_mesh


def test_operations_are_counted_in_loops_branches_and_calls():
    matrix = jnp.ones([8, 8])
    product = 2 * 8**3
    assert _cost.flops(jax.jit(lambda x: x @ x), matrix) == product
    assert _cost.flops(jax.checkpoint(lambda x: x @ x), matrix) == product
    assert _cost.flops(lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: x), matrix) >= product
    image = jnp.ones([2, 8, 8, 3])
    dims = ("NHWC", "HWIO", "NHWC")
    convolution = lambda x: jax.lax.conv_general_dilated(  # noqa: E731
        x, jnp.ones([3, 3, 3, 5]), (1, 1), "SAME", dimension_numbers=dims
    )
    flops = 2 * 2 * 8 * 8 * 5 * 3 * 3 * 3
    assert flops <= _cost.flops(convolution, image) <= flops + 3 * 3 * 3 * 5


def test_a_device_counts_its_own_part_of_a_region_by_hand():
    mesh = make_mesh(devices=jax.devices()[:4])
    one = PartitionSpec("task")
    split = jax.shard_map(lambda x, y: x @ y, mesh=mesh, in_specs=(one, PartitionSpec()), out_specs=one)
    product, whole = 2 * (8 // 4) * 3 * 16, 16 * 3  # what all devices share is marked as varying, one a number
    assert _cost.flops(split, jnp.ones([8, 16]), jnp.ones([16, 3])) in (product, product + whole)


def test_traffic_is_what_products_and_reductions_read_and_write():
    matrix = jnp.ones([8, 8], jnp.bfloat16)
    one = 2 * 8 * 8
    assert _cost.traffic(lambda x: jnp.tanh(x @ x) + 1, matrix) == 3 * one
    assert _cost.traffic(lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=5)[0], matrix) == 15 * one
    assert _cost.traffic(lambda x: jnp.sum(x.astype(jnp.float32), axis=0), matrix) == 4 * (64 + 8)
    assert _cost.traffic(lambda x: jnp.exp(x) * 2, matrix) == 0
