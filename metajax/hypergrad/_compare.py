"""Comparison of estimators on a given learner: bias, memory and time of each."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metajax.core import _cost, _validate
from metajax.core._types import Episode, Hypergrad, Learner, Params
from metajax.hypergrad._displacement import displacement
from metajax.hypergrad._explicit import first_order, mixed_mode, unrolled
from metajax.hypergrad._finite_difference import finite_difference, sama
from metajax.hypergrad._implicit import implicit
from metajax.hypergrad._primitive import value_and_grad
from metajax.hypergrad._truncated import truncated

EXACT: dict[str, Callable[[int], Hypergrad]] = {  # by the number of inner steps
    "mixed_mode": lambda steps: mixed_mode(),
    "mixed_mode(every=1)": lambda steps: mixed_mode(every=1),
    "unrolled": lambda steps: unrolled(),
    "unrolled(remat=True)": lambda steps: unrolled(remat=True),
    "unrolled(remat=True, block=sqrt)": lambda steps: unrolled(remat=True, block=max(1, math.isqrt(steps))),
}
_OTHERS: dict[str, Callable[[int], Hypergrad]] = {
    "truncated(1)": lambda steps: truncated(1),
    "first_order": lambda steps: first_order(),
    "displacement": lambda steps: displacement(),
    "implicit": lambda steps: implicit(),
    "finite_difference": lambda steps: finite_difference(),
    "sama": lambda steps: sama(),
}


class Row(NamedTuple):
    """Measurements of one estimator.

    Attributes:
      name: the call that creates the estimator.
      cosine: cosine of the angle between its hypergradient and the exact one; NaN if one of them is zero.
      error: norm of their difference divided by the norm of the exact one.
      temporary_bytes: temporary memory of the compiled program, as reported by the compiler.
      flops: floating-point operations of the program, matrix products and convolutions counted in full.
      seconds: median of the timed calls.
      refused: the reason why the estimator does not accept the learner (the numbers are then NaN), else None.

    >>> Row("first_order", 0.9, 0.4, 1000, 2e6, 0.01).refused is None
    True
    """

    name: str
    cosine: float = math.nan
    error: float = math.nan
    temporary_bytes: float = math.nan
    flops: float = math.nan
    seconds: float = math.nan
    refused: str | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The rows of `compare`; `str` returns the table.

    >>> print(Comparison((Row("unrolled", 1.0, 0.0, 2e6, 3e9, 0.5), Row("displacement", refused="no inner problem"))))
    estimator     cosine  rel. error  temporary MB     GFLOP   seconds
    unrolled      1.0000     0.0e+00           2.0      3.00    0.5000
    displacement  refused: no inner problem
    """

    rows: tuple[Row, ...]

    def __getitem__(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def __str__(self) -> str:
        wide = max(len(row.name) for row in self.rows)
        lines = [f"{'estimator':<{wide}}  cosine  rel. error  temporary MB     GFLOP   seconds"]
        for row in self.rows:
            if row.refused is not None:
                lines.append(f"{row.name:<{wide}}  refused: {row.refused}")
                continue
            lines.append(
                f"{row.name:<{wide}}  {row.cosine:6.4f}  {row.error:10.1e}  {row.temporary_bytes / 1e6:12.1f}  "
                f"{row.flops / 1e9:8.2f}  {row.seconds:8.4f}"
            )
        return "\n".join(lines)


def compare(
    learner: Learner,
    episodes: Episode,
    *,
    params: Params | None = None,
    estimators: Mapping[str, Hypergrad] | None = None,
    seed: int = 0,
    repeats: int = 3,
) -> Comparison:
    """Runs each estimator on the same episodes and measures its error and its cost.

    The hypergradient is the mean over the tasks, which are vmapped. `mixed_mode` computes the exact one.

    Args:
      learner: any learner.
      episodes: leaves with a leading task axis.
      params: meta-parameters; by default those of `learner.init`.
      estimators: estimators by name; by default all that keep no state and need no further arguments: the exact ones,
        truncation to the last step, and the approximations. The table gives the reason for each estimator that does
        not accept the learner.
      seed: seed of `learner.init` and of the keys of the tasks.
      repeats: number of timed calls, after one untimed call.

    Returns:
      The rows, in order; `print` shows the table.

    Raises:
      ValueError: an argument has the wrong type.

    >>> import jax.numpy as jnp, optax, metajax
    >>> learner = metajax.learners.maml(metajax.models.mlp(outputs=2, hidden=()), optax.sgd(0.5), num_steps=3)
    >>> examples = metajax.Examples(jnp.eye(4)[None], jnp.array([[0, 0, 1, 1]]), jnp.ones([1, 4], bool))
    >>> some = {"unrolled": unrolled(), "first_order": first_order()}
    >>> found = compare(learner, metajax.Episode(examples, examples), estimators=some)
    >>> print(found)  # doctest: +ELLIPSIS
    estimator    cosine ...
    >>> found["unrolled"].error < 1e-5, found["first_order"].error > 0.01
    (True, True)
    """
    _validate.instance("learner", learner, Learner)
    _validate.positive_int("repeats", repeats)
    params, episode, keys = _start(learner, episodes, params, seed)
    steps = 1 if learner.problem is None else learner.problem.num_steps
    if estimators is None:
        estimators = {name: make(steps) for name, make in {**EXACT, **_OTHERS}.items()}
    arguments = (params, episodes, keys)
    exact = _flat(jax.jit(_mean(learner, mixed_mode()))(*arguments))
    rows = []
    for name, estimator in estimators.items():
        reason = _refusal(learner, estimator, params, episode)
        if reason is not None:
            rows.append(Row(name, refused=reason))
            continue
        function = _mean(learner, estimator)
        compiled = jax.jit(function).lower(*arguments).compile()
        sizes: Any = compiled.memory_analysis()
        found, seconds = _timed(compiled, arguments, repeats)
        norms = float(jnp.linalg.norm(found)), float(jnp.linalg.norm(exact))
        rows.append(
            Row(
                name,
                cosine=float(found @ exact) / (norms[0] * norms[1]) if all(norms) else math.nan,
                error=float(jnp.linalg.norm(found - exact)) / norms[1] if norms[1] else math.nan,
                temporary_bytes=sizes.temp_size_in_bytes,
                flops=_cost.flops(function, *arguments),
                seconds=seconds,
            )
        )
    return Comparison(tuple(rows))


@dataclasses.dataclass(frozen=True)
class Plan:
    """The choice of `plan`.

    Attributes:
      name: the call that creates the estimator; None if no exact one fits.
      estimator: the estimator; None if no exact one fits.
      memory_bytes: the available memory.
      rows: `(name, bytes, FLOPs)` of each exact estimator, fewest FLOPs first.

    >>> print(Plan(None, None, 10.0, (("unrolled", 2e6, 3e9),)))
    no exact estimator fits into 0.0 MB
    unrolled  2.0 MB  3.00 GFLOP
    """

    name: str | None
    estimator: Hypergrad | None
    memory_bytes: float
    rows: tuple[tuple[str, float, float], ...]

    def __str__(self) -> str:
        size = f"{self.memory_bytes / 1e6:.1f} MB"
        wide = max(len(name) for name, _, _ in self.rows)
        head = f"no exact estimator fits into {size}" if self.name is None else f"{self.name} fits into {size}"
        return "\n".join(
            [
                head,
                *(f"{name:<{wide}}  {count / 1e6:.1f} MB  {flops / 1e9:.2f} GFLOP" for name, count, flops in self.rows),
            ]
        )


def plan(
    learner: Learner, episode: Episode, memory_bytes: float, *, params: Params | None = None, seed: int = 0
) -> Plan:
    """Selects the exact estimator that costs the fewest operations among those that fit into memory.

    Compiles every exact estimator for one task, without running it, and compares `memory_bytes` with the bytes of
    arguments, results and temporaries in the memory analysis of the compiler. A meta step that runs its tasks one
    after the other needs the same memory, within 10 %, plus the state of the outer optimizer.

    Args:
      learner: any learner.
      episode: one task, without a task axis; values do not matter.
      memory_bytes: memory that the program may use.
      params: meta-parameters or their shapes; by default those of `learner.init`.
      seed: seed of `learner.init`.

    Returns:
      The choice and the table it is based on; `print` shows both.

    Raises:
      ValueError: an argument has the wrong type, or `memory_bytes` is not positive.

    >>> import jax.numpy as jnp, optax, metajax
    >>> learner = metajax.learners.maml(metajax.models.mlp(outputs=2), optax.sgd(0.5), num_steps=3)
    >>> examples = metajax.Examples(jnp.eye(4), jnp.array([0, 0, 1, 1]), jnp.ones(4, bool))
    >>> choice = plan(learner, metajax.Episode(examples, examples), memory_bytes=1e9)
    >>> choice.name is not None, len(choice.rows)
    (True, 5)
    """
    _validate.instance("learner", learner, Learner)
    _validate.positive_float("memory_bytes", float(memory_bytes))
    if params is None:
        params = jax.eval_shape(learner.init, jax.random.key(seed), episode.support.inputs)
    steps = 1 if learner.problem is None else learner.problem.num_steps
    found = []
    for name, make in EXACT.items():
        estimator = make(steps)
        function = value_and_grad(learner, estimator)
        sizes: Any = jax.jit(function).lower(params, episode).compile().memory_analysis()
        whole = sizes.temp_size_in_bytes + sizes.argument_size_in_bytes + sizes.output_size_in_bytes
        found.append((_cost.flops(function, params, episode), name, float(whole), estimator))
    found.sort(key=lambda entry: entry[0])  # stable: on a tie, the order of EXACT decides
    rows = tuple((name, size, flops) for flops, name, size, _ in found)
    for _, name, size, estimator in found:
        if size <= memory_bytes:
            return Plan(name, estimator, memory_bytes, rows)
    return Plan(None, None, memory_bytes, rows)


def _start(learner: Learner, episodes: Episode, params: Params | None, seed: int) -> tuple[Params, Episode, jax.Array]:
    init_key, task_key = jax.random.split(jax.random.key(seed))
    episode = jax.tree.map(lambda leaf: leaf[0], episodes)
    if params is None:
        params = learner.init(init_key, episode.support.inputs)
    return params, episode, jax.random.split(task_key, len(episodes.query.mask))


def _mean(learner: Learner, estimator: Hypergrad) -> Callable[..., Params]:
    one = value_and_grad(learner, estimator)

    def mean(params: Params, episodes: Episode, keys: jax.Array) -> Params:
        grads = jax.vmap(lambda episode, key: one(params, episode, key=key)[1])(episodes, keys)
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), grads)

    return mean


def _refusal(learner: Learner, estimator: Hypergrad, params: Params, episode: Episode) -> str | None:
    try:
        jax.eval_shape(value_and_grad(learner, estimator), params, episode)
    except ValueError as error:
        return str(error)
    return None


def _timed(compiled: Callable[..., Params], arguments: tuple[Any, ...], repeats: int) -> tuple[jax.Array, float]:
    found, seconds = jax.block_until_ready(compiled(*arguments)), []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - begin)
    return _flat(found), statistics.median(seconds)


def _flat(tree: Params) -> jax.Array:
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])
