"""A 2-D convolution for the CPU that stays fast under repeated differentiation and inside loops.

A convolution of inputs x with a kernel k, summed against a cotangent g, is linear in each of the three. So the
convolution and its derivatives of every order are the three contractions of this trilinear form with two of its
arguments: the outputs (x, k), the gradient of the inputs (k, g) and the gradient of the kernel (x, g). Here these three
are one JAX primitive, and each one transposes into the others. JAX's own rules differentiate the kernel gradient as if
the outputs were a kernel over the padded inputs, which costs more by the ratio of the image size to the window size.

Two more problems come from XLA. It moves convolutions into the layout of its fast kernel only outside loops; here they
are written in that layout, with barriers so that no pass folds the transpositions back. Matrix products that sum over
many thousands of positions are slow; here the gradient of the kernel processes a few images at a time.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from metajax.core import _tree

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # of inputs, kernel, outputs

_INPUTS, _KERNEL, _OUTPUTS = range(3)
_LAYOUT = ("NHWC", "HWIO", "NHWC")  # the only layout that is fast inside a loop
_POSITIONS = 4096  # number of positions summed at a time; fastest between about 500 and 4,000


def convolution(inputs: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Computes the same as `metajax.models.convolution`; fast for float32."""
    height, width = (-(-size // stride) for size in inputs.shape[1:3])
    shapes = inputs.shape, kernel.shape, (inputs.shape[0], height, width, kernel.shape[-1])
    return _contract(_OUTPUTS, shapes, stride, {_INPUTS: inputs, _KERNEL: kernel})


def same_padding(size: int, window: int, stride: int) -> tuple[int, int]:
    """Returns the SAME padding before and after one dimension."""
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


def _contract(missing: int, shapes: Shapes, stride: int, given: dict[int, Any]) -> jax.Array:
    operands = [given[role] for role in _roles(missing)]
    operands = [_tree.vary(operand, _tree.varying_axes(operands)) for operand in operands]
    return _primitive.bind(*operands, missing=missing, shapes=shapes, stride=stride)


def _roles(missing: int) -> list[int]:
    return [role for role in range(3) if role != missing]


def _transpose(
    position: int, cotangent: Any, first: Any, second: Any, *, missing: int, shapes: Any, stride: int
) -> Any:
    """Transposes: contracts the cotangent, in place of the result, to give that of the operand at `position`."""
    roles, operands = _roles(missing), (first, second)
    given = {missing: cotangent, roles[1 - position]: operands[1 - position]}
    return _contract(roles[position], shapes, stride, given)


def _batch(operands: Any, axes: Any, *, missing: int, shapes: Shapes, stride: int) -> tuple[Any, int]:
    """Batches tasks: with a shared kernel, joins their examples; with separate kernels, uses matrix products."""
    given = dict(zip(_roles(missing), zip(operands, axes, strict=True), strict=True))
    if missing != _KERNEL and given[_KERNEL][1] is None:
        other = _INPUTS if missing == _OUTPUTS else _OUTPUTS
        examples = jnp.moveaxis(given[other][0], given[other][1], 0)
        tasks, number = examples.shape[:2]
        together: Any = [(tasks * number, *shape[1:]) for shape in shapes]
        together[_KERNEL] = shapes[_KERNEL]
        arguments = {_KERNEL: given[_KERNEL][0], other: examples.reshape(together[other])}
        return _contract(missing, tuple(together), stride, arguments).reshape(tasks, *shapes[missing]), 0
    one = functools.partial(_contract_patches, missing=missing, shapes=shapes, stride=stride)
    return jax.vmap(one, in_axes=tuple(axes))(*operands), 0


def _contract_patches(*operands: Any, missing: int, shapes: Shapes, stride: int) -> Any:
    if missing == _OUTPUTS:
        inputs, kernel = operands
        return by_patches(inputs, kernel, stride)
    given = dict(zip(_roles(missing), operands, strict=True))

    def outputs(wanted: Any) -> Any:
        pair = (wanted, given[_KERNEL]) if missing == _INPUTS else (given[_INPUTS], wanted)
        return _contract_patches(*pair, missing=_OUTPUTS, shapes=shapes, stride=stride)

    # each device keeps its own sum: a value that does not vary would be summed over the devices
    like = _tree.vary(jnp.zeros(shapes[missing], operands[0].dtype), _tree.varying_axes(operands))
    return jax.linear_transpose(outputs, like)(given[_OUTPUTS])[0]


def by_patches(inputs: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Computes the same as one matrix product with the window around each position."""
    window = kernel.shape[:2]
    pads = [same_padding(size, width, stride) for size, width in zip(inputs.shape[1:3], window, strict=True)]
    out_h, out_w = (-(-size // stride) for size in inputs.shape[1:3])
    padded = jnp.pad(inputs, ((0, 0), *pads, (0, 0)))
    shifted = [
        padded[:, i : i + stride * (out_h - 1) + 1 : stride, j : j + stride * (out_w - 1) + 1 : stride]
        for i in range(window[0])
        for j in range(window[1])
    ]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def _compute(first: Any, second: Any, *, missing: int, shapes: Shapes, stride: int) -> Any:
    contraction = {_INPUTS: _of_inputs, _KERNEL: _of_kernel, _OUTPUTS: _of_outputs}[missing]
    return contraction(first, second, shapes, stride)


def _of_outputs(inputs: Any, kernel: Any, shapes: Shapes, stride: int) -> Any:
    (_, *sizes, _), (*window, _, _), _ = shapes
    padding = [same_padding(size, width, stride) for size, width in zip(sizes, window, strict=True)]
    return jax.lax.conv_general_dilated(inputs, kernel, (stride, stride), padding, dimension_numbers=_LAYOUT)


def _of_inputs(kernel: Any, cotangents: Any, shapes: Shapes, stride: int) -> Any:
    padding = [(width - 1 - low, size + low - reach) for size, width, low, reach in _sides(shapes, stride)]
    flipped = _barrier(jnp.swapaxes(jnp.flip(kernel, (0, 1)), 2, 3))
    return jax.lax.conv_general_dilated(
        cotangents, flipped, (1, 1), padding, lhs_dilation=(stride, stride), dimension_numbers=_LAYOUT
    )


def _of_kernel(inputs: Any, cotangents: Any, shapes: Shapes, stride: int) -> Any:
    sides = _sides(shapes, stride)
    read = [min(size, reach + width - 1 - low) for size, width, low, reach in sides]  # a stride may skip the last rows
    inputs = inputs[:, : read[0], : read[1]]
    padding = [
        (low, reach + width - 1 - low - count) for count, (_, width, low, reach) in zip(read, sides, strict=True)
    ]

    def summed(inputs: Any, cotangents: Any) -> Any:
        """Computes the gradient as a convolution with channels as examples and examples as channels."""
        found = jax.lax.conv_general_dilated(
            _barrier(jnp.transpose(inputs, (3, 1, 2, 0))), _barrier(jnp.transpose(cotangents, (1, 2, 0, 3))),
            (1, 1), padding, rhs_dilation=(stride, stride), dimension_numbers=_LAYOUT,
        )  # fmt: skip
        return jnp.transpose(_barrier(found), (1, 2, 0, 3))

    examples, height, width, _ = shapes[_OUTPUTS]
    chunks = -(-examples * height * width // _POSITIONS)
    if chunks <= 1:
        return summed(inputs, cotangents)
    # prefer somewhat smaller chunks to a last chunk that needs padding
    chunks = next((more for more in range(chunks, min(2 * chunks, examples) + 1) if examples % more == 0), chunks)
    size = -(-examples // chunks)
    pairs = [
        jnp.pad(array, ((0, chunks * size - examples), (0, 0), (0, 0), (0, 0))).reshape(chunks, size, *array.shape[1:])
        for array in (inputs, cotangents)
    ]
    zero = _tree.vary(jnp.zeros(shapes[_KERNEL], inputs.dtype), _tree.varying_axes(inputs))
    return jax.lax.scan(lambda total, pair: (total + summed(*pair), None), zero, pairs)[0]


def _sides(shapes: Shapes, stride: int) -> list[tuple[int, int, int, int]]:
    """Returns, for each dimension, the input size, window, padding before, and outputs dilated by the stride."""
    (_, *sizes, _), (*window, _, _), (_, *outputs, _) = shapes
    return [
        (size, width, same_padding(size, width, stride)[0], stride * (out - 1) + 1)
        for size, width, out in zip(sizes, window, outputs, strict=True)
    ]


_barrier = jax.lax.optimization_barrier
_primitive = Primitive("convolution")
_primitive.def_impl(jax.jit(_compute, static_argnames=("missing", "shapes", "stride")))
_primitive.def_abstract_eval(lambda first, second, *, missing, shapes, stride: first.update(shape=shapes[missing]))
ad.defbilinear(_primitive, functools.partial(_transpose, 0), functools.partial(_transpose, 1))
batching.primitive_batchers[_primitive] = _batch
mlir.register_lowering(_primitive, mlir.lower_fun(_compute, multiple_results=False))
