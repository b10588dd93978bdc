"""What a user can get wrong in a learner is refused by name when it is built or traced, and by a type checker."""

import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import streams
import worlds

import metajax
from metajax import hypergrad


def _trace(learner, estimator=None, episode=None, **options):
    """Traces a meta step."""
    outer = metajax.outer_update(learner, optax.sgd(0.1), hypergrad=estimator or hypergrad.mixed_mode(), **options)
    episode = streams.episode(dtype=np.float32) if episode is None else episode
    state = jax.eval_shape(lambda: outer.init(jax.random.key(0), episode))
    jax.eval_shape(outer.update, state, worlds.stack([episode]))


def _stream(**changes):
    learner = streams.learner("prequential")
    return learner._replace(problem=learner.problem._replace(**changes))


def _with_loss(change):
    """The inner loss, what it returns changed."""
    loss = streams.learner("prequential").problem.loss
    return _stream(loss=lambda *arguments, **parts: change(*loss(*arguments, **parts)))


def _plain():
    return metajax.learners.maml(metajax.models.mlp(worlds.WAYS), optax.sgd(0.1))


_CLASSES = worlds.episode(worlds.LEARNERS["maml"], dtype=np.float32)
LEARNERS = {
    "no adapt": (lambda: _plain()._replace(adapt=None), "learner.adapt must be a function, got None"),
    "no outer loss": (lambda: _plain()._replace(outer_loss=None), "learner.outer_loss must be a function, got None"),
    "no learner": (lambda: _plain().adapt, "learner must be of type Learner"),
    "an inner problem without a loss": (
        lambda: _plain()._replace(problem=_plain().problem._replace(loss=None)),
        "learner.problem.loss must be a function, got None",
    ),
    "another problem": (lambda: _plain()._replace(problem={}), "learner.problem must be of type InnerProblem, got {}"),
    "a stream that is none": (lambda: _stream(stream=5), "learner.problem.stream must be a function or None, got 5"),
    "an unknown objective": (
        lambda: _plain()._replace(objective="queries"),
        "learner.objective must be one of 'query', 'prequential', 'both', got 'queries'",
    ),
    "inner losses without an inner loop": (
        lambda: metajax.learners.prototypical(metajax.models.mlp(4))._replace(objective="both"),
        "learner.objective must be 'query' for a learner without an inner problem, got 'both'",
    ),
    "steps that are none": (
        lambda: _stream(num_steps=1.5), "learner.problem.num_steps must be an integer of at least 0, got 1.5"
    ),
    "a short stream": (
        lambda: _stream(num_steps=streams.STEPS + 1),
        r"stream must return data for each of 8 inner steps, leaves \[8, ...\], got \[7, ",
    ),
    "a stream without leaves": (
        lambda: _stream(stream=lambda meta, support, key: ()),
        "stream must return data for each of 7 inner steps, .* got no leaf",
    ),
    "a carry of another structure": (
        lambda: _with_loss(lambda value, carry: (value, {"memory": carry["memory"]})),
        "carry of the inner problem must keep its structure",
    ),
    "a carry of another shape": (
        lambda: _with_loss(lambda value, carry: (value, {**carry, "memory": jnp.zeros(5)})),
        r"carry of the inner problem must keep shapes and dtypes, float32\[3\] for memory, got float32\[5\]",
    ),
    "a carry of another dtype": (
        lambda: _with_loss(lambda value, carry: (value, {**carry, "steps": 1.0 * carry["steps"]})),
        r"carry of the inner problem must keep shapes and dtypes, int32\[\] for steps, got float32\[\]",
    ),
    "no carry behind a step": (
        lambda: _with_loss(lambda value, carry: value),
        r"loss of the inner problem must return \(scalar, carry\), got a scalar alone",
    ),
    "an inner loss for each example": (
        lambda: _with_loss(lambda value, carry: (value[None], carry)),
        r"loss of the inner problem must be a scalar, got shape \(1,\)",
    ),
    "an outer loss without an aux": (
        lambda: streams.learner("prequential")._replace(outer_loss=lambda *arguments, **rest: jnp.zeros([])),
        r"outer_loss must return \(loss, metajax.Aux\(...\)\)",
    ),
    "an outer loss for each example": (
        lambda: streams.learner("prequential")._replace(
            outer_loss=lambda *arguments, **rest: (jnp.zeros(3), metajax.Aux())
        ),
        r"outer_loss must return a scalar loss, got shape \(3,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNERS)
def test_learners(name):
    make, message = LEARNERS[name]
    with pytest.raises(ValueError, match=message):
        _trace(make())


def test_data_of_a_step_needs_a_stream():
    problem, examples = _plain().problem, _CLASSES.support
    params = _plain().init(jax.random.key(0), examples.inputs)
    state = metajax.inner_init(problem)(params, examples)
    with pytest.raises(ValueError, match="data must be None for an inner problem without a stream"):
        metajax.inner_update(problem)(state, params, examples, data=examples)


def test_estimators_that_keep_a_state_are_no_primitives():
    run = hypergrad.value_and_grad(_plain(), hypergrad.persistent_truncation(1))
    params = _plain().init(jax.random.key(0), _CLASSES.support.inputs)
    with pytest.raises(ValueError, match="estimator must keep no state, which each call would lose"):
        run(params, _CLASSES)


def test_a_source_of_one_task_type_and_a_learner_of_another():
    source, spec = metajax.data.sinusoids(), metajax.data.EpisodeSpec(1, 3, 3)
    outer = metajax.outer_update(_plain(), optax.sgd(0.1), hypergrad=hypergrad.mixed_mode())
    one = metajax.data.episode(source, spec, seed=0, index=0)
    params = _plain().init(jax.random.key(0), one.support.inputs)
    message = "must be of one task type, got regression of {} and classification of learner"
    with pytest.raises(ValueError, match=message.format("source")):
        metajax.evaluation.evaluate(_plain(), params, source, spec)
    pytest.importorskip("tensorflow")
    stream = metajax.data.episodes(source, spec, batch=1, seed=0)
    state = metajax.MetaState(params, (), (), jnp.zeros([], jnp.int32), jax.random.key(0))
    with pytest.raises(ValueError, match=message.format("episodes")):
        metajax.training.fit(outer, state, stream, steps=1)
    stream.close()


def test_a_mask_of_one_example_does_not_count_for_all():
    examples = _CLASSES.support._replace(mask=jnp.ones(1, bool))
    with pytest.raises(ValueError, match=r"mask must be \[n\], one for each example, got shape \[1\]"):
        _trace(_plain(), episode=metajax.Episode(examples, _CLASSES.query))


def test_a_class_mask_that_is_too_short_is_refused():
    part = _CLASSES.support._replace(class_mask=jnp.ones(2, bool))
    outer = metajax.outer_update(_plain(), optax.sgd(0.1), hypergrad=hypergrad.mixed_mode())
    with pytest.raises(ValueError, match="targets must be labels below 2, the number of entries of class_mask, got 2"):
        outer.init(jax.random.key(0), metajax.Episode(part, part))


def test_absent_classes_and_padding_are_finite_in_half_precision():
    episode = worlds.episode(worlds.LEARNERS["maml"], dtype=np.float16)
    outer = metajax.outer_update(_plain(), optax.sgd(0.1), hypergrad=hypergrad.mixed_mode())
    params = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float16), _plain().init(jax.random.key(0), episode.support.inputs)
    )
    state = outer.init(jax.random.key(0), episode, params)
    state, metrics = jax.jit(outer.update)(state, worlds.stack([episode] * 2))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float16")}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, metrics)))


def test_parameters_of_a_weak_type_do_not_compile_twice():
    """`jnp.zeros([]) + 1.0` and its like: what `init` makes has no weak types."""
    model = metajax.Model(
        lambda key, inputs: {"w": 0.0 * jnp.asarray(inputs[0]), "b": jnp.asarray(0.5)},
        lambda params, inputs: (inputs @ params["w"])[:, None] * jnp.arange(4.0) + params["b"],
    )
    learner = metajax.learners.maml(model, optax.sgd(0.1))
    outer = metajax.outer_update(learner, optax.adam(1e-2), hypergrad=hypergrad.mixed_mode())
    state, update = outer.init(jax.random.key(0), _CLASSES), jax.jit(outer.update)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state._replace(key=state.step)))
    for _ in range(3):
        state, _ = update(state, worlds.stack([_CLASSES]))
    assert update._cache_size() == 1


_GOOD = """
    from typing import Any

    import jax
    import jax.numpy as jnp
    import optax

    import metajax


    def init(key: jax.Array, inputs: Any) -> Any:
        return jnp.zeros(3)


    def adapt(meta_params: Any, support: metajax.Examples, *, num_steps: int | None = None, key: Any = None) -> Any:
        return meta_params


    def predict(adapted: Any, inputs: Any, *, mask: Any = None, key: Any = None) -> Any:
        return inputs @ adapted


    def outer_loss(
        adapted: Any, meta_params: Any, query: metajax.Examples, *, key: Any = None
    ) -> tuple[jax.Array, metajax.Aux]:
        return jnp.zeros([]), metajax.Aux()


    def inner_init(meta_params: Any, support: metajax.Examples, key: Any) -> Any:
        return meta_params


    def inner_loss(params: Any, meta_params: Any, support: metajax.Examples, step: Any, key: Any) -> jax.Array:
        return jnp.sum(params)


    def rule(meta_params: Any) -> optax.GradientTransformation:
        return optax.sgd(0.1)


    def finalize(params: Any, meta_params: Any, support: metajax.Examples, key: Any) -> Any:
        return params


    problem = metajax.InnerProblem(inner_init, inner_loss, rule, 1, finalize)
    learner = metajax.Learner(init, adapt, predict, outer_loss, problem)
"""
_BAD = {  # the last line, and what is said of it
    "metajax.Learner(init, lambda meta_params, support: meta_params, predict, outer_loss)": 'expected "Adapt"',
    "metajax.Learner(init, adapt, lambda adapted: adapted, outer_loss)": 'expected "Predict"',
    "metajax.Learner(init, adapt, predict, inner_loss)": 'expected "OuterLoss"',
    "metajax.Learner(init, adapt, predict)": 'Missing positional argument "outer_loss"',
    "metajax.Learner(init, adapt, predict, outer_loss, {})": 'expected "InnerProblem | None"',
    "metajax.Learner(init, adapt, predict, outer_loss, objective='queries')": "expected \"Literal['query'",
    "metajax.InnerProblem(inner_init, inner_init, rule, 1, finalize)": 'expected "InnerLoss"',
    "metajax.InnerProblem(inner_init, inner_loss, lambda: optax.sgd(0.1), 1, finalize)": 'expected "InnerRule"',
}


@pytest.mark.slow
def test_a_type_checker_finds_a_wrong_signature(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "good.py").write_text(textwrap.dedent(_GOOD))
    bad = textwrap.dedent(_GOOD) + "".join(f"{line}\n" for line in _BAD)
    (tmp_path / "bad.py").write_text(bad)
    root = pathlib.Path(metajax.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", "--cache-dir=cache", "--follow-imports=silent",
         "--ignore-missing-imports", "good.py", "bad.py"],
        cwd=tmp_path, env={**os.environ, "MYPYPATH": str(root)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert not [line for line in errors if line.startswith("good.py")], done.stdout + done.stderr
    first = bad.count("\n") - len(_BAD) + 1
    for number, (line, told) in enumerate(_BAD.items(), first):
        assert [error for error in errors if error.startswith(f"bad.py:{number}:") and told in error], (line, errors)


def test_what_a_task_type_gives_is_one_number_for_each_example():
    def trained(task):
        learner = metajax.learners.maml(metajax.models.mlp(1), optax.sgd(0.1), task=task)
        examples = metajax.Examples(jnp.ones([3, 2]), jnp.ones([3, 1]), jnp.ones(3, bool))
        outer = metajax.outer_update(learner, optax.sgd(0.1), hypergrad=metajax.hypergrad.unrolled())
        state = outer.init(jax.random.key(0), metajax.Episode(examples, examples))
        return outer.update(state, worlds.stack([metajax.Episode(examples, examples)]))

    known = metajax.tasks.regression
    mae = known.metric._replace(name="mae", score=lambda outputs, targets: jnp.abs(outputs - targets))
    with pytest.raises(ValueError, match=r"metric 'mae': score\(outputs, targets\) must return one number for each"):
        trained(known._replace(metric=mae))
    with pytest.raises(ValueError, match=r"counts of the task type 'regression' must return a bool .* float32\[3, 1\]"):
        trained(known._replace(counts=lambda targets: jnp.ones_like(targets)))


def test_a_context_without_a_function_for_it():
    learner = _plain()
    update, state = metajax.inner_update(learner.problem), None
    with pytest.raises(ValueError, match="context must be None for an inner problem without one, got a context"):
        update(state, {}, _CLASSES.support, context=1)
