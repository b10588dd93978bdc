"""Update rules that exact estimators refuse, and those that they take."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import metajax
from metajax import inner
from metajax.hypergrad import _checks
from metajax.hypergrad._checks import check_rule

PARAMS = {"first": jnp.ones([4, 3]), "scale": jnp.ones([3]), "second": jnp.ones([3, 3])}
SUPPORT = metajax.Examples(jnp.ones([5, 4]), jnp.zeros(5, jnp.int32), jnp.ones(5, bool))


def problem(rule, num_steps=2, init=lambda meta_params, support, key: meta_params):
    """An inner problem of which only the rule matters; `rule` may be a function of the meta-parameters."""
    make = rule if callable(rule) else lambda meta_params: rule
    return metajax.InnerProblem(init, lambda *arguments: 0.0, make, num_steps, lambda params, *rest: params)


def rounded(momentum=0.9):
    """Momentum rounded to integers in the state: the path from old gradients to new steps is cut."""

    def update(grads, state, params=None):
        del params
        state = jax.tree.map(lambda old, g: jnp.round(momentum * old + 100 * g).astype(jnp.int32), state, grads)
        return jax.tree.map(lambda old, g: -0.1 * g - 0.001 * old, state, grads), state

    return optax.GradientTransformation(lambda params: jax.tree.map(lambda p: jnp.zeros(p.shape, int), params), update)


def preconditioned(rule):
    """A rule after a product with a learned matrix: only the true shapes fit."""

    def make(meta_params):
        def update(grads, state, params=None):
            del params
            flat = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grads)])
            return jax.tree.map(lambda leaf: leaf * jnp.sum(meta_params["matrix"] @ flat), grads), state

        return optax.chain(optax.GradientTransformation(lambda params: (), update), rule)

    return make


TAKEN = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "warm-up from zero": optax.sgd(optax.linear_schedule(0.0, 0.1, 5)),
    "adam with eps_root": optax.adam(0.1, eps_root=1e-8),
    "rmsprop": optax.rmsprop(0.1),
    "inner.adam": inner.adam(0.1),
    "inner.rmsprop": inner.rmsprop(0.1),
    "inner.muon": inner.muon(0.1),
    "clipping": optax.chain(inner.clip_by_global_norm(1.0), optax.clip(1e-3), optax.sgd(0.1)),
    "centred": optax.chain(optax.centralize(), optax.sgd(0.1)),
    "apply_if_finite": optax.apply_if_finite(optax.sgd(0.1), 3),
    "in part without a slope": optax.partition(
        {"sign": optax.sign_sgd(0.1), "plain": optax.sgd(0.1)},
        lambda params: {"first": "sign", "scale": "sign", "second": "plain"},
    ),
    "masked by a tree": optax.masked(optax.sgd(0.1), {"first": True, "scale": False, "second": True}),
    "no rate": optax.sgd(0.0),
    "not finite anywhere on the stand-ins": lambda meta_params: optax.sgd(jnp.sqrt(meta_params["scale"][0] - 0.6)),
    "fails on the stand-ins": lambda meta_params: optax.sgd(meta_params["absent"]),
}
NAN, WHOLE = "where one number of the inner gradient is zero, .*eps_root=1e-8", "where the whole inner gradient is zero"
REFUSED = {
    "adam": (optax.adam(0.1), NAN),
    "adam of Reptile": (optax.adam(0.1, b1=0.0), "metajax.inner.adam"),
    "adamw": (optax.adamw(0.1), NAN),
    "nadam": (optax.nadam(0.1), NAN),
    "rmsprop": (optax.rmsprop(0.1, eps_in_sqrt=False), NAN),
    "muon": (optax.contrib.muon(0.1, adam_eps_root=1e-8), WHOLE),
    "clipping": (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), WHOLE),
    "lars": (optax.lars(0.1), WHOLE),
    "adam in part": (
        optax.partition(
            {"a": optax.adam(0.1), "s": optax.sgd(0.1)}, lambda params: {**dict.fromkeys(params, "s"), "second": "a"}
        ),
        NAN,
    ),
    "lion": (optax.lion(0.1), "whose derivative is zero, as of a sign: first_order"),
    "signs": (optax.sign_sgd(0.1), "whose derivative is zero"),
    "integers": (rounded(), "whose state holds no integers that depend on the inner gradient"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken(name):
    check_rule(problem(TAKEN[name]), PARAMS, SUPPORT)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    rule, text = REFUSED[name]
    with pytest.raises(ValueError, match=f"^inner must be a rule .*{text}"):
        check_rule(problem(rule), PARAMS, SUPPORT)


def test_a_learner_without_inner_problem_is_taken_and_one_without_steps_is_not():
    check_rule(None, PARAMS, SUPPORT)
    with pytest.raises(ValueError, match="num_steps must be an integer of at least 1, got 0"):
        check_rule(problem(optax.sgd(0.1), 0), PARAMS, SUPPORT)


def test_learned_rules():
    """Rates for every number (Meta-SGD) and a learned matrix, whose rules are tried with all shapes that they need."""
    meta_params = {"rates": PARAMS, "start": PARAMS, "matrix": jnp.ones([24, 24])}

    def init(meta_params, support, key):
        return meta_params["start"]

    def rates(*before):
        def make(meta_params):
            def update(grads, state, params=None):
                del params
                return jax.tree.map(lambda g, rate: -rate * g, grads, meta_params["rates"]), state

            return optax.chain(*before, optax.GradientTransformation(lambda params: (), update))

        return make

    check_rule(problem(rates(), init=init), meta_params, SUPPORT)
    check_rule(problem(preconditioned(inner.adam(0.1)), init=init), meta_params, SUPPORT)
    for rule in (rates(optax.scale_by_adam()), preconditioned(optax.adam(0.1))):
        with pytest.raises(ValueError, match=NAN):
            check_rule(problem(rule, init=init), meta_params, SUPPORT)


def contexts():
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), SUPPORT)
    return {
        "jit": lambda check: jax.jit(check)(PARAMS, SUPPORT),
        "vmap": lambda check: jax.vmap(check, (None, 0))(PARAMS, two),
        "scan": lambda check: jax.lax.scan(lambda carry, one: (carry, check(PARAMS, one)), 0, two),
        "eval_shape": lambda check: jax.eval_shape(check, PARAMS, SUPPORT),
        "grad": lambda check: jax.grad(lambda params: check(params, SUPPORT) + params["scale"][0])(PARAMS),
    }


@pytest.mark.parametrize("context", contexts())
def test_it_says_the_same_where_the_arguments_are_traced(context):
    def run(rule):
        tried = problem(rule)

        def check(params, support):
            check_rule(tried, params, support)
            return jnp.zeros([])

        contexts()[context](check)

    run(inner.adam(0.1))
    with pytest.raises(ValueError, match=NAN):
        run(optax.adam(0.1))


def test_it_does_not_stop_where_nans_are_looked_for():
    with jax.debug_nans(True), pytest.raises(ValueError, match=NAN):
        check_rule(problem(optax.adam(0.1)), PARAMS, SUPPORT)


def test_a_rule_is_tried_once_for_each_shape_and_forgotten_with_it(monkeypatch):
    gc.collect()
    calls, outcomes = [], _checks._outcomes
    monkeypatch.setattr(_checks, "_outcomes", lambda *arguments: calls.append(1) or outcomes(*arguments))
    tried, kept = problem(optax.sgd(0.1)), len(_checks._passed)
    for _ in range(3):
        check_rule(tried, PARAMS, SUPPORT)
    assert len(calls) == 1
    check_rule(tried, {**PARAMS, "scale": jnp.ones([7])}, SUPPORT)
    assert len(calls) == 2
    assert len(_checks._passed) == kept + 1
    del tried
    gc.collect()
    assert len(_checks._passed) == kept


def test_a_large_problem_is_tried_on_few_numbers(monkeypatch):
    """Shapes only: nothing of the size of the parameters is made."""
    sizes, full = [], np.full

    def watched(shape, *rest):
        sizes.append(int(np.prod(shape)))
        return full(shape, *rest)

    monkeypatch.setattr(np, "full", watched)
    shapes = {f"layer_{index}": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16) for index in range(50)}
    check_rule(problem(optax.sgd(0.1)), shapes, SUPPORT)
    assert max(sizes) == 4
    assert len(sizes) == 2 + 50  # fast weights that stand for all, and the meta-parameters
