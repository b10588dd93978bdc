"""compare and plan: what they report, and what they choose."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

import metajax
from metajax import hypergrad
from metajax.hypergrad import _flops

MODEL = metajax.models.mlp(worlds.WAYS, hidden=(16,))


def learner(steps=4, proximal=0.5):
    return metajax.learners.maml(MODEL, optax.sgd(0.3), steps, proximal=proximal)


def episodes(tasks=2, size=60):
    parts = [worlds.examples(seed, size, 2, dtype=np.float32) for seed in range(2 * tasks)]
    return worlds.stack([metajax.Episode(*parts[2 * task : 2 * task + 2]) for task in range(tasks)])


@pytest.fixture(scope="module")
def found():
    return hypergrad.compare(learner(), episodes(), repeats=1)


def test_exact_estimators_have_no_error_and_the_others_do(found):
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
        fn = worlds.jit(hypergrad.value_and_grad(one, estimator))
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


def test_plan_predicts_what_the_compiler_counts():
    one, task = learner(), jax.tree.map(lambda leaf: leaf[0], episodes())
    choice = hypergrad.plan(one, task, 1e9)
    start = one.init(jax.random.key(0), task.support.inputs)
    sizes = jax.jit(hypergrad.value_and_grad(one, choice.estimator)).lower(start, task).compile().memory_analysis()
    whole = sizes.temp_size_in_bytes + sizes.argument_size_in_bytes + sizes.output_size_in_bytes
    np.testing.assert_allclose(choice.rows[0][1], whole, rtol=0.1)


@pytest.mark.parametrize("memory", [0, -1, float("nan")])
def test_bad_memory(memory):
    with pytest.raises(ValueError, match="memory_bytes must be"):
        hypergrad.plan(learner(), jax.tree.map(lambda leaf: leaf[0], episodes()), memory)


def test_operations_are_counted_in_loops_branches_and_calls():
    matrix = jnp.ones([8, 8])
    product = 2 * 8**3
    assert _flops.count(jax.jit(lambda x: x @ x), matrix) == product
    assert _flops.count(jax.checkpoint(lambda x: x @ x), matrix) == product
    assert _flops.count(lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: x), matrix) >= product
    image = jnp.ones([2, 8, 8, 3])
    dims = ("NHWC", "HWIO", "NHWC")
    convolution = lambda x: jax.lax.conv_general_dilated(  # noqa: E731
        x, jnp.ones([3, 3, 3, 5]), (1, 1), "SAME", dimension_numbers=dims
    )
    flops = 2 * 2 * 8 * 8 * 5 * 3 * 3 * 3
    assert flops <= _flops.count(convolution, image) <= flops + 3 * 3 * 3 * 5
