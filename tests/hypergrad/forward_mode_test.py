"""Forward mode: exact for rates, schedules and loss weights, in memory that does not grow with the steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

import metajax
from metajax import hypergrad
from metajax.core import _inner

RULES = {
    "sgd": lambda meta: optax.sgd(jnp.exp(meta["rate"])),
    "momentum": lambda meta: optax.sgd(jnp.exp(meta["rate"]), momentum=jax.nn.sigmoid(meta["decay"])),
    "adam": lambda meta: optax.adam(jnp.exp(meta["rate"]), b1=jax.nn.sigmoid(meta["decay"]), eps_root=1e-8),
    "rmsprop": lambda meta: optax.rmsprop(jnp.exp(meta["rate"]), decay=jax.nn.sigmoid(meta["decay"])),
    "schedule": lambda meta: optax.sgd(lambda step: jnp.exp(meta["rate"] - meta["decay"] * step)),
}
META = {"rate": np.array(-1.5), "decay": np.array(0.4), "weights": np.array([0.2, -0.3, 0.1, 0.5])}


def tuned(rule, num_steps=6, size=4):
    """A fixed start, weights of the examples in the loss, and an optimizer with learned numbers."""

    def loss(params, meta, support, step, key):
        errors = jnp.log(jnp.cosh(support.inputs @ params - support.targets))
        return jnp.mean(jnp.exp(meta["weights"]) * errors)

    problem = metajax.InnerProblem(
        lambda meta, support, key: jnp.linspace(-1.0, 1.0, size).astype(support.inputs.dtype),
        loss, RULES[rule], num_steps, lambda params, meta, support, key: params,
    )  # fmt: skip

    def adapt(meta, support, *, num_steps=None, key=None):
        return _inner.unroll(problem, meta, support, key=key, num_steps=num_steps).adapted

    def outer_loss(adapted, meta, query, *, key=None):
        outputs = query.inputs @ adapted
        return jnp.mean((outputs - query.targets) ** 2), metajax.Aux(outputs)

    return metajax.Learner(None, adapt, None, outer_loss, problem, metajax.tasks.regression)


def task(seed=0, size=4):
    rng = np.random.default_rng(seed)
    make = lambda: metajax.Examples(  # noqa: E731
        jnp.array(rng.normal(size=(4, size))), jnp.array(rng.normal(size=4)), jnp.ones(4, bool)
    )
    return metajax.Episode(make(), make())


def both(one, estimator, params, episode):
    """Value and gradient, and those of `unrolled`."""
    entries = (hypergrad.value_and_grad(one, entry) for entry in (estimator, hypergrad.unrolled()))
    return [jax.jit(fn)(params, episode) for fn in entries]


@pytest.mark.parametrize("rule", worlds.few_by_default(RULES, lambda rule: rule in ("adam", "schedule")))
def test_exact_for_learned_rates_and_weights(rule, x64):
    params = jax.tree.map(jnp.array, META)
    ((loss, aux), grads), ((value, told), expected) = both(tuned(rule), hypergrad.forward_mode(), params, task())
    assert worlds.relative_distance(grads, expected) < 1e-12
    np.testing.assert_allclose(loss, value, rtol=1e-14)
    assert jax.tree.structure(aux) == jax.tree.structure(told)
    np.testing.assert_allclose(aux.metrics["inner_loss"], told.metrics["inner_loss"], rtol=1e-13)
    np.testing.assert_allclose(aux.outputs, told.outputs, rtol=1e-13)
    assert float(jnp.abs(grads["rate"])) > 1e-3
    assert float(jnp.abs(grads["weights"]).min()) > 1e-6


@pytest.mark.parametrize("chunk", worlds.few_by_default([1, 4, 6, 100], lambda chunk: chunk in (4, 100)))
def test_chunks_change_nothing(chunk, x64):
    params, episode, one = jax.tree.map(jnp.array, META), task(), tuned("adam")
    whole, parts = (
        jax.jit(hypergrad.value_and_grad(one, hypergrad.forward_mode(chunk=size)))(params, episode)
        for size in (None, chunk)
    )
    for first, second in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-12)


@pytest.mark.parametrize("name", ["maml", "prototypical"])
def test_exact_for_whole_networks(name, x64):
    row = worlds.LEARNERS[name]
    params, episode = worlds.parameters(row), worlds.episode(row)
    _, grads = jax.jit(hypergrad.value_and_grad(row.learner, hypergrad.forward_mode()))(params, episode)
    assert worlds.relative_distance(grads, worlds.compiled(name, "unrolled")(params, episode)[1]) < 1e-12


def test_step_weights(x64):
    params, episode, one, weights = jax.tree.map(jnp.array, META), task(), tuned("sgd", 3), (0.2, 0.3, 0.5)
    (loss, _), grads = jax.jit(
        hypergrad.value_and_grad(one, hypergrad.forward_mode(chunk=4, step_weights=weights))
    )(params, episode)  # fmt: skip
    (value, _), expected = jax.jit(hypergrad.value_and_grad(one, hypergrad.unrolled(step_weights=weights)))(
        params, episode
    )
    np.testing.assert_allclose(loss, value, rtol=1e-14)
    assert worlds.relative_distance(grads, expected) < 1e-12


def test_dtypes_of_the_parameters_are_kept():
    """Half precision beside single precision in one tree."""
    params = {name: jnp.array(leaf, jnp.float32) for name, leaf in META.items()}
    params["weights"] = params["weights"].astype(jnp.bfloat16)
    episode = jax.tree.map(lambda leaf: leaf if leaf.dtype == bool else leaf.astype(jnp.float32), task())
    (_, grads), (_, expected) = both(tuned("sgd"), hypergrad.forward_mode(), params, episode)
    assert [leaf.dtype for leaf in jax.tree.leaves(grads)] == [leaf.dtype for leaf in jax.tree.leaves(params)]
    np.testing.assert_allclose(grads["rate"], expected["rate"], rtol=1e-5)
    np.testing.assert_allclose(*(np.asarray(tree["weights"], np.float32) for tree in (grads, expected)), rtol=2e-2)


@pytest.mark.parametrize("devices", worlds.few_by_default([1, 2], lambda devices: devices == 2))
def test_the_trained_part_through_outer_update(devices, x64):
    """Only what `trainable` picks counts against `max_params`."""

    def run(estimator, devices):
        outer = metajax.outer_update(
            tuned("adam"), optax.sgd(0.1), hypergrad=estimator, trainable="rate|decay", before=False,
        )  # fmt: skip
        if devices > 1:
            outer = metajax.parallel.shard(outer, metajax.parallel.make_mesh(devices=jax.devices()[:devices]))
        state = outer.init(jax.random.key(0), task(), params=META)
        return jax.jit(outer.update)(state, worlds.stack([task(1), task(2)]))[0].params

    assert worlds.relative_distance(
        run(hypergrad.forward_mode(max_params=2), devices), run(hypergrad.unrolled(), 1)
    ) < (1e-12)


def test_memory_does_not_grow_with_the_number_of_steps():
    size = 2048
    episode = jax.tree.map(lambda leaf: leaf if leaf.dtype == bool else leaf.astype(jnp.float32), task(size=size))
    params = {name: jnp.array(leaf, jnp.float32) for name, leaf in META.items()}

    def temporaries(num_steps, estimator):
        fn = jax.jit(hypergrad.value_and_grad(tuned("adam", num_steps, size), estimator))
        return worlds.temporary_bytes(fn, params, episode)

    few, many = (temporaries(steps, hypergrad.forward_mode()) for steps in (8, 64))
    assert abs(many - few) < 4 * size  # less than one copy of the fast weights
    # one tangent instead of six, each of the fast weights and of two moments
    assert few - temporaries(8, hypergrad.forward_mode(chunk=1)) > 5 * 3 * 4 * size


def test_nan_in_the_inner_loop_is_not_hidden(x64):
    params, episode = jax.tree.map(jnp.array, META), task()
    spoiled = episode._replace(support=episode.support._replace(inputs=episode.support.inputs.at[0].set(jnp.nan)))
    ((loss, _), grads), _ = both(tuned("sgd"), hypergrad.forward_mode(), params, spoiled)
    assert np.isnan(loss)
    assert np.isnan(grads["rate"])


def test_too_many_parameters(x64):
    row = worlds.LEARNERS["maml"]
    params, episode = worlds.parameters(row), worlds.episode(row)
    fn = hypergrad.value_and_grad(row.learner, hypergrad.forward_mode(max_params=57))
    with pytest.raises(ValueError, match=r"max_params must be at least the number of .* meta-parameters, 58, got 57"):
        jax.eval_shape(fn, params, episode)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"chunk": 0}, "chunk must be an integer of at least 1, got 0"),
        ({"max_params": -1}, "max_params must be an integer of at least 1, got -1"),
        ({"step_weights": (0.0,)}, "step_weights must hold a positive number"),
    ],
)
def test_bad_arguments(options, text):
    with pytest.raises(ValueError, match=text):
        hypergrad.forward_mode(**options)


def test_inner_rules_and_loops_that_are_refused(x64):
    params, episode = jax.tree.map(jnp.array, META), task()
    spoiled = tuned("sgd").problem._replace(optimizer=lambda meta: optax.adam(jnp.exp(meta["rate"])))
    for problem, text in (
        (spoiled, "eps_root"),
        (tuned("sgd", 0).problem, "num_steps must be an integer of at least 1"),
    ):
        fn = hypergrad.value_and_grad(tuned("sgd")._replace(problem=problem), hypergrad.forward_mode())
        with pytest.raises(ValueError, match=text):
            jax.eval_shape(fn, params, episode)
