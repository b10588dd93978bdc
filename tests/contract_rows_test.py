"""The contract of the learners whose tasks are of another form, and that no public learner or estimator lacks a row."""

import functools
import importlib
import inspect
import pkgutil
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rows
import worlds
from hypergrad import table_test

import metajax
from metajax import hypergrad

pytestmark = pytest.mark.usefixtures("x64")
ESTIMATORS = {name: worlds.ESTIMATORS[name] for name in ("mixed_mode", "unrolled_remat", "first_order")}
PAIRS = worlds.few_by_default(
    [(name, estimator) for name in rows.ROWS for estimator in ESTIMATORS],
    lambda name, estimator: estimator == "mixed_mode",
)


@functools.cache
def compiled(name, estimator):
    row = rows.ROWS[name]

    def run(params, episode):
        trained, frozen = metajax.core.split(params, row.learner.trainable)
        estimated = ESTIMATORS[estimator].value_and_grad(row.learner, trained, (), episode, key=rows.KEY, frozen=frozen)
        return estimated[:2]

    return jax.jit(run)


@functools.cache
def objective(name):
    """`(meta_params, episode) -> loss`, without an estimator."""
    return jax.jit(
        lambda params, episode: metajax.core.outer_objective(rows.ROWS[name].learner, params, episode, key=rows.KEY)[0]
    )


def result(name, estimator, padding=2):
    return compiled(name, estimator)(rows.parameters(name), rows.ROWS[name].episode(0, padding, np.float64))


def plain_loop(name, params, episode):
    """The objective through a loop in Python, its inner gradients being constants."""
    row = rows.ROWS[name]
    problem, keys = row.learner.problem, metajax.core._keys.of_task(rows.KEY)
    adapt = metajax.core._keys.of_adaptation(keys.adapt)
    fast, rule = problem.init(params, episode.support, adapt.init), problem.optimizer(params)
    rule_state = rule.init(fast)
    for step in range(problem.num_steps):
        grads = jax.grad(problem.loss)(fast, params, episode.support, step, jax.random.fold_in(adapt.step, step))
        updates, rule_state = rule.update(jax.lax.stop_gradient(grads), rule_state, fast)
        fast = optax.apply_updates(fast, updates)
    adapted = problem.finalize(fast, params, episode.support, None)
    return row.learner.outer_loss(adapted, params, episode.query)[0]


@pytest.mark.parametrize(
    ("name", "estimator"),
    [pair for pair in PAIRS if "moco" not in pair.values[0]],  # theirs: training/contrastive_test.py
)
def test_gradient(name, estimator):
    row, params = rows.ROWS[name], rows.parameters(name)
    episode = row.episode(0, 2, np.float64)
    (loss, _), grads = result(name, estimator)
    trained, frozen = metajax.core.split(params, row.learner.trainable)
    assert jax.tree.structure(grads) == jax.tree.structure(trained)
    np.testing.assert_allclose(loss, objective(name)(params, episode), rtol=1e-12)
    if estimator == "first_order" and row.learner.problem is not None:
        if row.learner.problem.stream is None:  # those of streams are in hypergrad/stream_test.py
            expected = jax.grad(lambda params: plain_loop(name, params, episode))(params)
            assert worlds.relative_distance(grads, expected) < 1e-9
        return
    step, tolerance = (3e-2, 2e-3) if name == "in_context" else (3e-6, 2e-6)  # whose attention weighs in float32
    for seed in range(3):
        direction = worlds.random_direction(trained, seed)
        slope = worlds.finite_difference(
            lambda point: objective(name)(metajax.core.merge(point, frozen), episode), trained, direction, step
        )
        assert abs(slope) > 1e-4, "a direction without slope tests nothing"
        np.testing.assert_allclose(worlds.dot(grads, direction), slope, rtol=tolerance)


def same(entry, other, tolerance):
    ((loss, _), grads), ((other_loss, _), other_grads) = entry, other
    np.testing.assert_allclose(loss, other_loss, rtol=tolerance)
    assert worlds.relative_distance(grads, other_grads) < tolerance


def spoiled(episode, value):
    """The episode with other values wherever the mask is False."""

    def spoil(part):
        mask = np.asarray(part.mask)

        def leaf(values):
            values = np.array(values)
            filling = True if values.dtype == bool else value if values.dtype.kind == "f" else 7
            values[~mask] = filling
            return jnp.array(values)

        return part._replace(inputs=jax.tree.map(leaf, part.inputs), targets=jax.tree.map(leaf, part.targets))

    return metajax.Episode(*map(spoil, episode))


@pytest.mark.parametrize("filling", [np.nan, 1e30])
@pytest.mark.parametrize(("name", "estimator"), PAIRS)
def test_content_of_padding(name, estimator, filling):
    episode = rows.ROWS[name].episode(0, 2, np.float64)
    other = compiled(name, estimator)(rows.parameters(name), spoiled(episode, filling))
    same(other, result(name, estimator), 1e-12)


@pytest.mark.parametrize("name", [name for name in rows.ROWS if "bilevel" not in name])
def test_amount_of_padding(name):
    tolerance = 1e-6 if name == "in_context" else 1e-10  # whose attention weighs in float32
    same(result(name, "mixed_mode", padding=0), result(name, "mixed_mode"), tolerance)


@pytest.mark.parametrize("name", rows.ROWS)
def test_no_support_and_no_query(name):
    """All padding, in the support or in the query set: finite numbers, and no loss where nothing is judged."""
    row, params = rows.ROWS[name], rows.parameters(name)
    episode = row.episode(0, 2, np.float64)

    def without(part):
        nothing = jnp.zeros_like(part.mask)
        return spoiled(metajax.Episode(part._replace(mask=nothing), episode.query), np.nan).support

    (loss, _), grads = compiled(name, "mixed_mode")(params, episode._replace(support=without(episode.support)))
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    if row.learner.objective == "prequential":
        assert float(loss) == 0
        assert worlds.dot(grads, grads) == 0
    if row.learner.objective == "query" and row.learner.task.name != "one's own":
        (loss, _), grads = compiled(name, "mixed_mode")(params, episode._replace(query=without(episode.query)))
        assert float(loss) == 0
        assert worlds.dot(grads, grads) == 0


@pytest.mark.parametrize("name", [name for name, row in rows.ROWS.items() if not row.ordered])
def test_order_of_examples(name):
    episode = rows.ROWS[name].episode(0, 2, np.float64)
    order = np.array([7, 3, 0, 5, 1, 6, 2, 4])
    moved = jax.tree.map(lambda leaf: leaf[order], episode.support._replace(class_mask=None))
    moved = episode._replace(support=moved._replace(class_mask=episode.support.class_mask))
    same(compiled(name, "mixed_mode")(rows.parameters(name), moved), result(name, "mixed_mode"), 1e-11)


# tokens are integers, some learners do not look at the support set, and some objectives not at the query set
SEEN = [
    (name, part)
    for name, row in rows.ROWS.items()
    for part in ("support", "query")
    if name != "in_context" and (row.support if part == "support" else row.learner.objective != "prequential")
]


@pytest.mark.parametrize(("name", "part"), SEEN)
def test_a_kept_nan_is_not_hidden(name, part):
    row = rows.ROWS[name]
    episode = row.episode(0, 2, np.float64)
    examples = getattr(episode, part)
    broken = episode._replace(**{part: examples._replace(inputs=examples.inputs.at[0].set(jnp.nan))})
    assert np.isnan(compiled(name, "mixed_mode")(rows.parameters(name), broken)[0][0])


@pytest.mark.parametrize(
    "name", worlds.few_by_default(rows.ROWS, lambda name: name in ("contrastive_moco", "bilevel_both"))
)
def test_types_are_kept_and_an_empty_task_does_not_count(name):
    """Three meta steps of float32 in one compilation; a task that is all padding, NaN in it, changes nothing."""
    row = rows.ROWS[name]
    with jax.enable_x64(False):
        outer = metajax.outer_update(
            row.learner, optax.adam(1e-2), hypergrad=hypergrad.mixed_mode(), task_batching="scan",
        )  # fmt: skip
        episodes = [row.episode(seed, 2, np.float32) for seed in range(2)]
        nothing = metajax.Episode(*(part._replace(mask=jnp.zeros_like(part.mask)) for part in episodes[0]))
        empty = spoiled(nothing, np.nan)
        update, state = jax.jit(outer.update), outer.init(rows.KEY, episodes[0], rows.parameters(name, np.float32))
        start = state
        with_empty, metrics = update(state, worlds.stack([*episodes, empty]))
        fewer, other_metrics = outer.update(state, worlds.stack(episodes))
        alone, _ = update(state, worlds.stack([empty] * 3))
        for _ in range(2):
            state, _ = update(state, worlds.stack([*episodes, empty]))
    assert update._cache_size() == 1
    before, after = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (alone, state))
    assert before == after
    assert sorted(metrics) == sorted(other_metrics)
    for metric, value in metrics.items():
        np.testing.assert_allclose(value, other_metrics[metric], rtol=2e-5, err_msg=metric)
    pairs = zip(*(jax.tree.leaves(tree.params) for tree in (with_empty, fewer)), strict=True)
    if "queue" not in str(jax.tree.structure(state.params)):
        assert all(np.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)
    unchanged = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), alone.params, start.params)
    assert all(jax.tree.leaves(unchanged))
    if row.learner.objective == "prequential":
        assert not [metric for metric in metrics if metric.endswith("_before")]


def public_functions_that_return(kind):
    names = set()
    packages = [f"metajax.{module.name}" for module in pkgutil.iter_modules(metajax.__path__) if module.ispkg]
    for package in packages:
        module = importlib.import_module(package)
        for name in module.__all__:
            function = getattr(module, name)
            if inspect.isfunction(function) and typing.get_type_hints(function).get("return") is kind:
                names.add(name)
    return names


def of_function(row, functions):
    """The function that made a row: its name, and maybe more behind it."""
    found = [name for name in functions if row == name or row.startswith(f"{name}_")]
    return max(found, key=len, default=None)


def test_every_learner_and_every_estimator_is_a_row():
    made = public_functions_that_return(metajax.Learner)
    known = [name.replace("anil", "maml") for name in [*worlds.LEARNERS, *rows.ROWS]]
    assert {of_function(row, made) for row in known} == made
    estimators = public_functions_that_return(metajax.Hypergrad)
    known = [*worlds.ESTIMATORS, *table_test.ESTIMATORS]
    assert {of_function(row, estimators) for row in known} == estimators
