"""Hypergradients through a stream with a carry and a context, against `jax.grad` through a loop in Python."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import streams
import worlds

import metajax
from metajax import hypergrad

pytestmark = pytest.mark.usefixtures("x64")

_POLICY = jax.checkpoint_policies.dots_saveable
EXACT = {
    "unrolled": hypergrad.unrolled(),
    "unrolled remat": hypergrad.unrolled(remat=True),
    "unrolled remat in blocks": hypergrad.unrolled(remat=True, block=3),
    "unrolled with a policy": hypergrad.unrolled(remat=_POLICY),
    "unrolled, two steps at a time": hypergrad.unrolled(unroll=2),
    "mixed_mode every 1": hypergrad.mixed_mode(every=1),
    "mixed_mode every 3": hypergrad.mixed_mode(every=3),
    "mixed_mode every 8": hypergrad.mixed_mode(every=8),
    "forward_mode": hypergrad.forward_mode(),
    "truncated, all steps": hypergrad.truncated(streams.STEPS),
    "truncated, more than all": hypergrad.truncated(streams.STEPS + 3),
}
_DEFAULT = ("unrolled", "mixed_mode every 3", "forward_mode", "truncated, all steps")


def of_learner(learner, estimator, meta, episode):
    run = jax.jit(hypergrad.value_and_grad(learner, estimator))
    (loss, aux), grads = run(meta, episode)
    return loss, aux, grads


def expected(*arguments, **keywords):
    objective, meta, episode = arguments
    return jax.value_and_grad(lambda meta: streams.by_hand(objective, meta, episode, **keywords))(meta)


@pytest.mark.parametrize("objective", worlds.few_by_default(streams.OBJECTIVES, lambda name: name != "query"))
@pytest.mark.parametrize(
    ("name", "rule"),
    worlds.few_by_default(
        [(name, rule) for name in EXACT for rule in streams.RULES],
        lambda name, rule: name in _DEFAULT and (rule == "adam") == (name == "mixed_mode every 3"),
    ),
)
def test_exact_estimators_are_the_gradient_of_a_loop_by_hand(objective, name, rule):
    meta, episode = streams.parameters(), streams.episode(padding=(2, 5))
    learner = streams.learner(objective, rule=rule)
    loss, aux, grads = of_learner(learner, EXACT[name], meta, episode)
    value, slope = expected(objective, meta, episode, rule=rule)
    np.testing.assert_allclose(loss, value, rtol=1e-12)
    assert worlds.relative_distance(grads, slope) < 1e-9
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(slope)), "each meta-parameter must matter"
    assert aux.inner_losses.valid.tolist() == [True, True, False, True, True, False, True]


def test_a_part_of_the_meta_parameters_is_differentiated_alone():
    episode, learner = streams.episode(), streams.learner("both")
    meta = streams.parameters()
    slope = expected("both", meta, episode)[1]
    trained, frozen = metajax.core.split(meta, "mix|rate")
    for name in ("unrolled", "mixed_mode every 3"):
        found = EXACT[name].value_and_grad(learner, trained, (), episode, key=None, frozen=frozen)[1]
        wanted = jax.tree.map(lambda keep, leaf: leaf, trained, metajax.core.split(slope, "mix|rate")[0])
        assert worlds.relative_distance(found, wanted) < 1e-9


def test_a_wrong_gradient_is_found():
    """What the comparison above is worth: derivatives that are left out of the loop by hand are missed."""
    meta, episode = streams.parameters(), streams.episode()
    for part in ("gradient", "loss"):
        stop = lambda step, which, value, part=part: jax.lax.stop_gradient(value) if which == part else value  # noqa: E731
        slope = expected("both", meta, episode, stop=stop)[1]
        grads = of_learner(streams.learner("both"), EXACT["mixed_mode every 3"], meta, episode)[2]
        assert worlds.relative_distance(grads, slope) > 1e-2


@pytest.mark.parametrize("objective", streams.OBJECTIVES)
def test_first_order_stops_the_inner_gradient_and_never_the_recorded_loss(objective):
    meta, episode = streams.parameters(), streams.episode(padding=(1,))
    loss, _, grads = of_learner(streams.learner(objective), hypergrad.first_order(), meta, episode)
    stop = lambda step, part, value: jax.lax.stop_gradient(value) if part == "gradient" else value  # noqa: E731
    value, slope = expected(objective, meta, episode, stop=stop)
    np.testing.assert_allclose(loss, value, rtol=1e-12)
    assert worlds.relative_distance(grads, slope) < 1e-9


def truncated_by_hand(objective, meta, episode, k, start, losses):
    """The objective whose gradient `truncated(k)` takes, from states that are computed before."""
    fixed = jax.lax.stop_gradient(meta)
    learner = streams.learner(objective)
    problem, steps = learner.problem, len(episode.support.mask)
    init, update = metajax.inner_init(problem), metajax.inner_update(problem)
    at = [init(fixed, episode.support)]
    for _ in range(steps - k):
        at.append(update(at[-1], fixed, episode.support))
    context = problem.context(meta, episode.support, None)
    begin = problem.init(meta, episode.support, None, context=context)
    move = begin - jax.lax.stop_gradient(begin) if start == "identity" else 0.0
    data = problem.stream(meta, episode.support, None)
    chunk = lambda step: jax.tree.map(lambda leaf: leaf[step], data)  # noqa: E731
    scored = []
    for step in range(steps - k):
        value, _ = problem.loss(
            at[step].params + move, meta, episode.support, step, None, data=clear(chunk(step)), context=context,
            carry=at[step].carry,
        )  # fmt: skip
        scored.append(value if losses == "identity" else jax.lax.stop_gradient(value))
    state = at[-1]
    params, carry, opt_state = state.params + move, state.carry, state.opt_state
    rule = problem.optimizer(meta)
    for step in range(steps - k, steps):
        (value, carry), grads = jax.value_and_grad(problem.loss, has_aux=True)(
            params, meta, episode.support, step, None, data=clear(chunk(step)), context=context, carry=carry
        )
        scored.append(value)
        updates, opt_state = rule.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    adapted = problem.finalize(params, meta, episode.support, None, carry=carry, context=context)
    valid = jnp.ones(steps, bool)
    losses = metajax.InnerLosses(jnp.stack(scored), valid)
    more = {} if objective == "query" else {"inner_losses": losses}
    return learner.outer_loss(adapted, meta, episode.query, **more)[0]


def clear(chunk):
    return chunk._replace(
        inputs=jnp.where(chunk.mask[:, None], chunk.inputs, 0), targets=jnp.where(chunk.mask, chunk.targets, 0)
    )


@pytest.mark.parametrize("start", ["identity", "constant"])
@pytest.mark.parametrize("losses", ["identity", "constant"])
@pytest.mark.parametrize("objective", worlds.few_by_default(streams.OBJECTIVES, lambda objective: objective == "both"))
def test_truncation_says_what_earlier_steps_and_their_losses_count_as(start, losses, objective):
    meta, episode = streams.parameters(), streams.episode()
    estimator = hypergrad.truncated(3, start=start, losses=losses)
    loss, _, grads = of_learner(streams.learner(objective), estimator, meta, episode)
    value, slope = jax.value_and_grad(truncated_by_hand, argnums=1)(objective, meta, episode, 3, start, losses)
    np.testing.assert_allclose(loss, value, rtol=1e-12)
    assert worlds.relative_distance(grads, slope) < 1e-9
    np.testing.assert_allclose(loss, streams.by_hand(objective, meta, episode), rtol=1e-12)


PERSISTENT = {
    "truncation": lambda **options: hypergrad.persistent_truncation(2, **options),
    "evolution": lambda **options: hypergrad.persistent_evolution(steps=2, pairs=4, sigma=0.05, **options),
}


@pytest.mark.parametrize("name", worlds.few_by_default(PERSISTENT, lambda name: name == "truncation"))
@pytest.mark.parametrize("fresh_data", worlds.few_by_default([False, True], lambda fresh_data: fresh_data))
def test_segments_of_a_persistent_estimator_are_one_loop(name, fresh_data):
    """The carry lives in the state, and segment s sees the data of its own steps."""
    steps, meta = 6, streams.parameters()
    whole, learner = streams.episode(steps=steps, padding=(3,)), streams.learner("prequential", steps=steps)
    inputs = whole.support.inputs  # the context reads the first example, which new data must leave as it is
    whole = whole._replace(support=whole.support._replace(inputs=inputs.at[::2, 0].set(inputs[0, 0])))
    parts = [whole] * 3
    if fresh_data:
        parts = [
            whole._replace(support=jax.tree.map(lambda leaf, first=first: leaf[first : first + 2], whole.support))
            for first in (0, 2, 4)
        ]
    estimator, key = PERSISTENT[name](fresh_data=fresh_data), None if name == "truncation" else jax.random.key(0)
    state, losses = estimator.init(learner, meta, parts[0], key), []
    for part in parts:
        (_, aux), _, state = estimator.value_and_grad(learner, meta, state, part, key=key)
        losses += aux.inner_losses.values[aux.inner_losses.valid].tolist()
    one = of_learner(learner, hypergrad.unrolled(), meta, whole)[1].inner_losses
    np.testing.assert_allclose(losses, one.values[one.valid], rtol=1e-9)
    inner = metajax.inner_init(learner.problem)(meta, whole.support)
    for _ in range(steps):
        inner = metajax.inner_update(learner.problem)(inner, meta, whole.support)
    carried = state.inner if name == "truncation" else state.carried.inner
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), carried, inner)


def test_a_persistent_segment_is_the_gradient_through_its_own_steps():
    meta, episode = streams.parameters(), streams.episode(steps=4)
    learner = streams.learner("prequential", steps=4)
    estimator = hypergrad.persistent_truncation(2)
    state = estimator.init(learner, meta, episode, None)
    (_, _), first, state = estimator.value_and_grad(learner, meta, state, episode)
    half = streams.by_hand
    slope = jax.grad(lambda meta: half("prequential", meta, episode, last=2))(meta)
    assert worlds.relative_distance(first, slope) < 1e-9
    (_, _), second, state = estimator.value_and_grad(learner, meta, state, episode)
    slope = jax.grad(lambda meta: second_half(meta, episode))(meta)
    assert worlds.relative_distance(second, slope) < 1e-9


def second_half(meta, episode):
    """The objective of the last two of four steps; those before pass a change of the start on as it is."""
    learner = streams.learner("prequential", steps=4)
    problem, fixed = learner.problem, jax.lax.stop_gradient(meta)
    state = metajax.inner_init(problem)(fixed, episode.support)
    for _ in range(2):
        state = metajax.inner_update(problem)(state, fixed, episode.support)
    context = problem.context(meta, episode.support, None)
    begin = problem.init(meta, episode.support, None, context=context)
    params, carry, opt_state = state.params + begin - jax.lax.stop_gradient(begin), state.carry, state.opt_state
    rule, data, losses = problem.optimizer(meta), problem.stream(meta, episode.support, None), []
    for step in (2, 3):
        chunk = clear(jax.tree.map(lambda leaf, step=step: leaf[step], data))
        (value, carry), grads = jax.value_and_grad(problem.loss, has_aux=True)(
            params, meta, episode.support, step, None, data=chunk, context=context, carry=carry
        )
        losses.append(value)
        updates, opt_state = rule.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return sum(losses) / 2


REFUSING = {
    "finite_difference": hypergrad.finite_difference(),
    "sama": hypergrad.sama(),
    "implicit": hypergrad.implicit(),
    "displacement": hypergrad.displacement(),
}


@pytest.mark.parametrize("name", REFUSING)
@pytest.mark.parametrize("objective", ["prequential", "both"])
def test_estimators_that_do_not_differentiate_inner_losses_refuse_them(name, objective):
    learner = streams.learner(objective, carry=False)
    with pytest.raises(ValueError, match=f"{name}.* needs an objective of the query set, got '{objective}'"):
        of_learner(learner, REFUSING[name], streams.parameters(), streams.episode())


@pytest.mark.parametrize("name", ["implicit", "sama"])
def test_solutions_refuse_a_carry(name):
    with pytest.raises(ValueError, match=f"{name}.* needs an inner problem without a carry"):
        of_learner(streams.learner("query"), REFUSING[name], streams.parameters(), streams.episode())


@pytest.mark.parametrize("objective", streams.OBJECTIVES)
def test_step_weights_are_of_the_query_set_alone(objective):
    estimator = hypergrad.unrolled(step_weights=[1.0] * streams.STEPS)
    run = lambda: of_learner(streams.learner(objective), estimator, streams.parameters(), streams.episode())  # noqa: E731
    if objective == "query":
        assert jnp.isfinite(run()[0])
        return
    with pytest.raises(ValueError, match="step_weights must be None for an objective of inner losses"):
        run()


@pytest.mark.parametrize("name", worlds.few_by_default(EXACT, lambda name: name == "mixed_mode every 3"))
def test_nothing_is_compiled_twice(name):
    primitive, traces = hypergrad.value_and_grad(streams.learner("both"), EXACT[name]), []

    @jax.jit
    def step(meta, episode):
        traces.append(name)
        return jax.tree.map(lambda leaf, grad: leaf - 0.01 * grad, meta, primitive(meta, episode)[1])

    meta = streams.parameters()
    for seed in range(3):
        meta = step(meta, streams.episode(seed))
    assert len(traces) == 1


def test_evolution_strategies_estimate_the_slope_of_inner_losses():
    meta, episode = streams.parameters(), streams.episode()
    estimator = hypergrad.evolution(sigma=1e-4, pairs=4000, chunk=500)
    (loss, _), grads = hypergrad.value_and_grad(streams.learner("prequential"), estimator)(
        meta, episode, key=jax.random.key(1)
    )
    value, slope = expected("prequential", meta, episode)
    np.testing.assert_allclose(loss, value, rtol=1e-12)
    assert worlds.relative_distance(grads, slope) < 3 * np.sqrt(25 / 4000), "25 numbers, 4000 directions"


def _reader(stream):
    """Regression of a number on a number, one pair a step."""

    def loss(params, meta, support, step, key, *, data):
        return jnp.mean((params * data.inputs - data.targets) ** 2)

    problem = metajax.InnerProblem(
        lambda meta, support, key: meta, loss, lambda meta: optax.sgd(0.1), 4,
        lambda params, meta, support, key: params, stream=stream,
    )  # fmt: skip
    return problem, metajax.learners.bilevel(problem, objective="prequential")


@pytest.mark.parametrize("axes", [0, 1])
def test_the_support_set_itself_is_a_stream_and_its_padding_teaches_nothing(axes, x64):
    """One example a step, its mask a number or a line; the mean of the losses of the first two by hand."""

    def stream(meta, support, key):
        return jax.tree.map(lambda leaf: leaf.reshape(4, *[1] * axes), support)

    problem, learner = _reader(stream)
    support = metajax.Examples(
        jnp.array([1.0, 2.0, jnp.nan, 5.0]), jnp.array([2.0, 2.0, 9.0, jnp.nan]), jnp.array([True, True, False, False])
    )
    value, slope = hypergrad.value_and_grad(learner, hypergrad.mixed_mode())(
        jnp.array(0.5), metajax.Episode(support, support)
    )
    second = 0.5 + 0.1 * 2 * 1.5  # of (0.5 * 1 - 2)^2
    np.testing.assert_allclose(value[0], (1.5**2 + (2 * second - 2) ** 2) / 2, rtol=1e-12)
    np.testing.assert_allclose(slope, (-2 * 1.5 + 2 * (2 * second - 2) * 2 * 0.8) / 2, rtol=1e-12)
    state = metajax.inner_init(problem)(jnp.array(0.5), None)  # deployed, without a support set
    for row in range(4):
        chunk = jax.tree.map(lambda leaf, row=row: leaf[row], stream(None, support, None))
        state = metajax.inner_update(problem)(state, jnp.array(0.5), None, data=chunk)
    np.testing.assert_allclose(state.params, second - 0.1 * 4 * (2 * second - 2), rtol=1e-12)
