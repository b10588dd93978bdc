"""The rows of the contract table: small episodes, every learner, every estimator, in float64.

Tests import it by name (`tests/conftest.py` puts this folder on the path).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax import hypergrad, learners, models

WAYS = 4  # outputs of the models and length of the class mask; the last class is absent
PRESENT = 3
FEATURES = 5


class Row(NamedTuple):
    """A learner of the table.

    Attributes:
      learner: the learner.
      images: whether its inputs are images `[8, 8, 1]`, else vectors `[4]`.
      model: its network.
      rule: the inner optimizer, where the learner has an inner problem.
      adapts: what adapts, and `proximal`: the weight of the proximal term.
      rates: whether the updates of `rule` are multiplied by meta-parameters beside those of the network.
      beta: weight of the divergence where the parameters are a Gaussian, 0 where they are those of the network.
      class_axes: path of a parameter to the axis that counts classes.
    """

    learner: metajax.Learner
    images: bool = False
    model: metajax.Model | None = None
    rule: optax.GradientTransformation | None = None
    adapts: str | None = None
    proximal: float = 0.0
    rates: bool = False
    beta: float = 0.0
    class_axes: dict[str, int] = {}  # noqa: RUF012 - never written


_MLP = models.mlp(WAYS, hidden=(6,))
_BACKBONE = models.mlp(FEATURES, hidden=(6,))
_CONV = models.conv4(WAYS, width=4, depth=2, normalisation="support", form="lax")  # lax: half as long to compile
_SGD, _ADAM = optax.sgd(0.3), optax.adam(0.05, eps_root=1e-8)
_RULE = optax.adam(0.02, b1=0.0, eps_root=1e-8)
_HEAD = {"head/kernel": -1, "head/bias": 0}
_UNIT_SGD, _UNIT_ADAM = optax.sgd(1.0), optax.adam(1.0, eps_root=1e-8)

LEARNERS = {
    "maml": Row(learners.maml(_MLP, _SGD, 2), model=_MLP, rule=_SGD, class_axes=_HEAD),
    "maml_adam": Row(learners.maml(_MLP, _ADAM, 2), model=_MLP, rule=_ADAM, class_axes=_HEAD),
    "anil": Row(learners.maml(_MLP, _SGD, 2, adapts="head"), False, _MLP, _SGD, "head", class_axes=_HEAD),
    "maml_proximal": Row(learners.maml(_MLP, _SGD, 2, proximal=0.5), False, _MLP, _SGD, proximal=0.5, class_axes=_HEAD),
    "maml_support_statistics": Row(learners.maml(_CONV, _SGD, 2), True, _CONV, _SGD, class_axes=_HEAD),
    "meta_sgd": Row(
        learners.meta_sgd(_MLP, 0.3, 2),
        False,
        _MLP,
        _UNIT_SGD,
        rates=True,
        class_axes={f"{part}/{path}": axis for part in ("backbone", "rates") for path, axis in _HEAD.items()},
    ),
    "meta_sgd_steps": Row(
        learners.meta_sgd(_MLP, 0.3, 2, per="array", each_step=True, inner=_UNIT_ADAM, adapts="head"),
        False,
        _MLP,
        _UNIT_ADAM,
        "head",
        rates=True,
        class_axes={f"backbone/{path}": axis for path, axis in _HEAD.items()},
    ),
    "reptile": Row(learners.reptile(_MLP, _RULE, 3), model=_MLP, rule=_RULE, class_axes=_HEAD),
    "bayesian": Row(
        learners.bayesian(_MLP, _SGD, 2, adapts="head", beta=0.2, scale=0.5),
        False,
        _MLP,
        _SGD,
        "head",
        beta=0.2,
        class_axes={f"{part}/{path}": axis for part in ("mean", "log_scale") for path, axis in _HEAD.items()},
    ),
    "prototypical": Row(learners.prototypical(_BACKBONE)),
    "prototypical_cosine": Row(learners.prototypical(_BACKBONE, distance="cosine")),
    "finetune": Row(learners.finetune(_BACKBONE, optax.sgd(0.5), 3)),
    "finetune_cosine": Row(learners.finetune(_BACKBONE, optax.sgd(0.05), 3, head="cosine")),
    "pretrain": Row(learners.pretrain(_BACKBONE, WAYS), class_axes={"head/kernel": 0, "head/bias": 0}),
}

ESTIMATORS = {
    "unrolled": hypergrad.unrolled(),
    "unrolled_remat": hypergrad.unrolled(remat=True),
    "mixed_mode": hypergrad.mixed_mode(),
    "first_order": hypergrad.first_order(),
    "displacement": hypergrad.displacement(),
    "implicit": hypergrad.implicit(steps=80, tol=1e-12, ridge=1.0),
    "finite_difference": hypergrad.finite_difference(),
    "sama": hypergrad.sama(alpha=0.1),
}
EXACT = ("unrolled", "unrolled_remat", "mixed_mode")


def admits(row: Row, estimator: str) -> bool:
    """Whether the learner takes the estimator."""
    if estimator in ("implicit", "sama"):  # the inner loss must depend on the meta-parameters
        return row.proximal > 0 or row.adapts is not None
    return row.learner.problem is not None or estimator != "displacement"


PAIRS = [(name, estimator) for name, row in LEARNERS.items() for estimator in ESTIMATORS if admits(row, estimator)]


def few_by_default(cases: Iterable[Any], pick: Callable[..., bool]) -> list[Any]:
    """The cases of `pytest.mark.parametrize`, those that `pick` does not take marked slow."""
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*row, marks=[] if pick(*row) else [pytest.mark.slow]) for row in rows]


def in_default_run(name: str, estimator: str) -> bool:
    """Whether the default run holds the pair: each learner with one exact estimator, one learner with all of them.

    ANIL takes every estimator; Reptile's own is displacement.
    """
    return estimator == "mixed_mode" or name == "anil" or (name, estimator) == ("reptile", "displacement")


def examples(seed: int, kept: int, padding: int, *, images: bool = False, dtype: Any = np.float64) -> metajax.Examples:
    """Examples of three present classes and one absent one; the last `padding` rows are padding (zeros)."""
    rng = np.random.default_rng(seed)
    count = kept + padding
    targets = np.arange(count) % PRESENT
    shape = (8, 8, 1) if images else (4,)
    inputs = rng.normal(size=(count, *shape)) + targets.reshape(-1, *[1] * len(shape))
    mask = np.arange(count) < kept
    inputs[~mask], targets[~mask] = 0, 0
    present = np.arange(WAYS) < PRESENT
    return metajax.Examples(
        jnp.asarray(inputs, dtype), jnp.asarray(targets, jnp.int32), jnp.array(mask), jnp.array(present)
    )


def episode(row: Row, seed: int = 0, *, padding: int = 2, dtype: Any = np.float64) -> metajax.Episode:
    """Six support and seven query examples, and `padding` more rows in each."""
    return metajax.Episode(
        examples(2 * seed, 6, padding, images=row.images, dtype=dtype),
        examples(2 * seed + 1, 7, padding, images=row.images, dtype=dtype),
    )


def parameters(row: Row, seed: int = 0, *, dtype: Any = np.float64) -> Any:
    """Meta-parameters at a point where nothing is special (no zero bias, no unit scale)."""
    start = row.learner.init(jax.random.key(seed), episode(row).support.inputs)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.3 * rng.normal(size=leaf.shape), dtype), start)


@functools.cache
def world(name: str) -> tuple[Row, Any, metajax.Episode]:
    """A row, and the parameters and the episode that it is tested at."""
    row = LEARNERS[name]
    return row, parameters(row), episode(row)


def quadratic(seed: int = 0) -> tuple[metajax.Episode, list[Any], list[Any], Any]:
    """A regression task, the Hessians and slopes (at zero) of its support and query loss, and a start."""
    rng = np.random.default_rng(seed)
    inputs, targets = rng.normal(size=(2, 7, 3)), rng.normal(size=(2, 7, 1))
    pairs = list(zip(inputs, targets, strict=True))
    parts = [metajax.Examples(jnp.array(x), jnp.array(y), jnp.ones(7, bool)) for x, y in pairs]
    hessians, slopes = [2 * x.T @ x / 7 for x in inputs], [2 * x.T @ y / 7 for x, y in pairs]
    return metajax.Episode(*parts), hessians, slopes, rng.normal(size=(3, 1))


def spoil_padding(episode: metajax.Episode, inputs: float, targets: int) -> metajax.Episode:
    """The episode with other values in its padding."""

    def spoil(part: metajax.Examples) -> metajax.Examples:
        kept = np.asarray(part.mask)
        values, labels = np.array(part.inputs), np.array(part.targets)
        values[~kept], labels[~kept] = inputs, targets
        return part._replace(inputs=jnp.array(values), targets=jnp.array(labels))

    return metajax.Episode(*(spoil(part) for part in episode))


def with_nan(part: metajax.Examples, rows: Any) -> metajax.Examples:
    """Examples whose inputs are NaN in some rows."""
    return part._replace(inputs=jnp.where(rows[:, None], jnp.nan, part.inputs))


def stack(episodes: list[metajax.Episode]) -> metajax.Episode:
    """A batch of tasks."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *episodes)


def distances(tree: Any, other: Any) -> dict[str, float]:
    """The largest difference in each leaf, by path."""
    largest = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), tree, other)
    return {path_name(path): distance for path, distance in jax.tree.leaves_with_path(largest)}


def first_step(learner: metajax.Learner, estimator: metajax.Hypergrad) -> Any:
    """The first outer step of any estimator: `(meta_params, episode, *, key=None) -> ((loss, aux), grads)`."""

    def step(meta_params: Any, episode: metajax.Episode, *, key: Any = None) -> Any:
        init_key, key = (None, None) if key is None else jax.random.split(key)
        state = estimator.init(learner, meta_params, episode, init_key)
        value, grads, _ = estimator.value_and_grad(learner, meta_params, state, episode, key=key)
        return value, grads

    return step


@functools.cache
def compiled(name: str, estimator: str) -> Any:
    """The jitted one-task primitive of a pair, shared by all tests."""
    return jax.jit(hypergrad.value_and_grad(LEARNERS[name].learner, ESTIMATORS[estimator]))


@functools.cache
def outer_loss(name: str) -> Any:
    """The jitted `(meta_params, episode) -> loss` of a learner, without any estimator."""
    learner = LEARNERS[name].learner

    @jax.jit
    def loss(meta_params: Any, episode: metajax.Episode) -> Any:
        return learner.outer_loss(learner.adapt(meta_params, episode.support), meta_params, episode.query)[0]

    return loss


def temporary_bytes(function: Any, *arguments: Any) -> int:
    """Bytes of temporaries of a jitted function, as the compiler counts them."""
    return function.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def bytes_by_steps(estimator: Any, rule: optax.GradientTransformation) -> list[int]:
    """Temporaries of an estimator at 4 and at 400 inner steps of a small network with a proximal term."""
    model = models.mlp(WAYS, hidden=(32,))
    part = examples(0, 200, 0, dtype=np.float32)
    params = model.init(jax.random.key(0), part.inputs)
    several = [learners.maml(model, rule, steps, proximal=1.0) for steps in (4, 400)]
    return [
        temporary_bytes(jax.jit(hypergrad.value_and_grad(learner, estimator)), params, metajax.Episode(part, part))
        for learner in several
    ]


def finite_difference(function: Any, point: Any, direction: Any, step: float = 3e-6) -> float:
    """Central difference of fourth order along a direction."""

    def at(distance: float) -> float:
        return float(function(jax.tree.map(lambda x, d: x + distance * d, point, direction)))

    return (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)


def random_direction(tree: Any, seed: int) -> Any:
    """A random unit vector in the space of a tree."""
    rng = np.random.default_rng(seed)
    draws = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), tree)
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(draws)))
    return jax.tree.map(lambda leaf: leaf / norm, draws)


def dot(a: Any, b: Any) -> float:
    """Inner product of two trees."""
    return float(sum(np.sum(np.asarray(x) * np.asarray(y)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)))


def relative_distance(a: Any, b: Any) -> float:
    """`|a - b| / |b|` over two trees of one structure."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    difference = jax.tree.map(lambda x, y: np.asarray(x, np.float64) - np.asarray(y, np.float64), a, b)
    return (dot(difference, difference) / max(dot(b, b), 1e-300)) ** 0.5


def path_name(path: Any) -> str:
    """`head/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


class LastStep(NamedTuple):
    """The end of an inner loop.

    Attributes:
      before: `(meta_params) -> the fast weights before the last step`, the inner gradients being constant.
      fast: and after it.
      of_end: gradient of the outer loss with respect to `fast`.
      of_before: the part of it that reaches `before` past the inner gradient of the last step.
      direct: gradient of the outer loss with respect to the meta-parameters, `fast` being constant.
      of_slope: the part of it that reaches the inner gradient of the last step.
      of_rule: the part of its gradient that goes through what the last update reads of the meta-parameters.
      difference: `(point, distance)`, the central difference of the inner gradients (with respect to fast weights and
        meta-parameters) along what the last step makes of `of_end`.
    """

    before: Callable[[Any], Any]
    fast: Any
    of_end: Any
    of_before: Any
    direct: Any
    of_slope: Any
    of_rule: Any
    difference: Any


def last_step(name: str) -> LastStep:
    """What the biased estimators take at the end of the inner loop, without that loop or an estimator."""
    row, params, task = world(name)
    problem, outer_loss = row.learner.problem, row.learner.outer_loss
    slope = jax.jit(jax.grad(lambda fast, meta: problem.loss(fast, meta, task.support, 0, None), argnums=(0, 1)))
    fast = problem.init(params, task.support, None)
    rule_state = row.rule.init(fast)

    def update(fast, grads, meta, rule_state, step):
        change, rule_state = row.rule.update(grads, rule_state, fast)
        if row.rates:
            change = jax.tree.map(lambda value, rate: value * rate_at(value, rate, step), change, meta["rates"])
        return optax.apply_updates(fast, change), rule_state

    taken = []
    for step in range(problem.num_steps):
        before, before_state = fast, rule_state
        taken.append(slope(fast, params)[0])
        fast, rule_state = update(fast, taken[-1], params, rule_state, step)

    def reach(meta):
        point = problem.init(meta, task.support, None)
        point_state = row.rule.init(point)
        for step, grads in enumerate(taken[:-1]):
            point, point_state = update(point, grads, meta, point_state, step)
        return point

    def outer(fast, meta):
        return outer_loss(problem.finalize(fast, meta, task.support, None), meta, task.query)[0]

    of_end, direct = jax.jit(jax.grad(outer, argnums=(0, 1)))(fast, params)
    last = lambda *inputs: update(*inputs, before_state, problem.num_steps - 1)[0]  # noqa: E731
    _, pull_back = jax.vjp(last, before, taken[-1], params)
    of_before, of_slope, of_rule = pull_back(of_end)

    def difference(point, distance):
        scale = distance / optax.tree.norm(of_slope)
        above, below = (slope(optax.tree.add_scale(point, sign * scale, of_slope), params) for sign in (1, -1))
        return jax.tree.map(lambda a, b: (a - b) / (2 * scale), above, below)

    return LastStep(reach, fast, of_end, of_before, direct, of_slope, of_rule, difference)


def rate_at(change: Any, rate: Any, step: int) -> Any:
    """The rate of an array in a step: of each weight, or one of each step."""
    return rate if rate.shape == change.shape else rate[step]


WITHOUT_PROBLEM = [name for name, row in LEARNERS.items() if row.learner.problem is None]


def trace(name: str, estimator: metajax.Hypergrad) -> None:
    """Traces an estimator on a row, which is when it refuses a learner."""
    row = LEARNERS[name]
    jax.eval_shape(first_step(row.learner, estimator), parameters(row), episode(row))


@functools.cache
def by_hand(name: str, steps: int | None = None, seed: int = 0) -> tuple[Any, Any, Any]:
    """`loop_by_hand` at the base point of a row, on the task of a seed."""
    row = LEARNERS[name]
    steps = row.learner.problem.num_steps if steps is None else steps
    return loop_by_hand(row, parameters(row), episode(row, seed), steps)


def loop_by_hand(row: Row, meta_params: Any, episode: metajax.Episode, steps: int) -> tuple[Any, Any, Any]:
    """Learners with an inner loop as a loop in Python, without the learner, the inner loop or an estimator.

    Padding rows are cut off and the loss is written out. Returns the adapted weights (all of them), the gradient
    of the query loss there (through support statistics) as adapted and meta-parameters move together, and the
    displacement.
    """
    picks = lambda path: (row.adapts is None or row.adapts in path) and not path.startswith("rates/")  # noqa: E731
    flat = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(meta_params)}
    treedef = jax.tree.structure(meta_params)
    start = {path: leaf for path, leaf in flat.items() if picks(path)}

    def tree(weights: dict[str, Any]) -> Any:
        return jax.tree.unflatten(treedef, [weights[path] for path in flat])

    def network(params: Any) -> Any:
        return params["mean"] if row.beta else params["backbone"] if row.rates else params

    def rate(weights: dict[str, Any], path: str, change: Any, step: int) -> Any:
        return rate_at(change, weights[path.replace("backbone", "rates")], step) if row.rates else 1.0

    def cut(part: metajax.Examples) -> tuple[Any, Any]:
        kept = np.asarray(part.mask)
        return part.inputs[kept], np.asarray(part.targets)[kept]

    def apply(weights: dict[str, Any], inputs: Any, stats: Any = None) -> tuple[Any, Any]:
        parameters = network(tree(weights))
        if "stats" in row.model.needs:
            return row.model.apply(parameters, inputs, mask=None, stats=stats)
        return row.model.apply(parameters, inputs), None

    def loss(weights: dict[str, Any], inputs: Any, targets: Any, stats: Any = None) -> Any:
        logits = apply(weights, inputs, stats)[0][:, :PRESENT]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - logits[np.arange(len(targets)), targets])

    def divergence(weights: dict[str, Any], prior: dict[str, Any]) -> Any:
        """Of the Gaussians; 0 without."""
        total = 0.0
        for path in [path for path in weights if path.startswith("log_scale")]:
            ratio, mean = jnp.exp(2 * (weights[path] - prior[path])), path.replace("log_scale", "mean")
            moved = (weights[mean] - prior[mean]) ** 2 / jnp.exp(2 * prior[path])
            total += 0.5 * jnp.sum(ratio + moved - 1 - jnp.log(ratio))
        return total

    def support_loss(fast: dict[str, Any]) -> Any:
        away = sum(jnp.sum((fast[path] - start[path]) ** 2) for path in fast)
        regulariser = 0.5 * row.proximal * away + row.beta * divergence(fast, start)
        return loss({**flat, **fast}, *cut(episode.support)) + regulariser

    fast, rule_state = start, row.rule.init(start)
    slope = jax.jit(jax.grad(support_loss))
    changes = []
    for step in range(steps):
        change, rule_state = row.rule.update(slope(fast), rule_state, fast)
        changes.append(change)
        fast = {path: fast[path] + rate(flat, path, change[path], step) * change[path] for path in fast}
    adapted = {**flat, **fast}
    moved = {path: adapted[path] - flat[path] for path in flat}

    def query_loss(prior: dict[str, Any]) -> Any:
        weights = dict(prior)
        for step, change in enumerate(changes):
            for path, value in change.items():
                weights[path] += rate(prior, path, value, step) * value
        value = loss(weights, *cut(episode.query), apply(weights, cut(episode.support)[0])[1])
        return value + row.beta * divergence(weights, prior)

    return (
        network(tree(adapted)) if row.rates else tree(adapted),
        tree(jax.jit(jax.grad(query_loss))(flat)),
        tree({path: -moved[path] for path in flat}),
    )


def word_tokenizer(size):
    """A tokenizer of `size` words: [UNK], w1, w2 and so on, whose tokens are their numbers."""
    import tokenizers

    vocab = {"[UNK]": 0, **{f"w{number}": number for number in range(1, size)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made
