"""The contract table: every learner with every estimator that it admits."""

from __future__ import annotations

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

import metajax
from metajax import hypergrad
from metajax.hypergrad import _explicit

pytestmark = pytest.mark.usefixtures("x64")
PAIRS = worlds.few_by_default(worlds.PAIRS, worlds.in_default_run)
# one of each kind: an inner loop, another rule, the mean of each class, a head that is fit, and no adaptation
KINDS = ("anil", "reptile", "prototypical", "finetune", "pretrain")
GRADIENT = [name for name, row in worlds.LEARNERS.items() if row.learner.problem is not None]


@functools.cache
def result(name, estimator):
    """The table's entry at the base point: ((loss, aux), grads) as computed under jit."""
    _, params, episode = worlds.world(name)
    return worlds.compiled(name, estimator)(params, episode)


# What each estimator promises. The checks take a gradient, so that a test below can hand them a wrong one.


def check_exact(name, grads):
    _, params, episode = worlds.world(name)
    loss = worlds.outer_loss(name)
    for seed in range(3):
        direction = worlds.random_direction(params, seed)
        expected = worlds.finite_difference(lambda point: loss(point, episode), params, direction)
        assert abs(expected) > 1e-4, "a direction without slope tests nothing"
        np.testing.assert_allclose(worlds.dot(grads, direction), expected, rtol=1e-6)


def check_first_order(name, grads):
    if worlds.LEARNERS[name].learner.problem is None:  # nothing is left out: it is the exact gradient
        return check_exact(name, grads)
    expected = worlds.by_hand(name)[1]
    assert worlds.relative_distance(grads, expected) < 1e-9


def check_displacement(name, grads, steps=None):
    expected = worlds.by_hand(name, steps)[2]
    assert worlds.relative_distance(grads, expected) < 1e-9


def check_implicit(name, grads, ridge=1.0):
    row, params, episode = worlds.world(name)
    end, problem = worlds.last_step(name), row.learner.problem
    flat, unravel = jax.flatten_util.ravel_pytree(end.fast)
    loss = lambda flat, meta: problem.loss(unravel(flat), meta, episode.support, 0, None)  # noqa: E731
    hessian = jax.jit(jax.hessian(loss))(flat, params)
    target = jax.flatten_util.ravel_pytree(end.of_end)[0]
    solution = np.linalg.solve(hessian + ridge * np.eye(len(hessian)), target)
    mixed = jax.jit(jax.grad(lambda meta: jax.grad(loss)(flat, meta) @ solution))(params)
    assert worlds.relative_distance(grads, jax.tree.map(jnp.subtract, end.direct, mixed)) < 1e-9


def check_finite_difference(name, grads):
    row, params, _ = worlds.world(name)
    if row.learner.problem is None:
        return check_exact(name, grads)
    end = worlds.last_step(name)
    before, pull_back = jax.vjp(end.before, params)
    of_fast, of_meta = end.difference(before, 0.01)
    (of_start,) = pull_back(jax.tree.map(jnp.add, end.of_before, of_fast))
    expected = jax.tree.map(lambda *parts: sum(parts), end.direct, end.of_rule, of_meta, of_start)
    assert worlds.relative_distance(grads, expected) < 1e-9


def check_sama(name, grads):
    end = worlds.last_step(name)
    of_meta = end.difference(end.fast, 0.1)[1]
    expected = jax.tree.map(lambda *parts: sum(parts), end.direct, end.of_rule, of_meta)
    assert worlds.relative_distance(grads, expected) < 1e-9


CHECKS = {
    "implicit": check_implicit,
    "finite_difference": check_finite_difference,
    "sama": check_sama,
    **dict.fromkeys(worlds.EXACT, check_exact),
    "first_order": check_first_order,
    "displacement": check_displacement,
}


@pytest.mark.parametrize(("name", "estimator"), PAIRS)
def test_gradient(name, estimator):
    (loss, aux), grads = result(name, estimator)
    row, params, episode = worlds.world(name)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    CHECKS[estimator](name, grads)
    np.testing.assert_allclose(loss, worlds.outer_loss(name)(params, episode), rtol=1e-12)
    assert aux.outputs.shape == (9, worlds.WAYS)
    if row.learner.problem is not None:
        assert aux.metrics["inner_loss"].shape == (row.learner.problem.num_steps,)


def altered_mixed_mode(change):
    """`mixed_mode`, its two products changed on their way out."""

    def gradient(loss):
        def scalar(*inputs):
            return loss(*inputs)[0]

        @jax.custom_vjp
        def value_and_slope(params, meta_params, *data):
            return jax.value_and_grad(scalar)(params, meta_params, *data)

        def backward(arguments, cotangents):
            params, meta_params, *data = arguments
            both = lambda params: jax.grad(scalar, argnums=(0, 1))(params, meta_params, *data)  # noqa: E731
            products = jax.jvp(both, (params,), (cotangents[1],))[1]
            return *change(*products), *([None] * len(data))

        value_and_slope.defvjp(lambda *arguments: (value_and_slope(*arguments), arguments), backward)

        def run(*inputs):
            value, grads = value_and_slope(*inputs)
            return (value, ()), (grads, value)

        return run

    return _explicit.explicit(metajax.core._inner.scan_loop(gradient))


def zero(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def minus(tree):
    return jax.tree.map(jnp.negative, tree)


def altered(estimator, change):
    """An estimator, its gradient changed."""

    def value_and_grad(*arguments, **keywords):
        value, grads, state = estimator.value_and_grad(*arguments, **keywords)
        return value, change(grads), state

    return metajax.Hypergrad(estimator.init, value_and_grad)


def gradient_of(name, estimator):
    row, params, episode = worlds.world(name)
    return jax.jit(hypergrad.value_and_grad(row.learner, estimator))(params, episode)[1]


def test_the_unaltered_copy_passes():
    check_exact("maml_proximal", gradient_of("maml_proximal", altered_mixed_mode(lambda h, m: (h, m))))


BROKEN = {
    "hessian product dropped": ("maml", check_exact, altered_mixed_mode(lambda h, m: (zero(h), m))),
    "hessian product turned": ("maml", check_exact, altered_mixed_mode(lambda h, m: (minus(h), m))),
    "mixed product dropped": ("maml_proximal", check_exact, altered_mixed_mode(lambda h, m: (h, zero(m)))),
    "mixed product turned": ("maml_proximal", check_exact, altered_mixed_mode(lambda h, m: (h, minus(m)))),
    "mixed product dropped, ANIL": ("anil", check_exact, altered_mixed_mode(lambda h, m: (h, zero(m)))),
    "first order for exact": ("maml", check_exact, hypergrad.first_order()),
    "first order for exact, Adam": ("maml_adam", check_exact, hypergrad.first_order()),
    "exact for first order": ("maml", check_first_order, hypergrad.unrolled()),
    "exact turned": ("maml", check_exact, altered(hypergrad.unrolled(), minus)),
    "first order turned": ("anil", check_first_order, altered(hypergrad.first_order(), minus)),
    "displacement turned": ("reptile", check_displacement, altered(hypergrad.displacement(), minus)),
    "displacement of one step more": (
        "reptile", functools.partial(check_displacement, steps=2), hypergrad.displacement()
    ),
    "implicit turned": ("anil", check_implicit, altered(worlds.ESTIMATORS["implicit"], minus)),
    "implicit with another ridge": ("anil", check_implicit, hypergrad.implicit(steps=80, tol=1e-12, ridge=1.1)),
    "implicit with a solver stopped early": ("anil", check_implicit, hypergrad.implicit(steps=3, ridge=1.0)),
    "identity for the Hessian": ("anil", check_implicit, hypergrad.sama(alpha=0.1)),
    "the last step before it for after it": ("anil", check_sama, hypergrad.finite_difference(epsilon=0.1)),
    "another distance": ("anil", check_finite_difference, hypergrad.finite_difference(epsilon=0.1)),
    "first order for the last step": ("maml", check_finite_difference, hypergrad.first_order()),
    "no gradient without a problem": ("prototypical", check_exact, altered(hypergrad.unrolled(), zero)),
}  # fmt: skip


# the default run holds the first that each check must find
FIRST = {getattr(check, "func", check): breakage for breakage, (_, check, _) in reversed(BROKEN.items())}


@pytest.mark.parametrize("breakage", worlds.few_by_default(BROKEN, lambda breakage: breakage in FIRST.values()))
def test_a_broken_estimator_fails_its_row(breakage):
    name, check, estimator = BROKEN[breakage]
    grads = gradient_of(name, estimator)
    with pytest.raises(AssertionError):
        check(name, grads)


# What must not matter.


def same(entry, other, tolerance=1e-12):
    """Same loss and gradient; predictions are compared where the query is kept."""
    ((loss, _), grads), ((other_loss, _), other_grads) = entry, other
    np.testing.assert_allclose(loss, other_loss, rtol=tolerance)
    assert worlds.relative_distance(grads, other_grads) < tolerance


REPTILE = ("reptile", "displacement")


def reorder(part, rows):
    return part._replace(inputs=part.inputs[rows], targets=part.targets[rows], mask=part.mask[rows])


@pytest.mark.parametrize(("name", "estimator"), PAIRS)
def test_order_of_examples(name, estimator):
    _, params, episode = worlds.world(name)
    moved = metajax.Episode(
        reorder(episode.support, np.array([7, 3, 0, 5, 1, 6, 2, 4])),
        reorder(episode.query, np.array([2, 8, 0, 5, 3, 7, 6, 1, 4])),
    )
    same(worlds.compiled(name, estimator)(params, moved), result(name, estimator), 1e-11)


@pytest.mark.parametrize("filling", ["nan", "huge"])
@pytest.mark.parametrize(("name", "estimator"), PAIRS)
def test_content_of_padding(name, estimator, filling):
    _, params, episode = worlds.world(name)

    spoiled = worlds.spoil_padding(episode, *((np.nan, 99) if filling == "nan" else (1e30, -5)))
    same(worlds.compiled(name, estimator)(params, spoiled), result(name, estimator), 1e-15)


PADDED = [*((name, "mixed_mode") for name in worlds.LEARNERS), REPTILE]


# beside one of each kind the network whose statistics padding must not enter
@pytest.mark.parametrize(
    ("name", "estimator"), worlds.few_by_default(PADDED, lambda name, _: name in (*KINDS, "maml_support_statistics"))
)
def test_amount_of_padding(name, estimator):
    row, params, _ = worlds.world(name)
    same(worlds.compiled(name, estimator)(params, worlds.episode(row, padding=0)), result(name, estimator), 1e-11)


@pytest.mark.parametrize(("name", "estimator"), PAIRS)
def test_names_of_classes(name, estimator):
    """Labels permuted (the absent class too), with the head's columns moved along."""
    row, params, episode = worlds.world(name)
    names = np.array([2, 3, 0, 1])  # class c is now called names[c]
    old = np.argsort(names)

    def rename(part):
        return part._replace(targets=jnp.array(names, jnp.int32)[part.targets], class_mask=part.class_mask[old])

    def move(tree):
        def column(path, leaf):
            axis = row.class_axes.get(worlds.path_name(path))
            return leaf if axis is None else jnp.take(leaf, old, axis)

        return jax.tree.map_with_path(column, tree)

    renamed = metajax.Episode(rename(episode.support), rename(episode.query))
    (loss, aux), grads = worlds.compiled(name, estimator)(move(params), renamed)
    value, expected = result(name, estimator)
    same(((loss, aux), grads), (value, move(expected)), 1e-11)
    np.testing.assert_allclose(aux.outputs[:7], value[1].outputs[:7][:, old], rtol=1e-10)


# one eager run of each kind of inner loop and of each estimator: eager JAX compiles operation by operation, so that
# the default run holds three
EAGER = [
    ("maml", "mixed_mode"), ("anil", "first_order"), ("maml_proximal", "unrolled_remat"), ("reptile", "displacement"),
    ("prototypical", "mixed_mode"), ("prototypical_cosine", "mixed_mode"), ("finetune", "mixed_mode"),
    ("finetune_cosine", "unrolled"), ("pretrain", "unrolled"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "estimator"), worlds.few_by_default(EAGER, lambda name, _: name in ("anil", "reptile", "finetune"))
)
def test_jit_changes_nothing(name, estimator):
    row, params, episode = worlds.world(name)
    eager = hypergrad.value_and_grad(row.learner, worlds.ESTIMATORS[estimator])(params, episode)
    same(eager, result(name, estimator), 1e-11)


@pytest.mark.parametrize(("name", "estimator"), PAIRS)
def test_without_a_key_twice_the_same(name, estimator):
    _, params, episode = worlds.world(name)
    again, first = worlds.compiled(name, estimator)(params, episode), result(name, estimator)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (again, first)), strict=True))


@pytest.mark.parametrize("name", worlds.few_by_default(worlds.LEARNERS, lambda name: name in KINDS))
def test_one_compilation_and_the_order_of_tasks(name):
    row, params, _ = worlds.world(name)
    outer = metajax.outer_update(
        row.learner, optax.adam(1e-2), hypergrad=hypergrad.mixed_mode(), task_batching="scan", before=False
    )
    tasks = [worlds.episode(row, seed) for seed in range(3)]
    update = jax.jit(outer.update)
    start = outer.init(jax.random.key(0), tasks[0], params=params)
    state, metrics = update(start, worlds.stack(tasks))
    moved, moved_metrics = update(start, worlds.stack([tasks[2], tasks[0], tasks[1]]))
    if not row.beta:  # what a Gaussian draws depends on the key of the task, and that on its place
        assert worlds.relative_distance(moved.params, state.params) < 1e-9
        for metric in ("loss", "accuracy", "grad_norm"):
            np.testing.assert_allclose(moved_metrics[metric], metrics[metric], rtol=1e-11)
    update(state, worlds.stack(tasks))
    assert update._cache_size() == 1


# test_types_are_kept says for every pair that a step returns what it takes, for which the second step compiles nothing
@pytest.mark.parametrize(
    "estimator", worlds.few_by_default(worlds.ESTIMATORS, lambda name: name in ("mixed_mode", "first_order"))
)
def test_one_compilation_of_every_estimator(estimator):
    row, params, episode = worlds.world("anil")  # which takes them all
    outer = metajax.outer_update(row.learner, optax.adam(1e-2), hypergrad=worlds.ESTIMATORS[estimator])
    update, state = jax.jit(outer.update), outer.init(jax.random.key(0), episode, params=params)
    for _ in range(3):
        state, _ = update(state, worlds.stack([episode, episode]))
    assert update._cache_size() == 1


TYPES = [(*pair, "bfloat16") for pair in worlds.PAIRS] + [
    (*pair, "float32") for pair in worlds.PAIRS if pair[1] == "mixed_mode"
]


@pytest.mark.parametrize(
    ("name", "estimator", "dtype"),
    worlds.few_by_default(
        TYPES, lambda name, estimator, dtype: (estimator == "mixed_mode" and dtype == "float32") or name == "anil"
    ),
)
def test_types_are_kept(name, estimator, dtype):
    """A step returns what it takes: structure, shapes, dtypes, and no weak types, which would compile again."""
    row, _, _ = worlds.world(name)
    with jax.enable_x64(False):
        episode = worlds.episode(row, dtype=jnp.dtype(dtype))
        params = worlds.parameters(row, dtype=jnp.dtype(dtype))
        outer = metajax.outer_update(
            row.learner, optax.adam(1e-2), hypergrad=worlds.ESTIMATORS[estimator], task_batching="scan", before=False
        )
        before = jax.eval_shape(lambda: outer.init(jax.random.key(0), episode, params=params))
        after, metrics = jax.eval_shape(outer.update, before, worlds.stack([episode, episode]))
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert (old.shape, old.dtype, old.weak_type) == (new.shape, new.dtype, new.weak_type)
    assert {leaf.dtype for leaf in jax.tree.leaves(before.params)} == {jnp.dtype(dtype)}
    assert {metrics[metric].dtype for metric in ("loss", "accuracy", "grad_norm")} == {jnp.dtype(dtype)}


@pytest.mark.parametrize(
    "name", worlds.few_by_default(["maml", "prototypical", "finetune"], lambda name: name == "maml")
)
def test_bfloat16_agrees_with_float64(name):
    row, params, episode = worlds.world(name)
    (expected, _), _ = result(name, "mixed_mode")
    with jax.enable_x64(False):
        low, tasks = (jax.tree.map(lambda leaf: np.asarray(leaf), tree) for tree in (params, episode))
        low, tasks = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, jnp.bfloat16 if leaf.dtype == np.float64 else leaf.dtype), (low, tasks)
        )
        (loss, _), grads = jax.jit(hypergrad.value_and_grad(row.learner, hypergrad.mixed_mode()))(low, tasks)
    np.testing.assert_allclose(float(loss), float(expected), rtol=0.05)
    assert worlds.relative_distance(grads, result(name, "mixed_mode")[1]) < 0.2


@pytest.mark.parametrize(("name", "estimator"), PAIRS)
def test_no_support_and_no_query(name, estimator):
    """All padding, in the support or in the query set: finite numbers, no adaptation, no loss."""
    row, params, episode = worlds.world(name)
    nothing = jnp.zeros_like(episode.support.mask)
    (_, aux), grads = worlds.compiled(name, estimator)(
        params, episode._replace(support=episode.support._replace(mask=nothing))
    )
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
    if row.learner.problem is not None:
        np.testing.assert_array_equal(aux.metrics["inner_loss"], 0)
    (loss, _), grads = worlds.compiled(name, estimator)(
        params, episode._replace(query=episode.query._replace(mask=jnp.zeros_like(episode.query.mask)))
    )
    assert float(loss) == 0
    if estimator != "displacement":
        assert worlds.dot(grads, grads) == 0


# pretrain does not look at the support set
SEEN = [
    (name, part) for name in worlds.LEARNERS for part in ("support", "query") if (name, part) != ("pretrain", "support")
]


@pytest.mark.parametrize(("name", "part"), SEEN)
def test_a_kept_nan_is_not_hidden(name, part):
    _, params, episode = worlds.world(name)
    examples = getattr(episode, part)
    spoiled = episode._replace(**{part: examples._replace(inputs=examples.inputs.at[0].set(jnp.nan))})
    (loss, _), _ = worlds.compiled(name, "mixed_mode")(params, spoiled)
    assert np.isnan(loss)
