"""Signatures of the functions of the contract, for type checkers.

Arguments are positional, so that a user's function may choose their names. Return types are checked; trees of arrays
are `Any`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import jax
import optax

if TYPE_CHECKING:
    from metajax.core._types import Aux, Collected, Episode, Examples, Learner, MetaState, PartialSums, PerTask

Key = jax.Array | None


class Loss(Protocol):
    """`(outputs, targets) -> [n]`, one number for each example."""

    def __call__(self, outputs: Any, targets: Any, /) -> jax.Array: ...


class ModelInit(Protocol):
    """`(key, inputs) -> params`."""

    def __call__(self, key: Any, inputs: Any, /) -> Any: ...


class ModelApply(Protocol):
    """`(params, inputs, **needed) -> outputs`."""

    def __call__(self, params: Any, inputs: Any, /, *args: Any, **kwargs: Any) -> Any: ...


class InnerInit(Protocol):
    """`(meta_params, support, key) -> params`, and `context=` if the problem has one."""

    def __call__(self, meta_params: Any, support: Examples, key: Any, /, *args: Any, **kwargs: Any) -> Any: ...


class InnerLoss(Protocol):
    """`(params, meta_params, support, step, key) -> scalar`, or `(scalar, carry)` if the problem has a carry.

    The keywords `data=`, `carry=` and `context=` are passed if the problem has these fields.
    """

    def __call__(
        self, params: Any, meta_params: Any, support: Examples, step: Any, key: Any, /, *args: Any, **kwargs: Any
    ) -> jax.Array | tuple[jax.Array, Any]: ...


class InnerRule(Protocol):
    """`(meta_params) -> optax transform`."""

    def __call__(self, meta_params: Any, /) -> optax.GradientTransformation: ...


class Finalize(Protocol):
    """`(params, meta_params, support, key) -> adapted`; `carry=` and `context=` if the problem has these fields."""

    def __call__(
        self, params: Any, meta_params: Any, support: Examples, key: Any, /, *args: Any, **kwargs: Any
    ) -> Any: ...


class OfSupport(Protocol):
    """`(meta_params, support, key) -> tree`."""

    def __call__(self, meta_params: Any, support: Examples, key: Any, /) -> Any: ...


class Adapt(Protocol):
    """`(meta_params, support, *, num_steps=None, key=None) -> adapted`."""

    def __call__(
        self, meta_params: Any, support: Examples, /, *, num_steps: int | None = None, key: Any = None
    ) -> Any: ...


class Predict(Protocol):
    """`(adapted, inputs, *, mask=None, key=None) -> outputs`."""

    def __call__(self, adapted: Any, inputs: Any, /, *, mask: Any = None, key: Any = None) -> Any: ...


class OuterLoss(Protocol):
    """`(adapted, meta_params, query, *, key=None) -> (scalar, aux)`; `inner_losses=` if the objective reads them."""

    def __call__(
        self, adapted: Any, meta_params: Any, query: Examples, /, *args: Any, **kwargs: Any
    ) -> tuple[jax.Array, Aux]: ...


class UpdateState(Protocol):
    """`(meta_params, averaged, collected) -> meta_params`."""

    def __call__(self, meta_params: Any, averaged: Any, collected: Collected, /) -> Any: ...


class EstimatorInit(Protocol):
    """`(learner, meta_params, episode, key, *, frozen=None) -> state`."""

    def __call__(
        self, learner: Learner, meta_params: Any, episode: Episode, key: Any, /, *, frozen: Any = None
    ) -> Any: ...


class ValueAndGrad(Protocol):
    """`(learner, meta_params, state, episode, *, key=None, frozen=None) -> ((loss, aux), grads, state)`."""

    def __call__(
        self, learner: Learner, meta_params: Any, state: Any, episode: Episode, /, *, key: Any = None,
        frozen: Any = None,
    ) -> tuple[tuple[jax.Array, Aux], Any, Any]: ...  # fmt: skip


class OuterInit(Protocol):
    """`(key, episode, params=None, *, frozen=None, num_tasks=1) -> MetaState`."""

    def __call__(
        self, key: jax.Array, episode: Any, /, params: Any = None, *, frozen: Any = None, num_tasks: int = 1
    ) -> MetaState: ...


class Update(Protocol):
    """`(state, episodes, frozen=None) -> (state, metrics)`."""

    def __call__(self, state: MetaState, episodes: Any, /, frozen: Any = None) -> tuple[MetaState, dict[str, Any]]: ...


class MakePartialSums(Protocol):
    """`(state, episodes, frozen=None, axes=()) -> (sums, per_task)`."""

    def __call__(
        self, state: MetaState, episodes: Any, frozen: Any = None, axes: tuple[str, ...] = (), /
    ) -> tuple[PartialSums, PerTask]: ...


class ApplyUpdates(Protocol):
    """`(state, sums, per_task, frozen=None) -> (state, metrics)`."""

    def __call__(
        self, state: MetaState, sums: PartialSums, per_task: PerTask, frozen: Any = None, /
    ) -> tuple[MetaState, dict[str, Any]]: ...
