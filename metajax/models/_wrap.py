"""Wraps modules of other libraries as pure `Model`s."""

from __future__ import annotations

import contextvars
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from metajax.core._types import Model, Params


def as_floats(inputs: Any) -> Any:
    """Converts unsigned 8-bit leaves, which are images, to floats in [0, 1]; other leaves pass through.

    >>> import numpy as np
    >>> as_floats(np.array([0, 255], np.uint8)).tolist()
    [0.0, 1.0]
    """
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) / 255 if x.dtype == jnp.uint8 else x, inputs)


def from_nnx(module: Callable[[nnx.Rngs], nnx.Module], *, needs: tuple[str, ...] = ()) -> Model:
    """Makes a `Model` from a flax.nnx module.

    Parameters (`nnx.Param`) become a nested dict of arrays. Other variables (running statistics, dropout streams) are
    recreated in each call, and writes to them are dropped. A batch normalisation in training mode therefore uses the
    statistics of the call, which is transductive. Unsigned 8-bit images are scaled to [0, 1].

    Args:
      module: a factory `(rngs) -> module` whose module maps inputs to outputs.
      needs: which of `mask` and `stats` the module's call takes as keywords. `mask` is also useful for a module that
        does not take it: its batch normalisations (`nnx.BatchNorm`) then leave padding out of their statistics, and
        warn without it. With `key`, the module's dropout streams follow the key, and a call without one is
        deterministic.

    >>> import jax, jax.numpy as jnp, metajax
    >>> from flax import nnx
    >>> model = metajax.models.from_nnx(lambda rngs: nnx.Linear(3, 2, rngs=rngs))
    >>> params = model.init(jax.random.key(0), jnp.ones([4, 3]))
    >>> sorted(params), model.apply(params, jnp.ones([4, 3])).shape
    (['bias', 'kernel'], (4, 2))
    """
    return from_shape(lambda shape, rngs: module(rngs), needs=needs)


def from_shape(module: Callable[[tuple[int, ...], nnx.Rngs], nnx.Module], *, needs: tuple[str, ...] = ()) -> Model:
    """Does the same as `from_nnx`, for a factory `(shape of one example, rngs) -> module`."""

    def init(key: jax.Array, inputs: Any) -> Any:
        return nnx.to_pure_dict(nnx.state(module(_example_shape(inputs), nnx.Rngs(key)), nnx.Param))

    @functools.cache  # by shape; the values are static: a graph definition and abstract parameters
    def abstract(shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
        return nnx.split(nnx.eval_shape(lambda: module(shape, nnx.Rngs(0))), nnx.Param, ...)

    def apply(params: Any, inputs: Any, **needed: Any) -> Any:
        shape = _example_shape(inputs)
        key = needed.pop("key", None)
        graph, params_state, rest = abstract(shape)
        params_state = jax.tree.map(lambda leaf: leaf, params_state)  # a copy: the next line writes into it
        nnx.replace_by_pure_dict(params_state, params)
        if jax.tree.leaves(rest):
            rngs = nnx.Rngs(0 if key is None else key)
            rest = nnx.split(module(shape, rngs), nnx.Param, ...)[2]  # under jit, its parameters are never computed
        bound = nnx.merge(graph, params_state, rest)
        if "key" in needs:
            # not eval(): it would also make a batch normalisation use running statistics, which are never updated
            bound.set_attributes(deterministic=key is None, raise_if_not_found=False)
        for _, child in nnx.iter_modules(bound):
            if type(child) is nnx.BatchNorm:
                child.__class__ = _BatchNorm
        token = _padding.set(needed.get("mask"))
        try:
            return bound(as_floats(inputs), **_taken(bound, needed))
        finally:
            _padding.reset(token)

    return Model(init, apply, needs)


_padding: contextvars.ContextVar[Any] = contextvars.ContextVar("padding", default=None)  # the mask of the call


class _BatchNorm(nnx.BatchNorm):
    """A batch normalisation that leaves padding out of its statistics, even if its module passes no mask."""

    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Any:
        running = self.use_running_average if use_running_average is None else use_running_average
        if mask is None and not running:
            mask = _statistics_mask(x, _padding.get())
        return super().__call__(x, use_running_average, mask=mask)


def _statistics_mask(inputs: Any, mask: Any) -> Any:
    """Returns the example mask for statistics of inputs `[n, ...]`; warns if padding would count."""
    if mask is None or mask.shape != inputs.shape[:1]:
        why = 'give needs=("mask",)' if mask is None else f"it sees inputs {inputs.shape} for {mask.shape[0]} examples"
        warnings.warn(f"padding counts in the statistics of a batch normalisation: {why}", stacklevel=2)
        return None
    mask = jnp.asarray(mask)
    return jnp.expand_dims(mask | ~jnp.any(mask), tuple(range(1, inputs.ndim)))  # without any example, keep all


def _taken(module: Any, needed: dict[str, Any]) -> dict[str, Any]:
    """Returns the keywords that a module's call takes; the mask may be for its batch normalisations alone."""
    parameters = inspect.signature(type(module).__call__).parameters
    if "mask" in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return needed
    return {name: value for name, value in needed.items() if name != "mask"}


def of_dtype(model: Model, dtype: Any) -> Model:
    """Returns a model whose parameters are made in float32 and stored in another floating-point type.

    Raises:
      ValueError: `dtype` is not a floating-point type.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating-point type, got {dtype!r}")
    if dtype == jnp.float32:
        return model

    def init(key: jax.Array, inputs: Any) -> Params:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), model.init(key, inputs))

    return Model(init, model.apply, model.needs)


def image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Returns the height, width and channels of images.

    Args:
      shape: shape of one example.

    Raises:
      ValueError: the examples are not images.

    >>> image_shape((28, 28, 1))
    (28, 28, 1)
    """
    if len(shape) != 3:
        raise ValueError(f"inputs must be images [n, height, width, channels], got examples of shape {shape}")
    height, width, channels = shape
    return height, width, channels


def _example_shape(inputs: Any) -> tuple[int, ...]:
    return tuple(jax.tree.leaves(inputs)[0].shape[1:])


def from_linen(module: linen.Module, *, needs: tuple[str, ...] = (), **call: Any) -> Model:
    """Makes a `Model` from a flax.linen module.

    The `params` collection becomes the parameters. Other collections are recreated in each call, and writes to them are
    dropped. A batch normalisation with `use_running_average=False` therefore uses the statistics of the call, which is
    transductive. Unsigned 8-bit images are scaled to [0, 1].

    Args:
      module: maps inputs to outputs.
      needs: which of `mask` and `stats` the module's call takes as keywords (None at initialisation). `mask` is also
        useful for a module that does not take it: its batch normalisations (`linen.BatchNorm`) then leave padding out
        of their statistics, and warn without it. With `key`, the `dropout` stream follows the key and the call gets
        `deterministic=`.
      **call: static keywords of every call, such as `train=True`.

    >>> import jax, jax.numpy as jnp, metajax
    >>> from flax import linen
    >>> model = metajax.models.from_linen(linen.Dense(2))
    >>> params = model.init(jax.random.key(0), jnp.ones([4, 3]))
    >>> model.apply(params, jnp.ones([4, 3])).shape
    (4, 2)
    """

    absent: dict[str, Any] = _taken(module, {name: None for name in needs if name != "key"})
    absent |= {"deterministic": True} if "key" in needs else {}

    def init(key: jax.Array, inputs: Any) -> Any:
        return module.init(key, as_floats(inputs), **absent, **call)["params"]

    def apply(params: Any, inputs: Any, **needed: Any) -> Any:
        key = needed.pop("key", None)
        inputs = as_floats(inputs)
        variables = dict(jax.eval_shape(lambda: module.init(jax.random.key(0), inputs, **absent, **call)))
        if set(variables) - {"params"}:
            variables = dict(module.init(jax.random.key(0), inputs, **absent, **call))
        variables["params"] = params
        rngs = {} if key is None else {"dropout": key}
        mutable = [name for name in variables if name != "params"] or False
        if "key" in needs:
            needed["deterministic"] = key is None
        with linen.intercept_methods(functools.partial(_leave_padding_out, needed.get("mask"))):
            result = module.apply(variables, inputs, rngs=rngs, mutable=mutable, **call, **_taken(module, needed))
        return result[0] if mutable else result

    return Model(init, apply, needs)


def _leave_padding_out(mask: Any, function: Any, arguments: Any, keywords: Any, context: Any) -> Any:
    """Passes the mask to a batch normalisation whose module passes none."""
    if isinstance(context.module, linen.BatchNorm) and context.method_name == "__call__":
        inputs, *running = arguments
        given = [*running, keywords.get("use_running_average"), context.module.use_running_average]
        if keywords.get("mask") is None and not next((value for value in given if value is not None), False):
            keywords = {**keywords, "mask": _statistics_mask(inputs, mask)}
    return function(*arguments, **keywords)
