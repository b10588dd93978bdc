"""DARTS' and SAMA's estimators against their formulas, written out in NumPy or without the inner loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

import metajax
from metajax import hypergrad

BOTH = {"finite_difference": hypergrad.finite_difference(), "sama": hypergrad.sama(alpha=0.1)}


def gradient(learner, estimator):
    return jax.jit(hypergrad.value_and_grad(learner, estimator))


@functools.cache
def compiled(name, estimator):
    return gradient(worlds.LEARNERS[name].learner, BOTH[estimator])


# The searched architecture `a` scales a quartic inner loss; every derivative is a formula.

PULL, GOAL = np.array([1.0, -0.5, 2.0]), np.array([0.3, 0.8, -1.0])
START, ARCHITECTURE = np.array([0.4, -1.2, 0.7]), np.array([0.2, -0.3, 0.1])


def of_weights(w, a):
    return np.exp(a) * w - PULL + w**3


def of_architecture(w, a):
    return np.exp(a) * w**2 / 2


def search(rule, num_steps, *, start=lambda meta: jnp.array(START)):
    """`rule(meta)` trains the weights; the outer loss looks at them, and at the architecture directly."""

    def loss(params, meta, support, step, key):
        return jnp.sum(jnp.exp(meta["a"]) * params**2 / 2 - PULL * params + params**4 / 4)

    problem = metajax.InnerProblem(
        lambda meta, support, key: start(meta), loss, rule, num_steps, lambda params, meta, support, key: params
    )

    def outer_loss(adapted, meta, query, *, key=None):
        return 0.5 * jnp.sum((adapted - GOAL) ** 2) + 0.5 * jnp.sum(meta["a"] ** 2), metajax.Aux(adapted)

    return metajax.Learner(None, None, None, outer_loss, problem)


def of_search(learner, estimator, **meta):
    examples = metajax.Examples(jnp.zeros(1), jnp.zeros(1), jnp.ones(1, bool))
    meta = {"a": jnp.array(ARCHITECTURE), **meta}
    return gradient(learner, estimator)(meta, metajax.Episode(examples, examples))


def difference(point, direction, distance):
    """Of the gradient with respect to the architecture: the paper's `(plus - minus) / (2 epsilon)`."""
    epsilon = distance / np.linalg.norm(direction)
    above, below = (of_architecture(point + sign * epsilon * direction, ARCHITECTURE) for sign in (1, -1))
    return (above - below) / (2 * epsilon)


@pytest.mark.parametrize("epsilon", [0.01, 0.5])
def test_the_formula_of_darts(epsilon, x64):
    """Equations 7 and 8: weights that are given, one step of SGD."""
    learner = search(lambda meta: optax.sgd(0.1), 1)
    (loss, aux), grads = of_search(learner, hypergrad.finite_difference(epsilon=epsilon))
    after = START - 0.1 * of_weights(START, ARCHITECTURE)
    expected = ARCHITECTURE - 0.1 * difference(START, after - GOAL, epsilon)
    np.testing.assert_allclose(grads["a"], expected, rtol=1e-10)
    np.testing.assert_allclose(loss, 0.5 * np.sum((after - GOAL) ** 2) + 0.5 * np.sum(ARCHITECTURE**2), rtol=1e-12)
    np.testing.assert_allclose(aux.outputs, after, rtol=1e-12)
    assert aux.metrics["inner_loss"].shape == (1,)


def test_with_several_steps_the_last_one_counts(x64):
    """For weights that are given, the steps before lead to where the formula is taken, and that is all."""
    learner = search(lambda meta: optax.sgd(0.1), 3)
    (_, aux), grads = of_search(learner, hypergrad.finite_difference(epsilon=0.5))
    before = START
    for _ in range(2):
        before = before - 0.1 * of_weights(before, ARCHITECTURE)
    after = before - 0.1 * of_weights(before, ARCHITECTURE)
    expected = ARCHITECTURE - 0.1 * difference(before, after - GOAL, 0.5)
    np.testing.assert_allclose(grads["a"], expected, rtol=1e-10)
    assert aux.metrics["inner_loss"].shape == (3,)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_the_formula_of_sama(name, x64):
    """Its matrix is diagonal for each of these rules: how the last update follows from its gradient."""
    rate, b1, b2, eps, eps_root = 0.1, 0.8, 0.9, 1e-3, 1e-4
    rule = {
        "sgd": optax.sgd(rate),
        "momentum": optax.sgd(rate, momentum=b1),
        "adam": optax.adam(rate, b1=b1, b2=b2, eps=eps, eps_root=eps_root),
    }[name]
    (loss, aux), grads = of_search(search(lambda meta: rule, 3), hypergrad.sama(alpha=0.5))

    weights, mean, square = START, np.zeros(3), np.zeros(3)
    for step in (1, 2, 3):
        slope = of_weights(weights, ARCHITECTURE)
        if name == "adam":
            mean, square = b1 * mean + (1 - b1) * slope, b2 * square + (1 - b2) * slope**2
            top, root = mean / (1 - b1**step), np.sqrt(square / (1 - b2**step) + eps_root)
            weights = weights - rate * top / (root + eps)
            of_root = (1 - b2) * slope / ((1 - b2**step) * root)
            matrix = rate * ((1 - b1) / ((1 - b1**step) * (root + eps)) - top * of_root / (root + eps) ** 2)
        else:
            mean = (b1 if name == "momentum" else 0) * mean + slope
            weights, matrix = weights - rate * mean, rate
    np.testing.assert_allclose(aux.outputs, weights, rtol=1e-10)
    expected = ARCHITECTURE - difference(weights, matrix * (weights - GOAL), 0.5)
    np.testing.assert_allclose(grads["a"], expected, rtol=1e-9)
    assert aux.metrics["inner_loss"].shape == (3,)
    np.testing.assert_allclose(loss, 0.5 * np.sum((weights - GOAL) ** 2) + 0.5 * np.sum(ARCHITECTURE**2), rtol=1e-12)


@pytest.mark.parametrize("estimator", ["finite_difference", "sama"])
def test_a_learned_rate_and_a_learned_start(estimator, x64):
    """The rule's own derivative is kept: of the last step under `sama`, of all under `finite_difference`."""
    rule = lambda meta: optax.stateless(lambda grads, _: -jnp.exp(meta["rate"]) * grads)  # noqa: E731
    learner = search(rule, 2, start=lambda meta: meta["start"])
    made = {"finite_difference": hypergrad.finite_difference(epsilon=0.5), "sama": hypergrad.sama(alpha=0.5)}[estimator]
    _, grads = of_search(learner, made, rate=jnp.array(-2.0), start=jnp.array(START))
    rate = np.exp(-2.0)
    first = of_weights(START, ARCHITECTURE)
    second = of_weights(START - rate * first, ARCHITECTURE)
    middle, end = START - rate * first, START - rate * (first + second)
    outer = end - GOAL
    if estimator == "sama":
        np.testing.assert_allclose(grads["a"], ARCHITECTURE - rate * difference(end, outer, 0.5), rtol=1e-10)
        np.testing.assert_allclose(grads["rate"], -rate * second @ outer, rtol=1e-10)
        np.testing.assert_array_equal(grads["start"], 0)
        return
    epsilon = 0.5 / np.linalg.norm(outer)
    above, below = (of_weights(middle + sign * epsilon * outer, ARCHITECTURE) for sign in (1, -1))
    of_middle = outer - rate * (above - below) / (2 * epsilon)
    np.testing.assert_allclose(grads["a"], ARCHITECTURE - rate * difference(middle, outer, 0.5), rtol=1e-10)
    np.testing.assert_allclose(grads["start"], of_middle, rtol=1e-10)
    np.testing.assert_allclose(grads["rate"], -rate * (second @ outer + first @ of_middle), rtol=1e-10)


@pytest.mark.parametrize("rule", worlds.few_by_default(["sgd", "adam"], lambda rule: rule == "adam"))
def test_one_step_is_exact_but_for_the_square_of_epsilon(rule, x64):
    """MAML's start included."""
    rule = {"sgd": optax.sgd(0.3), "adam": optax.adam(0.05, eps_root=1e-4)}[rule]
    model = metajax.Model(lambda key, x: None, lambda w, x: x @ w)
    learner = metajax.learners.maml(model, rule, 1, proximal=0.5)
    params = jnp.array(np.random.default_rng(0).normal(size=(4, worlds.WAYS)))
    episode = worlds.episode(worlds.Row(learner))
    _, exact = gradient(learner, hypergrad.unrolled())(params, episode)

    def error(epsilon):
        _, grads = gradient(learner, hypergrad.finite_difference(epsilon=epsilon))(params, episode)
        return worlds.relative_distance(grads, exact)

    coarse, fine = error(0.1), error(0.01)
    assert fine < 1e-4
    np.testing.assert_allclose(coarse / fine, 100, rtol=0.05)


def test_sama_falls_to_the_mixed_product_with_the_square_of_alpha(x64):
    learner = search(lambda meta: optax.sgd(0.1), 2)
    weights = START
    for _ in range(2):
        weights = weights - 0.1 * of_weights(weights, ARCHITECTURE)
    exact = ARCHITECTURE - 0.1 * np.exp(ARCHITECTURE) * weights * (weights - GOAL)
    # of a quadratic in the weights the difference has no error: one with a third derivative is needed
    quadratic = of_search(learner, hypergrad.sama(alpha=0.5))[1]["a"]
    np.testing.assert_allclose(quadratic, exact, rtol=1e-12)

    sines = learner.problem._replace(
        loss=lambda params, meta, support, step, key: jnp.sum(jnp.exp(meta["a"]) * (1 - jnp.cos(params)))
    )
    weights = START
    for _ in range(2):
        weights = weights - 0.1 * np.exp(ARCHITECTURE) * np.sin(weights)
    exact = ARCHITECTURE - 0.1 * np.exp(ARCHITECTURE) * np.sin(weights) * (weights - GOAL)

    def error(alpha):
        grads = of_search(learner._replace(problem=sines), hypergrad.sama(alpha=alpha))[1]["a"]
        return np.linalg.norm(grads - exact)

    np.testing.assert_allclose(error(0.1) / error(0.01), 100, rtol=0.05)


@pytest.mark.parametrize("estimator", BOTH)
def test_serves_operations_whose_gradient_has_no_derivative(estimator, x64):
    """As kernels with a backward pass of their own: `implicit` differentiates that pass once more."""
    tanh, slope = jax.custom_vjp(jnp.tanh), jax.custom_vjp(lambda x, up: up * (1 - jnp.tanh(x) ** 2))
    tanh.defvjp(lambda x: (jnp.tanh(x), x), lambda x, up: (slope(x, up),))
    slope.defvjp(lambda x, up: (slope(x, up), None), lambda _, up: pytest.fail("differentiated twice"))
    examples = worlds.examples(0, 6, 0)
    episode, params = metajax.Episode(examples, examples), jnp.ones([4, worlds.WAYS]) / 4

    def grads(function, made):
        model = metajax.Model(lambda key, x: None, lambda w, x: function(x @ w))
        return gradient(metajax.learners.maml(model, optax.sgd(0.1), 2, proximal=1.0), made)(params, episode)[1]

    np.testing.assert_allclose(grads(tanh, BOTH[estimator]), grads(jnp.tanh, BOTH[estimator]), rtol=1e-10)
    with pytest.raises(TypeError, match="forward-mode"):
        grads(tanh, hypergrad.implicit())


# one code serves both estimators, which differ in where they take the gradients
@pytest.mark.parametrize("estimator", worlds.few_by_default(BOTH, lambda name: name == "finite_difference"))
def test_memory_does_not_grow_with_the_number_of_inner_steps(estimator):
    few, many = worlds.bytes_by_steps(BOTH[estimator], optax.adam(0.1, eps_root=1e-8))
    assert few > 200 * 32 * 4
    assert abs(many - few) < 8192  # the inner losses, one number a step


@pytest.mark.parametrize("name", worlds.WITHOUT_PROBLEM)
def test_a_learner_without_an_inner_problem(name, x64):
    """`finite_difference` differentiates it exactly, `sama` refuses it."""
    row = worlds.LEARNERS[name]
    params, episode = worlds.parameters(row), worlds.episode(row)
    with pytest.raises(ValueError, match=r"hypergrad: sama\(\) needs a learner with an inner problem"):
        worlds.trace(name, hypergrad.sama())
    if name == "prototypical":
        exact = worlds.compiled(name, "unrolled")(params, episode)[1]
        assert worlds.relative_distance(compiled(name, "finite_difference")(params, episode)[1], exact) < 1e-12


@pytest.mark.parametrize("name", ["maml", "maml_adam", "reptile"])
def test_sama_refuses_a_start_alone(name, x64):
    with pytest.raises(
        ValueError, match=r"sama\(\) would be zero, because the inner loss does not depend .* proximal="
    ):
        worlds.trace(name, hypergrad.sama())


def test_zero_inner_steps(x64):
    """Nothing to approximate, or nothing to adapt to."""
    learner = search(lambda meta: optax.sgd(0.1), 0, start=lambda meta: meta["start"])
    (_, aux), grads = of_search(learner, hypergrad.finite_difference(), start=jnp.array(START))
    np.testing.assert_allclose(grads["start"], START - GOAL, rtol=1e-12)
    np.testing.assert_allclose(grads["a"], ARCHITECTURE, rtol=1e-12)
    assert aux.metrics["inner_loss"].shape == (0,)
    with pytest.raises(ValueError, match=r"hypergrad: sama\(\) needs num_steps of at least 1, got 0"):
        of_search(learner, hypergrad.sama(), start=jnp.array(START))


# one code serves both estimators, which differ in where they take the gradients
@pytest.mark.parametrize("estimator", worlds.few_by_default(BOTH, lambda name: name == "finite_difference"))
def test_the_frozen_part(estimator, x64):
    row = worlds.LEARNERS["anil"]
    params, episode = worlds.parameters(row), worlds.episode(row)
    _, whole = compiled("anil", estimator)(params, episode)
    none = lambda tree: jax.tree.map(lambda _: None, tree)  # noqa: E731
    body = {name: value if name != "head" else none(value) for name, value in params.items()}
    head = {name: value if name == "head" else none(value) for name, value in params.items()}

    def grads(trained, frozen):
        return BOTH[estimator].value_and_grad(row.learner, trained, (), episode, frozen=frozen)[1]

    got = jax.jit(grads)(body, head)
    assert jax.tree.structure(got) == jax.tree.structure(body)
    assert worlds.relative_distance(got["layer_0"], whole["layer_0"]) < 1e-12
    if estimator == "finite_difference":
        assert worlds.relative_distance(jax.jit(grads)(head, body)["head"], whole["head"]) < 1e-12
    else:
        with pytest.raises(ValueError, match="would be zero"):
            jax.eval_shape(grads, head, body)


# one code serves both estimators, which differ in where they take the gradients
@pytest.mark.parametrize("estimator", worlds.few_by_default(BOTH, lambda name: name == "finite_difference"))
def test_tasks_under_vmap_and_scan_agree(estimator, x64):
    row = worlds.LEARNERS["anil"]
    params, tasks = worlds.parameters(row), worlds.stack([worlds.episode(row, seed) for seed in range(3)])
    one = lambda episode: hypergrad.value_and_grad(row.learner, BOTH[estimator])(params, episode)  # noqa: E731
    together = jax.jit(jax.vmap(one))(tasks)
    apart = jax.jit(lambda tasks: jax.lax.map(one, tasks))(tasks)
    assert worlds.relative_distance(together, apart) < 1e-10


@pytest.mark.parametrize("estimator", BOTH)
def test_padding_and_nan(estimator, x64):
    row = worlds.LEARNERS["anil"]
    params, episode = worlds.parameters(row), worlds.episode(row)
    fn = compiled("anil", estimator)
    (loss, _), grads = fn(params, episode)

    (same_loss, _), same = fn(params, metajax.Episode(*(worlds.with_nan(part, ~part.mask) for part in episode)))
    assert same_loss == loss
    assert worlds.relative_distance(same, grads) == 0

    (bad_loss, _), bad = fn(params, episode._replace(support=worlds.with_nan(episode.support, jnp.arange(8) == 0)))
    assert np.isnan(bad_loss)
    assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(bad["layer_0"]))

    nothing = lambda part: part._replace(mask=jnp.zeros_like(part.mask))  # noqa: E731
    _, unadapted = fn(params, episode._replace(support=nothing(episode.support)))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(unadapted))
    assert worlds.dot(unadapted, unadapted) > 0
    (no_loss, _), unjudged = fn(params, episode._replace(query=nothing(episode.query)))
    assert (no_loss, worlds.dot(unjudged, unjudged)) == (0, 0)


@pytest.mark.parametrize("estimator", BOTH)
def test_types_are_kept(estimator):
    model = metajax.Model(lambda key, x: None, lambda w, x: x @ w)
    learner = metajax.learners.maml(model, optax.sgd(0.1), 2, proximal=0.7, loss=metajax.core.squared_error)
    ones = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    examples = metajax.Examples(ones(7, 3), ones(7, 1), jax.ShapeDtypeStruct([7], jnp.bool))
    fn = hypergrad.value_and_grad(learner, BOTH[estimator])
    (loss, _), grads = jax.eval_shape(fn, ones(3, 1), metajax.Episode(examples, examples))
    assert {loss.dtype, grads.dtype} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: hypergrad.finite_difference(epsilon=0.0), "epsilon must be a finite number above 0, got 0.0"),
        (lambda: hypergrad.sama(alpha=float("inf")), "alpha must be a finite number above 0, got inf"),
    ],
)
def test_bad_arguments(make, text):
    with pytest.raises(ValueError, match=text):
        make()
