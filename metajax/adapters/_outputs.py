"""Adapters of kernel outputs: bottlenecks after a kernel, shifts, and learned keys and values in front."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from metajax.adapters._adapter import Weight, names_of
from metajax.adapters._weights import beside_kernels, learned
from metajax.core import _tree, _validate
from metajax.core._types import Model

_SPREAD = 0.02  # initial deviation of transformer embeddings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Bottleneck(Weight):
    """A kernel followed by a small network whose outputs are added to those of the kernel."""

    kernel: Any
    down: jax.Array
    bias: jax.Array
    up: jax.Array

    def __rmatmul__(self, inputs: Any) -> jax.Array:
        outputs = inputs @ self.kernel
        down, bias, up = (leaf.astype(outputs.dtype) for leaf in (self.down, self.bias, self.up))
        return outputs + jax.nn.gelu(outputs @ down + bias, approximate=False) @ up


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Shifted(Weight):
    """A kernel whose outputs are shifted."""

    kernel: Any
    shift: jax.Array

    def __rmatmul__(self, inputs: Any) -> jax.Array:
        outputs = inputs @ self.kernel
        return outputs + self.shift.astype(outputs.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Prefixed(Weight):
    """A kernel with learned rows in front of its outputs for a text."""

    kernel: Any
    rows: jax.Array

    def __rmatmul__(self, inputs: Any) -> jax.Array:
        outputs = inputs @ self.kernel
        front = jnp.broadcast_to(self.rows.astype(outputs.dtype), (*outputs.shape[:-2], *self.rows.shape))
        return jnp.concatenate([front, outputs], axis=-2)


def bottleneck(
    model: Model, size: int = 16, *, where: _tree.Where = "(out|down)/kernel", name: str = "bottleneck"
) -> Model:
    """Adapters after the two halves of each block (Houlsby et al. 2019): `y + gelu(y @ down + bias) @ up`.

    `y` is the output of the kernel. A bias of the layer is added after the adapter; the adapter's own bias replaces its
    effect inside the adapter. The leaves are beside `kernel`: `bottleneck_down` `[..., out, size]`, normal with
    variance 1 / out, `bottleneck_bias` `[..., size]` and `bottleneck_up` `[..., size, out]`, both zero. At first the
    outputs are therefore those of `model`.

    Args:
      model: a model whose layers compute `inputs @ kernel`, such as `models.decoder`, `encoder`, `vit` or your own.
      size: hidden units of the bottleneck.
      where: path regex or predicate over the leaves called `kernel`; the form of Pfeiffer et al. 2021
        (arXiv:2005.00247) is `"down/kernel"`.
      name: prefix of the leaf names.

    Returns:
      A `Model`, which composes with the other adapters. No weight of the plain model can hold a nonlinearity, so
      `merge` refuses it.

    Raises:
      ValueError: as `lora`, for `size`.

    Source: Houlsby et al. 2019, arXiv:1902.00751.

    >>> import jax, jax.numpy as jnp, metajax
    >>> model = metajax.adapters.bottleneck(metajax.models.decoder(100, width=16, depth=2, heads=4), 4)
    >>> params = model.init(jax.random.key(0), jnp.zeros([1, 5], jnp.int32))
    >>> metajax.adapters.count(params, "bottleneck")
    528
    """
    _validate.positive_int("size", size)
    names = (f"{name}_down", f"{name}_bias", f"{name}_up")

    def make(key: jax.Array, path: str, kernel: Any) -> dict[str, jax.Array]:
        del path
        depth, outputs, dtype = kernel.shape[:-2], kernel.shape[-1], learned(kernel)
        down = jax.random.normal(key, (*depth, outputs, size), dtype) * outputs**-0.5
        leaves = (down, jnp.zeros((*depth, size), dtype), jnp.zeros((*depth, size, outputs), dtype))
        return dict(zip(names, leaves, strict=True))

    build = lambda kernel, leaves: _Bottleneck(kernel, *(leaves[leaf] for leaf in names))  # noqa: E731
    return beside_kernels(model, name, names, where, make, build, folds=False)


def bitfit(model: Model, *, where: _tree.Where = None) -> Model:
    """BitFit (Ben Zaken et al. 2022) for layers without biases, such as those of Llama: learned shifts of the outputs.

    Layers that have biases need no adapter: `adapts="bias"` picks them. The leaf `bitfit` `[..., out]` is beside
    `kernel` and starts at zero.

    Args:
      model: as for `bottleneck`.
      where: path regex or predicate over the leaves called `kernel`; None shifts the outputs of all of them.

    Returns:
      A `Model`, which composes with the other adapters. A kernel cannot hold a shift, so `merge` refuses it.

    Raises:
      ValueError: as `ia3`.

    Source: Ben Zaken, Ravfogel and Goldberg 2022, arXiv:2106.10199.

    >>> import jax, jax.numpy as jnp, metajax
    >>> model = metajax.adapters.bitfit(metajax.models.decoder(100, width=16, depth=2, heads=4), where="blocks")
    >>> params = model.init(jax.random.key(0), jnp.zeros([1, 5], jnp.int32))
    >>> metajax.adapters.count(params, "bitfit")
    416
    """

    def make(key: jax.Array, path: str, kernel: Any) -> dict[str, jax.Array]:
        del key, path
        return {"bitfit": jnp.zeros((*kernel.shape[:-2], kernel.shape[-1]), learned(kernel))}

    build = lambda kernel, leaves: _Shifted(kernel, leaves["bitfit"])  # noqa: E731
    return beside_kernels(model, "bitfit", ("bitfit",), where, make, build, folds=False)


def prefix(model: Model, length: int, *, where: _tree.Where = "(key|value)/kernel") -> Model:
    """Prefix tuning (Li and Liang 2021): learned keys and values before those of every text, in each block.

    The leaf `prefix` `[..., length, out]` is beside the kernels of keys and values. All tokens see the prefix. It takes
    no position, so learned keys are not rotated. A layer with a bias also adds it to the learned rows. The rows start
    small, normal with deviation 0.02, and receive attention at once, so the outputs differ from those of `model` at
    first.

    Args:
      model: `models.decoder`, `encoder` or `vit`, with or without prompts, and with no other adapter: put other
        adapters around it, as in `lora(prefix(model, 8))`.
      length: length of the prefix, in positions.
      where: path regex or predicate over the leaves called `kernel`; must pick the keys and values of the same blocks.

    Returns:
      A `Model`. No weight of the plain model can hold a prefix, so `merge` refuses it.

    Raises:
      ValueError: as `ia3`, or `length` is below 1, or `model` has other adapters, or (when parameters are made) `where`
        picks other kernels.

    Source: Li and Liang 2021, arXiv:2101.00190.

    >>> import jax, jax.numpy as jnp, metajax
    >>> model = metajax.adapters.prefix(metajax.models.decoder(100, width=16, depth=2, heads=4), 3)
    >>> params = model.init(jax.random.key(0), jnp.zeros([1, 5], jnp.int32))
    >>> params["blocks"]["key"]["prefix"].shape
    (2, 3, 16)
    """
    _validate.instance("model", model, Model)
    _validate.positive_int("length", length)
    others = [other for other in names_of(model) if other not in ("prompt", "prefix")]
    if others:
        raise ValueError(f"model must have no adapter that edits kernels yet, got one with {', '.join(others)}")

    def make(key: jax.Array, path: str, kernel: Any) -> dict[str, jax.Array]:
        del path
        shape = (*kernel.shape[:-2], length, kernel.shape[-1])
        return {"prefix": _SPREAD * jax.random.normal(key, shape, learned(kernel))}

    def check(picked: list[str], all_paths: list[str]) -> None:
        def blocks(name: str) -> set[str]:
            return {path.removesuffix(name) for path in picked if path.endswith(name)}

        keys, values = blocks("key/kernel"), blocks("value/kernel")
        others = len(picked) > len(keys) + len(values) and any(path.endswith("key/kernel") for path in all_paths)
        if keys != values or others:
            raise ValueError(
                f"where must pick the kernels of keys and of values of the same blocks and no other, got {where!r}, "
                f"which picks {', '.join(picked)}"
            )

    build = lambda kernel, leaves: _Prefixed(kernel, leaves["prefix"])  # noqa: E731
    return beside_kernels(model, "prefix", ("prefix",), where, make, build, folds=False, check=check)
