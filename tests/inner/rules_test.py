"""The rules of metajax.inner: the steps of optax, exact hypergradients where inner gradients are zero, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import worlds

import metajax
from metajax import hypergrad, inner

PAIRS = {
    "adam": (inner.adam(0.1), optax.adam(0.1)),
    "adam_without_momentum": (inner.adam(0.1, b1=0.0, b2=0.9), optax.adam(0.1, b1=0.0, b2=0.9)),
    "nadam": (inner.adam(0.1, eps=1e-3, nesterov=True), optax.nadam(0.1, eps=1e-3)),
    "adamw": (inner.adamw(0.1, weight_decay=0.2), optax.adamw(0.1, weight_decay=0.2)),
    "rmsprop": (inner.rmsprop(0.1, 0.8), optax.rmsprop(0.1, 0.8, eps_in_sqrt=False)),
    "muon": (inner.muon(0.1, 0.9, weight_decay=0.2), optax.contrib.muon(0.1, beta=0.9, weight_decay=0.2)),
    "muon_rates": (inner.muon(0.1, adam_rate=0.3), optax.contrib.muon(0.1, adam_learning_rate=0.3)),
    "clipped": tuple(
        optax.chain(clip(0.5), optax.sgd(0.1)) for clip in (inner.clip_by_global_norm, optax.clip_by_global_norm)
    ),
}
SHAPES = {"wide": (2, 3), "tall": (3, 2), "bias": (3,), "scale": ()}
TINY = 1e-25  # its square is zero in float32


STEPS = [*((name, jnp.float32) for name in PAIRS), ("adam", jnp.bfloat16), ("clipped", jnp.bfloat16)]
# what differs from a rule of the default run by a number alone
VARIANTS = ("adam_without_momentum", "muon_rates")


@pytest.mark.parametrize(
    ("name", "dtype"),
    worlds.few_by_default(STEPS, lambda name, dtype: name not in VARIANTS and dtype != jnp.bfloat16),
)
def test_steps_are_those_of_optax(name, dtype):
    """Over gradients of all sizes, with zeros and numbers whose squares vanish among them."""
    rng = np.random.default_rng(0)
    start = {key: jnp.asarray(rng.normal(size=shape), dtype) for key, shape in SHAPES.items()}
    (ours, theirs), (mine, other) = PAIRS[name], (start, start)
    state, other_state = ours.init(start), theirs.init(start)
    for size in (1.0, 1e-6, TINY, 1e3):
        grads = {key: jnp.asarray(size * rng.normal(size=shape), dtype) for key, shape in SHAPES.items()}
        grads["wide"], grads["bias"] = grads["wide"].at[0].set(0), grads["bias"].at[1].set(0)
        updates, state = ours.update(grads, state, mine)
        expected, other_state = theirs.update(grads, other_state, other)
        mine, other = optax.apply_updates(mine, updates), optax.apply_updates(other, expected)
        for found, wanted in zip(*map(jax.tree.leaves, (mine, other)), strict=True):
            assert found.dtype == dtype
            tolerance = 1e-6 if name.startswith("muon") else 0  # elsewhere bit for bit
            np.testing.assert_allclose(np.float64(found), np.float64(wanted), rtol=tolerance, atol=tolerance)


def test_the_state_is_that_of_optax():
    """What looks for the moments of Adam in a state finds them."""
    ours, theirs = (rule.init({"w": jnp.ones([2, 3])}) for rule in PAIRS["adam"])
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)


def dead_inputs():
    """A network with an input that is zero in the support set, and a matrix that only sees such inputs."""

    def apply(params, inputs):
        hidden = jnp.tanh(inputs[:, :3] @ params["first"]) + inputs[:, 3:] @ params["dead"]
        return hidden @ params["head"] + params["bias"]

    rng = np.random.default_rng(0)
    shapes = {"first": (3, 4), "dead": (2, 4), "head": (4, 2), "bias": (2,)}
    params = {name: jnp.array(rng.normal(size=shape)) for name, shape in shapes.items()}
    support, query = (
        metajax.Examples(jnp.array(rng.normal(size=(6, 5))), jnp.array(rng.normal(size=(6, 2))), jnp.ones(6, bool))
        for _ in range(2)
    )
    alive = jnp.array([1.0, 0.0, 1.0, 0.0, 0.0])
    return apply, params, metajax.Episode(support._replace(inputs=support.inputs * alive), query)


RULES = {
    "adam": inner.adam(0.1),
    "adamw": inner.adamw(0.1, weight_decay=0.2),
    "rmsprop": inner.rmsprop(0.05),
    "muon": inner.muon(0.1, weight_decay=0.1),
    "clipped": optax.chain(inner.clip_by_global_norm(0.5), inner.adam(optax.linear_schedule(0.1, 0.0, 4))),
}


# muon and clipping at a zero gradient are in test_a_support_set_of_padding_adapts_nothing
@pytest.mark.parametrize("name", worlds.few_by_default(RULES, lambda name: name == "adam"))
def test_exact_hypergradients_at_dead_inputs(name, x64):
    apply, params, episode = dead_inputs()
    model = metajax.Model(lambda key, inputs: params, apply)
    learner = metajax.learners.maml(model, RULES[name], 2, loss=metajax.core.squared_error)
    loss = jax.jit(lambda params: learner.outer_loss(learner.adapt(params, episode.support), params, episode.query)[0])
    estimators = [hypergrad.mixed_mode()] + [hypergrad.unrolled()] * (name == "adam")
    grads, *others = [jax.jit(hypergrad.value_and_grad(learner, each))(params, episode)[1] for each in estimators]
    assert all(worlds.relative_distance(other, grads) < 1e-10 for other in others)
    assert float(jnp.min(jnp.abs(grads["dead"]))) > 1e-4  # the query set has these inputs
    for seed in range(3):
        direction = worlds.random_direction(params, seed)
        expected = worlds.finite_difference(loss, params, direction, 1e-4)
        np.testing.assert_allclose(worlds.dot(grads, direction), expected, rtol=1e-6)


@pytest.mark.slow  # it says something of Optax, not of this package
def test_the_rules_of_optax_give_nan_there(x64):
    """Else this package would not be needed."""
    apply, params, episode = dead_inputs()
    model = metajax.Model(lambda key, inputs: params, apply)
    for rule in (optax.adam(0.1), optax.contrib.muon(0.1)):
        learner = metajax.learners.maml(model, rule, 1, loss=metajax.core.squared_error)
        problem = learner.problem
        loss = lambda params, problem=problem: jnp.sum(  # noqa: E731
            metajax.inner_update(problem)(
                metajax.inner_init(problem)(params, episode.support), params, episode.support
            ).params["first"]
        )
        assert np.any(np.isnan(jax.jit(jax.grad(loss))(params)["first"]))


@pytest.mark.slow
def test_a_support_set_of_padding_adapts_nothing(x64):
    """The whole inner gradient is zero: the hypergradient is the gradient of the query loss."""
    apply, params, episode = dead_inputs()
    episode = episode._replace(support=episode.support._replace(mask=jnp.zeros(6, bool)))
    model = metajax.Model(lambda key, inputs: params, apply)

    def loss(params):
        return metajax.core.squared_error(apply(params, episode.query.inputs), episode.query.targets).mean()

    expected = jax.jit(jax.grad(loss))(params)
    for rule in (optax.chain(inner.clip_by_global_norm(0.5), inner.adam(0.1)), inner.muon(0.1)):
        learner = metajax.learners.maml(model, rule, 2, loss=metajax.core.squared_error)
        _, grads = jax.jit(hypergrad.value_and_grad(learner, hypergrad.unrolled()))(params, episode)
        assert worlds.relative_distance(grads, expected) < 1e-12


@pytest.mark.parametrize(
    ("rule", "eps", "factor"),
    [
        (lambda eps: inner.adam(0.5, eps=eps), 0.25, -0.5 / 0.25),
        (lambda eps: inner.rmsprop(0.5, eps=eps), 0.25, -0.5 / 0.25),
        (lambda eps: optax.chain(inner.clip_by_global_norm(1.0), optax.sgd(0.5)), None, -0.5),
    ],
)
def test_the_derivative_at_zero_is_the_true_one(rule, eps, factor, x64):
    """`rate / eps` in a first step, as differences between gradients above and below zero give it."""
    rule = rule(eps)
    step = lambda gradient: rule.update(gradient, rule.init(gradient))[0]  # noqa: E731
    zero = jnp.zeros([])
    np.testing.assert_allclose(jax.jit(jax.grad(step))(zero), factor, rtol=1e-12)
    np.testing.assert_allclose((step(zero + 1e-9) - step(zero - 1e-9)) / 2e-9, factor, rtol=1e-6)
    assert np.isfinite(jax.jit(jax.grad(jax.grad(step)))(zero))


@pytest.mark.slow
def test_the_derivative_of_muon_at_zero_is_the_true_one(x64):
    rule, direction = inner.muon(0.5, eps=0.25), jnp.array([[1.0, -2.0, 0.5], [0.0, 1.0, 1.0]])
    step = lambda distance: rule.update(distance * direction, rule.init(direction), direction)[0]  # noqa: E731
    found = jax.jacfwd(step)(0.0)
    np.testing.assert_allclose(found, (step(1e-9) - step(-1e-9)) / 2e-9, rtol=1e-6, atol=1e-6)
    coefficient = 3.4445**5 / 0.25 * -0.5 * 1.5**0.5
    mean = 0.95 * 0.05 / (1 - 0.95**2) + 1  # of a first gradient, one step ahead and without bias
    np.testing.assert_allclose(found, coefficient * mean * direction, rtol=1e-10)


def test_numbers_may_be_meta_parameters(x64):
    """Gradients with respect to everything that a rule is made of, at a gradient with a zero."""
    numbers = {"rate": 0.1, "b1": 0.8, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.2, "max_norm": 0.5}
    grads = [jnp.array([0.0, 1.0, -2.0]), jnp.array([0.0, 0.3, 0.7])]

    def end(numbers):
        clip = inner.clip_by_global_norm(numbers["max_norm"])
        decayed = inner.adamw(**{name: number for name, number in numbers.items() if name != "max_norm"})
        rule, params = optax.chain(clip, decayed), jnp.array([1.0, 2.0, 3.0])
        state = rule.init(params)
        for gradient in grads:
            updates, state = rule.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return jnp.sum(params**2)

    numbers = jax.tree.map(jnp.asarray, numbers)
    found, end = jax.jit(jax.grad(end))(numbers), jax.jit(end)
    for name in numbers:
        direction = {other: float(other == name) for other in numbers}
        np.testing.assert_allclose(found[name], worlds.finite_difference(end, numbers, direction, 1e-5), rtol=1e-6)
    assert all(abs(value) > 1e-6 for value in found.values())


def test_nan_stays_nan():
    for rule in (inner.adam(0.1), inner.rmsprop(0.1), inner.clip_by_global_norm(1.0)):
        updates, _ = rule.update(jnp.array([jnp.nan, 0.0]), rule.init(jnp.zeros(2)))
        assert np.isnan(updates[0])


UNIT, ABOVE = "must be a number of at least 0 and below 1, or an array, got", "must be a finite number above 0, or an"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: inner.adam(-0.1), "rate must be a finite number of at least 0, or an array, got -0.1"),
        (lambda: inner.adam("fast"), "rate must be a finite number of at least 0, or an array, got 'fast'"),
        (lambda: inner.adam(0.1, b1=1.0), f"b1 {UNIT} 1.0"),
        (lambda: inner.adamw(0.1, b2=-0.5), f"b2 {UNIT} -0.5"),
        (lambda: inner.adamw(0.1, eps=0.0), f"eps {ABOVE} array, got 0.0"),
        (lambda: inner.adamw(0.1, weight_decay=float("nan")), "weight_decay must be a finite number of at least 0"),
        (lambda: inner.rmsprop(True), "rate must be a finite number of at least 0, or an array, got True"),
        (lambda: inner.rmsprop(0.1, decay=2), f"decay {UNIT} 2"),
        (lambda: inner.rmsprop(0.1, eps=-1.0), f"eps {ABOVE} array, got -1.0"),
        (lambda: inner.muon(None), "rate must be a finite number of at least 0, or an array, got None"),
        (lambda: inner.muon(0.1, beta=1), f"beta {UNIT} 1"),
        (lambda: inner.muon(0.1, eps=0), f"eps {ABOVE} array, got 0"),
        (lambda: inner.muon(0.1, steps=0), "steps must be an integer of at least 1, got 0"),
        (lambda: inner.muon(0.1, weight_decay=-1.0), "weight_decay must be a finite number of at least 0"),
        (
            lambda: inner.muon(0.1, adam_rate=-1.0),
            "adam_rate must be a finite number of at least 0, or an array, got -1.0",
        ),
        (lambda: inner.clip_by_global_norm(0.0), f"max_norm {ABOVE} array, got 0.0"),
    ],
)
def test_refusals(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_rates_may_be_schedules():
    rule = inner.adam(optax.linear_schedule(0.5, 0.0, 2))
    state, steps = rule.init(jnp.ones([])), []
    for _ in range(3):
        step, state = rule.update(jnp.ones([]), state)
        steps.append(float(step))
    np.testing.assert_allclose(steps, [-0.5, -0.25, 0.0], rtol=1e-5, atol=1e-6)
