"""Networks that grow between two compiled phases: edits the parameters so that the function stays the same.

| growth | of | the function stays |
|---|---|---|
| `widen` | `mlp`; `conv4` with a head and normalisation "batch", "support" or "none" | exactly |
| | `conv4` with a head and "layer" or "group", to a multiple of the width | exactly |
| | `conv4` without a head, as above | up to an isometry: distances and products of features stay |
| | the hidden layers of `decoder`, `vit` and `encoder` | exactly |
| `deepen` | `mlp`, `decoder`, `vit` | exactly |
| | `encoder` | up to the epsilon of its normalisations |
| | `conv4` | never, since a block halves the image: refused |
| `stack_blocks` | `decoder`, `vit`, `encoder` | not |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from metajax.core import _tree, _validate
from metajax.core._types import Episode, MetaState, OuterUpdate, Params

Leaves = Mapping[str, Any]  # leaves by path
Normalisation = Literal["batch", "support", "layer", "group", "none"]
_NORMALISATIONS = ("batch", "support", "layer", "group", "none")
# optax fields that hold one number for each parameter, and the power of the gradient that they average
_POWERS = {"mu": 1, "trace": 1, "acc_grads": 1, "nu": 2, "nu_max": 2, "sum_of_squares": 2}
_BLOCK = {
    "attention_norm", "mlp_norm", "query", "query_norm", "key", "key_norm", "value", "out", "gate", "up", "down",
}  # fmt: skip


class Growth(NamedTuple):
    """An edit that makes a network larger. `widen`, `deepen` and `stack_blocks` make it for one parameter tree.

    Attributes:
      params: `(params) -> params` of the larger network.
      moments: `(moments, power) -> moments`, leaves by path. It maps means of a power (1 or 2) of the gradients of the
        small network to those of the large network at its starting point. New leaves are 0. Leaves missing from the
        input are also missing from the result.

    >>> import jax, jax.numpy as jnp, metajax
    >>> params = metajax.models.mlp(1, hidden=(2,)).init(jax.random.key(0), jnp.ones([1, 2]))
    >>> growth = metajax.models.widen(params, (3,))
    >>> growth.params(params)["layer_0"]["kernel"].shape
    (2, 3)
    >>> growth.moments({"layer_0/bias": jnp.array([4.0, 1.0])}, 1)["layer_0/bias"].tolist()
    [2.0, 2.0, 1.0]
    """

    params: Callable[[Params], Params]
    moments: Callable[[Leaves, int], dict[str, Any]]


class _Leaf(NamedTuple):
    """How a leaf of the larger network is computed from a leaf of the small one."""

    source: str
    params: Callable[[Any], Any] = lambda leaf: leaf
    moments: Callable[[Any, int], Any] = lambda leaf, power: leaf


def _growth(plan: Mapping[str, _Leaf]) -> Growth:
    def params(tree: Params) -> Params:
        leaves = _flat(tree)
        return traverse_util.unflatten_dict(
            {path: leaf.params(leaves[leaf.source]) for path, leaf in plan.items()}, "/"
        )

    def moments(leaves: Leaves, power: int) -> dict[str, Any]:
        return {path: leaf.moments(leaves[leaf.source], power) for path, leaf in plan.items() if leaf.source in leaves}

    return Growth(params, moments)


def _flat(tree: Params) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


def widen(
    params: Params,
    widths: int | Sequence[int],
    *,
    normalisation: Normalisation = "batch",
    noise: float = 0.0,
    key: jax.Array | None = None,
) -> Growth:
    """Net2WiderNet: copies units, and divides the weights that read a unit by its number of copies.

    With n old units, new unit j is a copy of unit `floor(j n / width)`. Copies are adjacent, and the numbers of copies
    differ by at most 1. Features of a `conv4` without a head are divided by the square root of the number of copies, so
    prototypes and nearest neighbours give the same predictions.

    Identical copies stay identical, because they get the same gradients. `noise` makes them differ. It sums to 0 over
    the weights with which a unit reads the copies of another, so the function still stays the same. No layer reads the
    last block of a `conv4` without a head. There the noise goes into the kernels of the copies, and the function stays
    the same up to the size of the noise.

    In a transformer, the hidden layers of the blocks become wider (`hidden`); the residual stream keeps its width.

    Args:
      params: parameters of `metajax.models.mlp`, `conv4`, `decoder`, `vit` or `encoder`; arrays or their shapes.
      widths: new widths of the hidden layers or blocks in order, or one for all; none may be below the old width. One
        number for a transformer.
      normalisation: the normalisation of `conv4`. Statistics of "layer" and "group" cover all channels, so all channels
        need the same number of copies: the widths must be multiples of the old ones.
      noise: standard deviation of the noise relative to that of the kernel; 0 adds none.
      key: PRNG key of the noise.

    Raises:
      ValueError: the parameters are of another network, the number of widths is not the number of layers, a width is
        below that of its layer or not a required multiple of it, the normalisation is unknown, or the noise is negative
        or has no key.

    Source: Chen, Goodfellow and Shlens 2016, Net2Net: Accelerating Learning via Knowledge Transfer, arXiv:1511.05641.

    >>> import jax, jax.numpy as jnp, metajax
    >>> small, large = metajax.models.mlp(1, hidden=(4, 4)), metajax.models.mlp(1, hidden=(6, 8))
    >>> params, inputs = small.init(jax.random.key(0), jnp.ones([1, 2])), jnp.ones([3, 2])
    >>> growth = metajax.models.widen(params, (6, 8), noise=0.1, key=jax.random.key(1))
    >>> bool(jnp.allclose(large.apply(growth.params(params), inputs), small.apply(params, inputs), atol=1e-6))
    True
    """
    _validate.one_of("normalisation", normalisation, _NORMALISATIONS)
    _validate.non_negative_float("noise", noise)
    if noise and key is None:
        raise ValueError(f"key must be given for a noise of {noise}, got None")
    leaves = _flat(params)
    if "blocks" in params:
        return _widen_blocks(leaves, widths, noise, key)
    layers = _layers(params)
    old = [leaves[f"{layer}/kernel"].shape[-1] for layer in layers]
    new = list(widths) if isinstance(widths, Sequence) else [widths] * len(old)
    if len(new) != len(old):
        raise ValueError(f"widths must hold one width for each of the {len(old)} layers, got {widths!r}")
    uniform = layers[:1] == ["block_0"] and normalisation in ("layer", "group")
    for layer, before, after in zip(layers, old, new, strict=True):
        if _validate.positive_int("widths", after) < before or (uniform and after % before):
            told = f"a multiple of {before}" if uniform else f"at least {before}"
            raise ValueError(f"widths must be {told} for {layer}, got {after}")
    origins = [np.arange(after) * before // after for before, after in zip(old, new, strict=True)]
    plan = {path: _Leaf(path) for path in leaves}
    for index, layer in enumerate([*layers, "head"][: len(layers) + ("head" in params)]):
        inward = None if index == 0 else _Spread(origins[index - 1], -2, 1.0)
        unread = layer != "head" and index + 1 == len(layers) and "head" not in params
        for path in [path for path in leaves if path.startswith(f"{layer}/")]:
            kernel = path == f"{layer}/kernel"
            # features that no layer reads are divided where they are last scaled
            exponent = 0.5 if unread and (not kernel or normalisation == "none") else 0.0
            outward = None if layer == "head" else _Spread(origins[index], -1, exponent)
            blurred = outward if unread else inward
            spreads = [spread for spread in (inward if kernel else None, outward) if spread is not None]
            blur = None
            if kernel and noise and blurred is not None and key is not None:
                blur = _blur(blurred, noise, jax.random.fold_in(key, index))
            plan[path] = _spread(path, spreads, blur)
    return _growth(plan)


def _widen_blocks(leaves: Leaves, width: Any, noise: float, key: Any) -> Growth:
    """Widens the hidden layers of the blocks of a transformer."""
    _depth(leaves)  # refuses other parameters
    before = leaves["blocks/down/kernel"].shape[-2]
    if _validate.positive_int("widths", width) < before:
        raise ValueError(f"widths must be at least {before} for the hidden layers of the blocks, got {width}")
    origin = np.arange(width) * before // width
    read = _Spread(origin, -2, 1.0)
    plan = {path: _Leaf(path) for path in leaves}
    for path in leaves:
        if path.startswith(("blocks/up/", "blocks/gate/")):
            plan[path] = _spread(path, [_Spread(origin, -1, 0.0)], None)
    plan["blocks/down/kernel"] = _spread("blocks/down/kernel", [read], _blur(read, noise, key) if noise else None)
    return _growth(plan)


class _Spread(NamedTuple):
    """Replaces units along an axis by those of `origin`, each divided by its number of copies to an exponent.

    If c copies share a number x as x / c^e each, the gradient of each copy is g / c^(1 - e).
    """

    origin: np.ndarray
    axis: int
    exponent: float

    def __call__(self, leaf: Any, exponent: float) -> Any:
        counts = np.bincount(self.origin)
        divisor = jnp.asarray(counts[self.origin] ** exponent, leaf.dtype)
        if self.axis == -1:
            return jnp.take(leaf, self.origin, -1) / divisor
        taken = jnp.take(_by_unit(leaf, len(counts)), self.origin, -2) / divisor[:, None]
        return taken.reshape(-1, leaf.shape[-1]) if leaf.ndim == 2 else taken


def _by_unit(kernel: Any, units: int) -> Any:
    """Reshapes a linear kernel to `[positions, units, outputs]`; units are the last axis of flattened features."""
    return kernel.reshape(-1, units, kernel.shape[-1]) if kernel.ndim == 2 else kernel


def _spread(path: str, spreads: Sequence[_Spread], blur: Callable[[Any], Any] | None) -> _Leaf:
    def params(leaf: Any) -> Any:
        new = leaf
        for spread in spreads:
            new = spread(new, spread.exponent)
        return new if blur is None else new + blur(new) * jnp.std(leaf)

    def moments(leaf: Any, power: int) -> Any:
        for spread in spreads:
            leaf = spread(leaf, (1 - spread.exponent) * power)
        return leaf

    return _Leaf(path, params, moments)


def _blur(spread: _Spread, noise: float, key: jax.Array) -> Callable[[Any], Any]:
    """Returns a function that draws noise for a widened kernel, with mean 0 over the copies of each unit."""
    alike = spread.origin[:, None] == spread.origin

    def make(leaf: Any) -> Any:
        drawn = noise * jax.random.normal(key, leaf.shape, leaf.dtype)
        mean = jnp.asarray(alike / alike.sum(1), leaf.dtype)
        if spread.axis == -1:
            return drawn - drawn @ mean
        drawn = _by_unit(drawn, len(alike))
        return (drawn - mean @ drawn).reshape(leaf.shape)

    return make


def deepen(params: Params, after: int | Sequence[int]) -> Growth:
    """Net2DeeperNet: inserts layers that do not change the function.

    New `mlp` layers start as the identity; after a ReLU this leaves the function unchanged. A new transformer block
    starts as a copy of the block before it, with output projections of zero, so it adds nothing. The blocks of
    `encoder` end with a normalisation: the one of the previous block moves to the end of the new one.

    The moments of new leaves are 0. Under Adam, whose step count continues, their first step is up to 3.2 times as long
    as the rate.

    Args:
      params: parameters of `metajax.models.mlp`, `decoder`, `vit` or `encoder`; arrays or their shapes.
      after: index of the layer after which a new one is inserted, from 0, or several; a number that occurs twice
        inserts two.

    Raises:
      ValueError: the parameters are of another network, or `after` is not the index of a layer.

    Source: Chen, Goodfellow and Shlens 2016, arXiv:1511.05641; for blocks, Gong et al. 2019, Efficient Training of BERT
      by Progressively Stacking, PMLR 97, whose copying is `stack_blocks`.

    >>> import jax, jax.numpy as jnp, metajax
    >>> small, large = (metajax.models.decoder(100, width=16, depth=depth, heads=4) for depth in (2, 4))
    >>> tokens = jnp.arange(10).reshape(2, 5)
    >>> params = small.init(jax.random.key(0), tokens)
    >>> growth = metajax.models.deepen(params, (0, 1))
    >>> bool(jnp.allclose(large.apply(growth.params(params), tokens), small.apply(params, tokens), atol=1e-5))
    True
    """
    several = list(after) if isinstance(after, Sequence) else [after]
    leaves, layers = _flat(params), [] if "blocks" in params else _layers(params, ("layer",))
    depth = len(layers) or _depth(leaves)
    for place in several:
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < depth:
            raise ValueError(f"after must hold numbers of layers, from 0 to {depth - 1}, got {after!r}")
    origin = np.array(sorted([*range(depth), *several]), int)
    fresh = np.append(False, origin[1:] == origin[:-1])
    if layers:
        plan = {path: _Leaf(path) for path in leaves if path.startswith("head/")}
        for index, (old, new) in enumerate(zip(origin, fresh, strict=True)):
            for name in ("kernel", "bias"):
                plan[f"layer_{index}/{name}"] = (
                    _identity(f"layer_{old}/bias", name) if new else _Leaf(f"layer_{old}/{name}")
                )
        return _growth(plan)
    last = np.append(origin[1:] != origin[:-1], True)  # the last row that comes from each block
    plan = {}
    for path in leaves:
        part, name = path.split("/")[1:3] if path.startswith("blocks/") else ("", "")
        if not part:
            plan[path] = _Leaf(path)
        elif part in ("out", "down"):
            plan[path] = _rows(path, origin, ~fresh, 0.0)
        elif part in ("attention_norm", "mlp_norm") and "embed_norm/scale" in leaves:
            # normalising again with scale 1 and bias 0 changes nothing
            kept = last if part == "mlp_norm" else ~fresh
            plan[path] = _rows(path, origin, kept, 1.0 if name == "scale" else 0.0)
        else:
            plan[path] = _rows(path, origin, ~fresh, None)
    return _growth(plan)


def stack_blocks(params: Params, depth: int) -> Growth:
    """Stacks copies of all blocks (Gong et al. 2019). The function changes, and the moments are copied.

    Args:
      params: parameters of `metajax.models.decoder`, `vit` or `encoder`; arrays or their shapes.
      depth: new number of blocks, at least the old number; block i is a copy of the old block `i mod old depth`.

    Raises:
      ValueError: the parameters are of another network, or the depth is below the old one.

    Source: Gong et al. 2019, Efficient Training of BERT by Progressively Stacking, PMLR 97.

    >>> import jax, jax.numpy as jnp, metajax
    >>> model = metajax.models.vit(5, patch=7, width=16, depth=2, heads=4)
    >>> params = model.init(jax.random.key(0), jnp.ones([1, 28, 28, 1]))
    >>> metajax.models.stack_blocks(params, 4).params(params)["blocks"]["out"]["kernel"].shape
    (4, 16, 16)
    """
    leaves = _flat(params)
    old = _depth(leaves)
    _validate.int_at_least("depth", depth, old)
    origin = np.arange(depth) % old
    everything = np.ones(depth, bool)
    return _growth({p: _rows(p, origin, everything, None) if p.startswith("blocks/") else _Leaf(p) for p in leaves})


def _identity(bias: str, name: str) -> _Leaf:
    """A leaf of a layer that is the identity; `bias` is the path of a bias of the same width."""

    def zeros(leaf: Any, power: int = 1) -> Any:
        del power
        return jnp.zeros(leaf.shape * (2 if name == "kernel" else 1), leaf.dtype)

    return _Leaf(bias, lambda leaf: jnp.eye(len(leaf), dtype=leaf.dtype) if name == "kernel" else zeros(leaf), zeros)


def _rows(path: str, origin: np.ndarray, kept: np.ndarray, fill: float | None) -> _Leaf:
    """A leaf `[depth, ...]` of a stack, made of rows of the old one. Rows that are not `kept` hold `fill`, if it is
    given, and have no moments."""

    def masked(leaf: Any, value: float) -> Any:
        rows = jnp.take(leaf, origin, 0)
        return jnp.where(kept.reshape(-1, *[1] * (leaf.ndim - 1)), rows, jnp.asarray(value, leaf.dtype))

    def params(leaf: Any) -> Any:
        return jnp.take(leaf, origin, 0) if fill is None else masked(leaf, fill)

    return _Leaf(path, params, lambda leaf, power: masked(leaf, 0.0))


def _layers(params: Params, kinds: Sequence[str] = ("layer", "block")) -> list[str]:
    """Returns the names of the hidden layers of an `mlp`, or of the blocks of a `conv4`."""
    groups = params if isinstance(params, Mapping) else {}
    inside = {"layer": ["bias", "kernel"], "block": ["kernel", "norm"]}
    for kind in kinds:
        names = [f"{kind}_{index}" for index in range(len([name for name in groups if re.match(rf"{kind}_\d", name)]))]
        if names and set(names) == set(groups) - {"head"} and all(sorted(groups[n]) == inside[kind] for n in names):
            return names
    raise ValueError(
        "params must be those of metajax.models.mlp with a hidden layer, or of "
        f"{'conv4' if len(kinds) > 1 else 'decoder, vit or encoder'}, got a tree of {sorted(groups)}"
    )


def _depth(leaves: Leaves) -> int:
    """Returns the number of blocks of a transformer."""
    blocks = {path: leaf for path, leaf in leaves.items() if path.startswith("blocks/")}
    names = {tuple(path.split("/")[1:]) for path in blocks}
    plain = all(len(name) == 2 and name[0] in _BLOCK and name[1] in ("kernel", "bias", "scale") for name in names)
    if not blocks or not plain:
        found = sorted({path.split("/")[0] for path in leaves} if not blocks else {"/".join(name) for name in names})
        raise ValueError(f"params must be those of a decoder, vit or encoder without adapters, got a tree of {found}")
    return next(iter(blocks.values())).shape[0]


def grow_state(
    state: MetaState, growth: Growth, outer: OuterUpdate, episode: Episode, *, frozen: Params = None
) -> MetaState:
    """Grows the state of a training run: the parameters, and the optimizer state for them.

    The moments of the optimizer become the ones it would have if the earlier gradients had been those of the large
    network: if c copies of a unit share its function, each gets 1 / c of its gradient. The rest of the optimizer state,
    such as the step count, is kept, and so are the step and the key. States of a persistent estimator start anew.

    Args:
      state: state of the small network.
      growth: made for `state.params`, merged with the frozen base.
      outer: the meta step of the large network, with an optimizer like that of the small one.
      episode: one episode, without a task axis.
      frozen: the frozen base that belongs to `state`, or None. `growth` is then made for both merged, and
        `grow_frozen` returns the base that belongs to the result.

    Raises:
      ValueError: the optimizer keeps a value for the parameters that is not known to be a mean of their gradients or
        squared gradients, as in Adam, RMSProp, Adagrad, Lion and momentum.

    >>> import jax, jax.numpy as jnp, optax, metajax
    >>> learner = metajax.learners.maml(metajax.models.mlp(2, hidden=(4,)), inner=optax.sgd(0.1))
    >>> outer = metajax.outer_update(learner, optax.adam(1e-3), hypergrad=metajax.hypergrad.mixed_mode())
    >>> examples = metajax.Examples(jnp.eye(4), jnp.array([0, 0, 1, 1]), jnp.ones(4, bool))
    >>> episode = metajax.Episode(examples, examples)
    >>> state = outer.init(jax.random.key(0), episode)
    >>> large = metajax.learners.maml(metajax.models.mlp(2, hidden=(6,)), inner=optax.sgd(0.1))
    >>> outer = metajax.outer_update(large, optax.adam(1e-3), hypergrad=metajax.hypergrad.mixed_mode())
    >>> growth = metajax.models.widen(state.params, 6)
    >>> metajax.models.grow_state(state, growth, outer, episode).opt_state[0].mu["layer_0"]["bias"].shape
    (6,)
    """
    _validate.instance("growth", growth, Growth)
    _validate.instance("outer", outer, OuterUpdate)
    states = jax.tree.leaves(state.hypergrad_state)
    tasks = {"num_tasks": states[0].shape[0]} if states else {}
    params, frozen = _grown(state, growth, frozen)
    fresh = outer.init(state.key, episode, params, frozen=frozen, **tasks)
    shapes = {path: jnp.shape(leaf) for path, leaf in _with_paths(state.params)}
    carried: dict[str, Any] = {}
    copies: dict[str, dict[str, Any]] = {}  # leaves for parameters, by the field that holds them
    for path, leaf in _with_paths(state.opt_state):
        place, own = _parameter(path, shapes)
        if own is None:
            carried[path] = leaf
        else:
            copies.setdefault(place, {})[own] = leaf
    for place, leaves in copies.items():
        power = _POWERS.get(place.rsplit("/", 1)[-1])
        if power is None or any(jnp.shape(leaf) != shapes[own] for own, leaf in leaves.items()):
            raise ValueError(
                f"state.opt_state must hold moments of the gradients of whole parameters, in fields called "
                f"{', '.join(_POWERS)}, got {place!r}"
            )
        carried |= {f"{place}/{own}": leaf for own, leaf in growth.moments(leaves, power).items()}
    filled = [carried.get(path, leaf) for path, leaf in _with_paths(fresh.opt_state)]
    opt_state = jax.tree.unflatten(jax.tree.structure(fresh.opt_state), filled)
    return fresh._replace(opt_state=opt_state, step=state.step, key=state.key)


def grow_frozen(state: MetaState, growth: Growth, frozen: Params) -> Params:
    """Returns the frozen base of the large network. Frozen leaves stay frozen, and new leaves are not part of it.

    Args:
      state: state of the small network, as for `grow_state`.
      growth: as for `grow_state`.
      frozen: the frozen base that belongs to `state`.

    >>> import jax, jax.numpy as jnp, metajax
    >>> params = metajax.models.mlp(2, hidden=(4,)).init(jax.random.key(0), jnp.ones([1, 3]))
    >>> growth = metajax.models.widen(params, 6)
    >>> trained, frozen = metajax.core.split(params, "head")
    >>> state = MetaState(trained, (), (), jnp.array(0), jax.random.key(0))
    >>> grow_frozen(state, growth, frozen)["layer_0"]["kernel"].shape
    (3, 6)
    """
    return _grown(state, growth, frozen)[1]


def _grown(state: MetaState, growth: Growth, frozen: Params) -> tuple[Params, Params]:
    """Returns the parameters of the large network: those of the state, and the frozen ones."""
    grown = growth.params(_tree.merge(state.params, frozen))
    if frozen is None:
        return grown, None
    base = set(_tree.paths(frozen))
    new_base = _tree.map_with_path(lambda path, leaf: leaf if path in base else None, grown)
    return _tree.without(grown, new_base), new_base


def _with_paths(tree: Any) -> list[tuple[str, Any]]:
    return list(zip(_tree.paths(tree), jax.tree.leaves(tree), strict=True))


def _parameter(path: str, parameters: Mapping[str, Any]) -> tuple[str, str | None]:
    """Splits a path into a field of the optimizer state and the parameter in it; None if it names no parameter."""
    parts = path.split("/")
    for index in range(1, len(parts)):
        if (own := "/".join(parts[index:])) in parameters:
            return "/".join(parts[:index]), own
    return path, None
