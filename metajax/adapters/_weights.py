"""Adapters beside a kernel: low-rank paths and learned scales of outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from metajax.adapters._adapter import Apply, Weight, absent, adapted, merged
from metajax.core import _tree, _validate
from metajax.core._types import Model, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Weight):
    """`kernel + scale * a @ b`, applied beside the kernel, because the sum would copy the kernel for each task."""

    kernel: Any
    a: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})

    def __rmatmul__(self, inputs: Any) -> jax.Array:
        outputs = inputs @ self.kernel
        a, b = self.a.astype(outputs.dtype), self.b.astype(outputs.dtype)
        return outputs + (inputs @ a * self.scale) @ b

    def merged(self) -> jax.Array:
        kernel = merged(self.kernel)
        return kernel + (self.scale * self.a @ self.b).astype(kernel.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled(Weight):
    """A kernel whose outputs are multiplied by learned scales."""

    kernel: Any
    scale: jax.Array

    def __rmatmul__(self, inputs: Any) -> jax.Array:
        outputs = inputs @ self.kernel
        return outputs * self.scale.astype(outputs.dtype)

    def merged(self) -> jax.Array:
        kernel = merged(self.kernel)
        return kernel * self.scale[..., None, :].astype(kernel.dtype)


def lora(
    model: Model,
    *,
    rank: int = 8,
    alpha: float | None = None,
    where: _tree.Where = "(query|value)/kernel",
    name: str = "lora",
) -> Model:
    """Low-rank adaptation (Hu et al. 2022): `inputs @ kernel + alpha / rank * inputs @ a @ b`, with learned `a`, `b`.

    The leaves are beside `kernel` in the tree: `lora_a` `[..., in, rank]`, normal with variance 1 / in, and `lora_b`
    `[..., rank, out]`, zero. At first the outputs are therefore those of `model`. The leaves are float32 if the kernel
    is narrower, because they are small and take gradient steps. The kernel is never summed with the product, so tasks
    under vmap share it.

    Args:
      model: a model whose layers compute `inputs @ kernel`, such as `models.decoder`, `models.vit` or your own
        function. A layer of flax.nnx works too, but it computes the sum first, which copies its kernel for each task.
      rank: rank of the product, at most the smaller side of each kernel.
      alpha: weight of the product, times `rank`; None means `rank`, which gives the weight 1.
      where: path regex or predicate over the leaves called `kernel`; None adapts all of them.
      name: name of the leaves, so that a model can have two adapters: `lora(lora(model, name="slow"), name="fast")`.

    Returns:
      A `Model`. In `lora(ia3(model))` the scales also multiply the low-rank path; in `ia3(lora(model))` they do not.

    Raises:
      ValueError: an argument has the wrong type, `rank` or `alpha` is 0 or below, `model` already has an adapter with
        this name, or (when parameters are made) `where` picks nothing or a kernel that is neither `[in, out]` nor, in
        scanned blocks, `[depth, in, out]`, or `rank` is above a side of a kernel.

    Source: Hu et al. 2022, arXiv:2106.09685.

    >>> import jax, jax.numpy as jnp, optax, metajax
    >>> model = metajax.adapters.lora(metajax.models.decoder(100, width=16, depth=2, heads=4), rank=4)
    >>> params = model.init(jax.random.key(0), jnp.zeros([1, 5], jnp.int32))
    >>> {name: leaf.shape for name, leaf in params["blocks"]["query"].items()}
    {'kernel': (2, 16, 16), 'lora_a': (2, 16, 4), 'lora_b': (2, 4, 16)}
    >>> learner = metajax.learners.maml(model, inner=optax.sgd(0.1), num_steps=3, adapts="lora")
    """
    _validate.positive_int("rank", rank)
    scale = 1.0 if alpha is None else _validate.positive_float("alpha", alpha) / rank

    def make(key: jax.Array, path: str, kernel: Any) -> dict[str, jax.Array]:
        *depth, inputs, outputs = kernel.shape
        if rank > min(inputs, outputs):
            raise ValueError(f"rank must be at most {min(inputs, outputs)} for {path} {kernel.shape}, got {rank}")
        dtype = learned(kernel)
        a = jax.random.normal(key, (*depth, inputs, rank), dtype) * inputs**-0.5
        return {f"{name}_a": a, f"{name}_b": jnp.zeros((*depth, rank, outputs), dtype)}

    build = lambda kernel, leaves: LowRank(kernel, leaves[f"{name}_a"], leaves[f"{name}_b"], scale)  # noqa: E731
    return beside_kernels(model, name, (f"{name}_a", f"{name}_b"), where, make, build)


def ia3(model: Model, *, where: _tree.Where = "(key|value|up)/kernel") -> Model:
    """(IA)^3 (Liu et al. 2022): learned scales of keys, values and hidden units.

    The leaf `ia3` `[..., out]` is beside `kernel` in the tree. It starts as ones and multiplies the output of the
    kernel. In a SwiGLU, scaling the output of `up` scales the hidden units. Keys are scaled before the rotation.

    Args:
      model: as for `lora`.
      where: path regex or predicate over the leaves called `kernel`; None adapts all of them.

    Returns:
      A `Model`, which composes with `lora` and `prompt`.

    Raises:
      ValueError: an argument has the wrong type, `model` already has scales, or (when parameters are made) `where`
        picks nothing or a kernel that is neither `[in, out]` nor, in scanned blocks, `[depth, in, out]`.

    Source: Liu et al. 2022, arXiv:2205.05638.

    >>> import jax, jax.numpy as jnp, metajax
    >>> model = metajax.adapters.ia3(metajax.models.decoder(100, width=16, depth=2, heads=4))
    >>> params = model.init(jax.random.key(0), jnp.zeros([1, 5], jnp.int32))
    >>> params["blocks"]["key"]["ia3"].shape, metajax.adapters.count(params, "ia3")
    ((2, 16), 192)
    """

    def make(key: jax.Array, path: str, kernel: Any) -> dict[str, jax.Array]:
        del key, path
        return {"ia3": jnp.ones((*kernel.shape[:-2], kernel.shape[-1]), learned(kernel))}

    return beside_kernels(model, "ia3", ("ia3",), where, make, lambda kernel, leaves: Scaled(kernel, leaves["ia3"]))


def learned(kernel: Any) -> Any:
    """Returns the type of the leaves that an adapter learns beside a kernel: at least float32."""
    return jnp.promote_types(kernel.dtype, jnp.float32)


def beside_kernels(
    model: Model,
    name: str,
    names: tuple[str, ...],
    where: _tree.Where,
    make: Callable[[jax.Array, str, Any], dict[str, jax.Array]],
    build: Callable[[Any, dict[str, jax.Array]], Weight],
    *,
    folds: bool = True,
    check: Callable[[list[str], list[str]], None] = lambda picked, all_paths: None,
) -> Model:
    """Makes an adapter with the leaves `names` beside the kernels that `where` picks.

    Args:
      model: the model to adapt.
      name: name of the adapter.
      names: names of its leaves.
      where: picks kernels.
      make: `(key, path, kernel) -> leaves`.
      build: `(kernel, leaves) -> weight`, which replaces the kernel during the computation.
      folds: whether one array can replace the weight.
      check: `(picked, all)`, paths of kernels; raises a ValueError if these kernels must not be picked together.
    """
    _validate.instance("model", model, Model)

    def add(params: Params, key: jax.Array) -> Params:
        kernels: dict[str, Any] = {}
        _edit_groups(params, lambda path, group: kernels.update({path: group["kernel"]}) or group)
        if not kernels:
            raise ValueError(
                f"params must have leaves called kernel, got {', '.join(_tree.paths(params)) or 'no leaf'}"
            )
        picked = {path: leaf for path, leaf in _tree.split(kernels, where)[0].items() if leaf is not None}
        for path, kernel in picked.items():
            if kernel.ndim not in (2, 3) or not jnp.issubdtype(kernel.dtype, jnp.floating):
                raise ValueError(
                    "where must pick floating-point kernels [in, out], or [depth, in, out] of scanned blocks, got "
                    f"{where!r}, which picks {path} {kernel.dtype} {kernel.shape}"
                )
        check(list(picked), list(kernels))
        keys = dict(zip(picked, jax.random.split(key, len(picked)), strict=True))

        def with_leaves(path: str, group: dict[str, Any]) -> dict[str, Any]:
            return {**group, **make(keys[path], path, picked[path]), **group} if path in picked else group

        return _edit_groups(params, with_leaves)

    def edit(params: Params, inputs: Any) -> tuple[Params, Any]:
        found = []

        def with_weight(path: str, group: dict[str, Any]) -> dict[str, Any]:
            if names[0] not in group:
                return group
            found.append(path)
            rest = {key: leaf for key, leaf in group.items() if key not in names}
            return {**rest, "kernel": build(group["kernel"], group)}

        params = _edit_groups(params, with_weight)
        if not found:
            raise absent(name)
        return params, inputs

    return adapted(Apply(name, model, add, edit, folds))


def _edit_groups(tree: Any, visit: Callable[[str, dict[str, Any]], dict[str, Any]], path: str = "") -> Any:
    """Replaces each dict with a leaf called `kernel` by what `visit(path of the kernel, dict)` returns."""
    if not isinstance(tree, Mapping):
        return tree
    edited = {name: _edit_groups(child, visit, f"{path}{name}/") for name, child in tree.items()}
    has_kernel = "kernel" in edited and not isinstance(edited["kernel"], Mapping)
    return visit(f"{path}kernel", edited) if has_kernel else edited
