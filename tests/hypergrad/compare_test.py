"""compare and plan: what they report, and what they choose."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

import metajax
from metajax import hypergrad

MODEL = metajax.models.mlp(worlds.WAYS, hidden=(16,))


def learner(steps=4, proximal=0.5):
    return metajax.learners.maml(MODEL, optax.sgd(0.3), steps, proximal=proximal)


def episodes(tasks=2, size=60):
    parts = [worlds.examples(seed, size, 2, dtype=np.float32) for seed in range(2 * tasks)]
    return worlds.stack([metajax.Episode(*parts[2 * task : 2 * task + 2]) for task in range(tasks)])


SOME = {
    "unrolled": hypergrad.unrolled(), "mixed_mode": hypergrad.mixed_mode(), "first_order": hypergrad.first_order()
}  # fmt: skip


@pytest.fixture(scope="module")
def found():
    return hypergrad.compare(learner(), episodes(), estimators=SOME, repeats=1)


@pytest.mark.slow  # all estimators, each compiled for speed
def test_all_estimators_by_default():
    check_errors(hypergrad.compare(learner(), episodes(), repeats=1))


@pytest.mark.slow
def test_exact_estimators_have_no_error_and_the_others_do(found):
    assert {row.name for row in found.rows} == set(SOME)
    check_errors(found)


def check_errors(found):
    for row in found.rows:
        assert row.refused is None
        assert (row.error < 1e-5) == (row.name.startswith(("mixed_mode", "unrolled"))), row
        assert -1 <= row.cosine <= 1 + 1e-6
        assert row.temporary_bytes > 0
        assert row.seconds > 0
    assert found["first_order"].cosine > 0.5
    assert found["unrolled"].temporary_bytes > found["mixed_mode"].temporary_bytes
    assert len(str(found).splitlines()) == 1 + len(found.rows)


def test_the_error_is_that_of_the_mean_over_tasks(found):
    tasks, one = episodes(), learner()
    start = one.init(jax.random.split(jax.random.key(0))[0], tasks.support.inputs[0])

    def mean(estimator):
        fn = jax.jit(hypergrad.value_and_grad(one, estimator))
        grads = [fn(start, jax.tree.map(lambda leaf, task=task: leaf[task], tasks))[1] for task in range(2)]
        return jax.tree.map(lambda *leaves: sum(leaves) / 2, *grads)

    exact, first = mean(hypergrad.unrolled()), mean(hypergrad.first_order())
    np.testing.assert_allclose(found["first_order"].error, worlds.relative_distance(first, exact), rtol=1e-3)


def test_what_a_learner_does_not_take_is_told():
    some = {"implicit": hypergrad.implicit(), "displacement": hypergrad.displacement()}
    plain = hypergrad.compare(learner(proximal=0.0), episodes(), estimators=some, repeats=1)
    assert "would be zero" in plain["implicit"].refused
    assert "refused: hypergrad: implicit() would be zero" in str(plain)
    prototypes = hypergrad.compare(metajax.learners.prototypical(MODEL), episodes(), estimators=some, repeats=1)
    assert "needs a learner with an inner problem" in prototypes["displacement"].refused


@pytest.mark.slow  # plans of all exact estimators for a long inner loop, four times
def test_plan_takes_the_cheapest_that_fits():
    one, task = learner(steps=16), jax.tree.map(lambda leaf: leaf[0], episodes(size=600))
    rich = hypergrad.plan(one, task, 1e9)
    assert rich.name == rich.rows[0][0]
    assert [flops for _, _, flops in rich.rows] == sorted(flops for _, _, flops in rich.rows)
    smallest = min(size for _, size, _ in rich.rows)
    tight = hypergrad.plan(one, task, smallest)
    assert {name: size for name, size, _ in tight.rows}[tight.name] == smallest
    assert hypergrad.plan(one, task, smallest - 1).name is None
    assert str(hypergrad.plan(one, task, smallest - 1)).startswith("no exact estimator fits into 0.")
    assert f"{tight.name} fits into" in str(tight)


def test_plan_says_where_nothing_fits():
    """Where something does is in the example of `plan`."""
    one, task = learner(steps=2), jax.tree.map(lambda leaf: leaf[0], episodes())
    choice = hypergrad.plan(one, task, 1)
    assert [flops for _, _, flops in choice.rows] == sorted(flops for _, _, flops in choice.rows)
    assert choice.name is None
    assert str(choice).startswith("no exact estimator fits into 0.")


@pytest.mark.slow  # plans of all exact estimators, compiled for speed
def test_plan_predicts_what_the_compiler_counts():
    one, task = learner(), jax.tree.map(lambda leaf: leaf[0], episodes())
    choice = hypergrad.plan(one, task, 1e9)
    start = one.init(jax.random.key(0), task.support.inputs)
    sizes = jax.jit(hypergrad.value_and_grad(one, choice.estimator)).lower(start, task).compile().memory_analysis()
    whole = sizes.temp_size_in_bytes + sizes.argument_size_in_bytes + sizes.output_size_in_bytes
    np.testing.assert_allclose(choice.rows[0][1], whole, rtol=0.1)


def conv4_task():
    images = lambda each: metajax.Examples(  # noqa: E731
        jnp.ones([5 * each, 28, 28, 1]), jnp.arange(5 * each) % 5, jnp.ones(5 * each, bool)
    )
    return metajax.learners.maml(metajax.models.conv4(5), optax.sgd(0.1), 5), metajax.Episode(images(1), images(15))


def decoder_task():
    model = metajax.models.decoder(256, width=128, depth=3, heads=4, remat=True)
    text = metajax.Examples(jnp.ones([2, 128], jnp.int32), jnp.ones([2, 128], jnp.int32), jnp.ones(2, bool))
    return metajax.learners.maml(model, metajax.inner.adam(1e-3), 4), metajax.Episode(text, text)


@pytest.mark.slow
@pytest.mark.parametrize("make", [conv4_task, decoder_task])
def test_plan_predicts_the_meta_step(make):
    """A scan over tasks takes what one task takes, besides the state of the outer optimizer, which is none here."""
    one, task = make()
    tasks = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), task)
    estimators = {name: make(one.problem.num_steps) for name, make in hypergrad._compare.EXACT.items()}
    for name, predicted, _ in hypergrad.plan(one, task, 1e9).rows:
        outer = metajax.outer_update(
            one, optax.sgd(0.1), hypergrad=estimators[name], task_batching="scan", before=False
        )
        state = jax.eval_shape(outer.init, jax.random.key(0), task)
        sizes = jax.jit(outer.update, donate_argnums=0).lower(state, tasks).compile().memory_analysis()
        whole = sizes.temp_size_in_bytes + sizes.argument_size_in_bytes
        whole += sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        np.testing.assert_allclose(predicted, whole, rtol=0.1, err_msg=name)


@pytest.mark.parametrize("memory", [0, -1, float("nan")])
def test_bad_memory(memory):
    with pytest.raises(ValueError, match="memory_bytes must be"):
        hypergrad.plan(learner(), jax.tree.map(lambda leaf: leaf[0], episodes()), memory)
