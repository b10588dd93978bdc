"""Parts shared by adapters: the adapted model, and conversions between plain and adapted parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metajax.core import _tree, _validate
from metajax.core._types import Model, Params


@dataclasses.dataclass(frozen=True)
class Apply:
    """The `apply` of an adapted model; it stores the parts that the model is made of.

    Attributes:
      name: name of the adapter's leaves.
      model: the model that is adapted.
      add: `(params, key) -> params` with the missing leaves added.
      edit: `(params, inputs) -> (params, inputs)`, the arguments that the model takes.
      folds: whether the edited parameters are everything that the adapter does.
    """

    name: str
    model: Model
    add: Callable[[Params, jax.Array], Params]
    edit: Callable[[Params, Any], tuple[Params, Any]]
    folds: bool = True

    def __call__(self, params: Params, inputs: Any, **needed: Any) -> Any:
        return self.model.apply(*self.edit(params, inputs), **needed)


class Weight:
    """A kernel and the leaves of an adapter beside it, as one leaf of the edited parameters: `inputs @ weight`.

    Subclasses for adapters that fold also implement `merged`.
    """

    __array_ufunc__ = None  # for NumPy inputs, the weight computes the product

    def merged(self) -> jax.Array:
        """Returns one array that gives the same outputs."""
        raise ValueError("model must multiply by its kernels for this adapter, got one that reads them as arrays")

    def __getitem__(self, index: Any) -> jax.Array:
        return self.merged()[index]  # flax.nnx layers that do not know adapters read a kernel like this


def merged(kernel: Any) -> jax.Array:
    """Returns a kernel as one array."""
    return kernel.merged() if isinstance(kernel, Weight) else kernel


def adapted(apply: Apply) -> Model:
    """Returns the model of an adapter.

    Raises:
      ValueError: the model already has an adapter with this name.
    """
    taken = names_of(apply.model)
    if apply.name in taken:
        raise ValueError(f"model must have no adapter called {apply.name!r} yet, got one with {', '.join(taken)}")

    def init(key: jax.Array, inputs: Any) -> Params:
        model_key, key = jax.random.split(key)
        return apply.add(apply.model.init(model_key, inputs), key)

    return Model(init, apply, apply.model.needs)


def names_of(model: Model) -> list[str]:
    """Returns the names of the adapters of a model, the outermost first."""
    return [part.name for part in _chain(model)]


def _chain(model: Model) -> list[Apply]:
    """Returns the adapters of a model, the outermost first."""
    chain = []
    while isinstance(model.apply, Apply):
        chain.append(model.apply)
        model = model.apply.model
    return chain


def _adapters(model: Model) -> list[Apply]:
    chain = _chain(_validate.instance("model", model, Model))
    if not chain:
        raise ValueError(
            "model must be what a function of metajax.adapters returned (without a wrapper such as mixed_precision "
            f"around it), got {model!r}"
        )
    return chain


def absent(name: str) -> ValueError:
    """Returns the error for parameters without the leaves of an adapter."""
    return ValueError(
        f"params must hold the leaves of the adapter {name!r}, got none: init of the adapted model makes them, "
        "attach adds them to parameters of the plain model"
    )


def attach(model: Model, params: Params, *, key: jax.Array) -> Params:
    """Adds the leaves of a model's adapters to parameters that lack them, such as pretrained ones.

    Args:
      model: the result of `lora` or another adapter, or several nested ones.
      params: parameters of the plain model, or of one that has some of the adapters. No leaf is changed or copied.
      key: PRNG key of the new leaves.

    Returns:
      Parameters of `model`. Its outputs are those of the plain model, unless it has a prompt or a prefix.

    Raises:
      ValueError: the model has no adapters, or `model.init` would raise an error.

    >>> import jax, jax.numpy as jnp, metajax
    >>> base = metajax.models.decoder(100, width=16, depth=2, heads=4)
    >>> tokens = jnp.arange(10).reshape(2, 5)
    >>> pretrained = base.init(jax.random.key(0), tokens)
    >>> model = metajax.adapters.lora(base, rank=4)
    >>> params = metajax.adapters.attach(model, pretrained, key=jax.random.key(1))
    >>> bool(jnp.array_equal(model.apply(params, tokens), base.apply(pretrained, tokens)))
    True
    """
    for apply in reversed(_adapters(model)):
        key, own = jax.random.split(key)
        params = apply.add(params, own)
    return params


def merge(model: Model, params: Params) -> Params:
    """Folds low-rank paths and learned scales into plain weights.

    Args:
      model: the result of `lora` or `ia3`, or of both nested.
      params: its parameters.

    Returns:
      Parameters of the plain model that give the same outputs, up to rounding; a weight keeps its type.

    Raises:
      ValueError: the model has no adapters, the parameters lack their leaves, or no weight can hold an adapter, such as
        a prompt. The leaf of a prompt passes through `merge(lora(plain), params)`.

    >>> import jax, jax.numpy as jnp, metajax
    >>> base = metajax.models.decoder(100, width=16, depth=2, heads=4)
    >>> tokens = jnp.arange(10).reshape(2, 5)
    >>> model = metajax.adapters.lora(base)
    >>> params = model.init(jax.random.key(0), tokens)
    >>> plain = metajax.adapters.merge(model, params)
    >>> bool(jnp.allclose(base.apply(plain, tokens), model.apply(params, tokens), atol=1e-5))
    True
    """
    for apply in _adapters(model):
        if not apply.folds:
            raise ValueError(f"model must have no {apply.name}, which no weight can hold; merge the model without it")
        params, _ = apply.edit(params, None)
    return jax.tree.map(merged, params, is_leaf=lambda leaf: isinstance(leaf, Weight))


def count(params: Params, where: _tree.Where = None) -> int:
    """Counts the numbers in the leaves that `where` picks.

    Args:
      params: a tree of arrays, or of their shapes.
      where: path regex or predicate, as in `trainable=` and `adapts=`; None counts all.

    Raises:
      ValueError: `where` picks no leaf.

    >>> import jax, jax.numpy as jnp, metajax
    >>> model = metajax.adapters.lora(metajax.models.decoder(100, width=16, depth=2, heads=4), rank=4)
    >>> params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros([1, 5], jnp.int32))
    >>> metajax.adapters.count(params, "lora"), metajax.adapters.count(params)
    (512, 11984)
    """
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(_tree.split(params, where)[0]))
