"""The implicit hypergradient: closed forms, the rate at which it converges, solvers, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds
from jax.flatten_util import ravel_pytree

import metajax
from metajax import hypergrad

SOLVERS = {
    "cg": hypergrad.implicit(steps=60, tol=1e-13),
    "gmres": hypergrad.implicit("gmres", steps=12),
    "neumann": hypergrad.implicit("neumann", steps=3000, tol=1e-13, rate=0.2),
}
LINEAR = metajax.Model(lambda key, x: jnp.zeros([x.shape[-1], 1]), lambda w, x: x @ w)


def gradient(learner, estimator):
    return jax.jit(hypergrad.value_and_grad(learner, estimator))


def learner_of(loss, *, start=None, outer_loss=None, rule=None, num_steps=1):
    """A learner of a user's own, from an inner loss `(params, meta_params, support)`."""
    problem = metajax.InnerProblem(
        lambda meta, support, key: meta["start"] if start is None else start,
        lambda params, meta, support, step, key: loss(params, meta, support),
        lambda meta: rule or optax.sgd(0.1), num_steps, lambda params, meta, support, key: (params, meta),
    )  # fmt: skip
    outer_loss = outer_loss or (lambda adapted, meta, query: 0.5 * jnp.sum((adapted[0] - query.targets) ** 2))

    def described(adapted, meta, query, *, key=None):
        return outer_loss(adapted, meta, query), metajax.Aux(query.targets)

    return metajax.Learner(None, None, None, described, problem)


def regression(seed=0):
    rng = np.random.default_rng(seed)
    parts = [(rng.normal(size=(7, 3)), rng.normal(size=7)) for _ in range(2)]
    examples = [metajax.Examples(jnp.array(x), jnp.array(y), jnp.ones(7, bool)) for x, y in parts]
    return metajax.Episode(*examples), *parts[0], *parts[1]


@pytest.mark.parametrize("solver", SOLVERS)
def test_ridge_regression(solver, x64):
    """A learned ridge and offset; `finish` and the outer loss read them besides; the start is forgotten."""

    def outer_loss(adapted, meta, query):
        weights, given = adapted
        return jnp.mean((query.inputs @ weights + given["offset"] - query.targets) ** 2) + 0.1 * meta["ridge"] ** 2

    learner = learner_of(
        lambda w, meta, support: jnp.mean((support.inputs @ w + meta["offset"] - support.targets) ** 2)
        + jnp.exp(meta["ridge"]) * jnp.sum(w**2),
        outer_loss=outer_loss, rule=optax.sgd(0.2), num_steps=300,
    )  # fmt: skip
    episode, x, y, query, answers = regression()
    ridge, offset = -1.5, 0.3
    meta = {"offset": jnp.array(offset), "ridge": jnp.array(ridge), "start": jnp.ones(3)}
    (loss, aux), grads = gradient(learner, SOLVERS[solver])(meta, episode)

    hessian = 2 * x.T @ x / 7 + 2 * np.exp(ridge) * np.eye(3)
    weights = np.linalg.solve(hessian, 2 * x.T @ (y - offset) / 7)
    errors = query @ weights + offset - answers
    solution = np.linalg.solve(hessian, 2 * query.T @ errors / 7)
    np.testing.assert_allclose(loss, np.mean(errors**2) + 0.1 * ridge**2, rtol=1e-12)
    np.testing.assert_allclose(grads["ridge"], 0.2 * ridge - 2 * np.exp(ridge) * weights @ solution, rtol=1e-10)
    np.testing.assert_allclose(grads["offset"], np.mean(2 * errors) - 2 * np.mean(x @ solution), rtol=1e-10)
    np.testing.assert_array_equal(grads["start"], 0)
    assert aux.metrics["solver_residual"] < 1e-12
    assert aux.metrics["inner_grad_norm"] < 1e-12
    assert aux.metrics["inner_loss"].shape == (300,)


@pytest.mark.parametrize("solver", SOLVERS)
def test_proximal_maml(solver, x64):
    """Whatever the number of steps: the Hessian of a quadratic is the same everywhere."""
    learner = metajax.learners.maml(LINEAR, optax.sgd(0.1), 2, proximal=0.7, loss=metajax.core.squared_error)
    episode, x, y, query, answers = regression()
    episode = jax.tree.map(lambda leaf: leaf[:, None] if leaf.shape == (7,) and leaf.dtype == float else leaf, episode)
    start = np.array([[0.5], [-1.0], [2.0]])
    (_, aux), grads = gradient(learner, SOLVERS[solver])(jnp.array(start), episode)
    slope = lambda w: 2 * x.T @ (x @ w - y[:, None]) / 7 + 0.7 * (w - start)  # noqa: E731
    weights = start - 0.1 * slope(start)
    weights = weights - 0.1 * slope(weights)
    outer = 2 * query.T @ (query @ weights - answers[:, None]) / 7
    expected = 0.7 * np.linalg.solve(2 * x.T @ x / 7 + 0.7 * np.eye(3), outer)
    np.testing.assert_allclose(grads, expected, rtol=1e-10)
    np.testing.assert_allclose(aux.metrics["inner_grad_norm"], np.linalg.norm(slope(weights)), rtol=1e-12)


def dense(name, ridge):
    """The definition with matrices: `(gradient, largest eigenvalue)`."""
    learner, params, episode = worlds.LEARNERS[name].learner, worlds.parameters(worlds.LEARNERS[name]), episode_of(name)
    problem = learner.problem
    end = adapted_weights(name)
    point, unravel = ravel_pytree(end)
    flat, unravel_meta = ravel_pytree(params)

    @jax.jit
    def parts(point, flat):
        def inner(point, flat):
            return problem.loss(unravel(point), unravel_meta(flat), episode.support, 0, None)

        def outer(point, flat):
            meta = unravel_meta(flat)
            return learner.outer_loss(
                problem.finalize(unravel(point), meta, episode.support, None), meta, episode.query
            )

        slopes = jax.grad(outer, argnums=(0, 1), has_aux=True)(point, flat)[0]
        return slopes, jax.hessian(inner)(point, flat), jax.jacobian(jax.grad(inner), argnums=1)(point, flat)

    (outer, direct), hessian, mixed = parts(point, flat)
    hessian = np.asarray(hessian) + ridge * np.eye(len(point))
    eigenvalues = np.linalg.eigvalsh(hessian)
    assert eigenvalues[0] > 0
    return unravel_meta(direct - np.asarray(mixed).T @ np.linalg.solve(hessian, outer)), eigenvalues[-1]


def episode_of(name, seed=0):
    return worlds.episode(worlds.LEARNERS[name], seed)


def adapted_weights(name):
    """The fast weights after the loop by hand."""
    row = worlds.LEARNERS[name]
    weights = worlds.by_hand(name)[0]
    pick = lambda path: row.adapts is None or worlds.path_name(path).startswith(row.adapts)  # noqa: E731
    return jax.tree.map_with_path(lambda path, leaf: leaf if pick(path) else None, weights)


@functools.cache
def implicit_of(name, solver):
    """The compiled primitive of a row whose Hessian is made positive definite."""
    estimators = {
        "cg": hypergrad.implicit(steps=100, tol=1e-12, ridge=1.0),
        "gmres": hypergrad.implicit("gmres", steps=60, ridge=1.0),
        "neumann": hypergrad.implicit("neumann", steps=400, tol=1e-12, ridge=1.0, rate=0.3),
    }
    return gradient(worlds.LEARNERS[name].learner, estimators[solver])


@pytest.mark.parametrize("name", worlds.few_by_default(["anil", "maml_proximal"], lambda name: name == "anil"))
def test_solvers_agree_with_a_dense_solution(name, x64):
    """Cross-entropy of a network, far from converged, with padding and an absent class."""
    params, episode = worlds.parameters(worlds.LEARNERS[name]), episode_of(name)
    expected, largest = dense(name, 1.0)
    assert largest < 2 / 0.3, "the Neumann series would diverge"
    for solver in SOLVERS:
        (loss, aux), grads = implicit_of(name, solver)(params, episode)
        assert worlds.relative_distance(grads, expected) < 1e-9, solver
        assert aux.metrics["solver_residual"] < 1e-11
        np.testing.assert_allclose(loss, worlds.outer_loss(name)(params, episode), rtol=1e-12)


def test_converges_to_the_exact_hypergradient_at_the_rate_of_the_inner_problem(x64):
    """Logistic regression with a proximal term: the error falls by 1 - rate * (smallest eigenvalue) a step."""
    rate, proximal, start = 0.3, 0.2, jnp.array([0.5, -1.0])

    def loss(params, meta, support):
        margins = support.targets * (support.inputs @ params)
        return jnp.mean(jnp.logaddexp(0, -margins)) + 0.5 * proximal * jnp.sum((params - meta["start"]) ** 2)

    def outer_loss(adapted, meta, query):
        return jnp.mean(jnp.logaddexp(0, -query.targets * (query.inputs @ adapted[0])))

    episode, *_ = regression()
    features = lambda part: part._replace(inputs=part.inputs[:, :2] * jnp.array([3.0, 0.5]))  # noqa: E731
    signs = lambda part: part._replace(targets=jnp.sign(part.targets))  # noqa: E731
    episode = metajax.Episode(*(signs(features(part)) for part in episode))

    def of(estimator, steps):
        learner = learner_of(loss, outer_loss=outer_loss, rule=optax.sgd(rate), num_steps=steps)
        (_, aux), grads = gradient(learner, estimator)({"start": start}, episode)
        return aux, grads["start"]

    @jax.jit
    def hessian_at_the_end(params):
        inner = lambda params: loss(params, {"start": start}, episode.support)  # noqa: E731
        step = lambda _, params: params - rate * jax.grad(inner)(params)  # noqa: E731
        return jax.hessian(inner)(jax.lax.fori_loop(0, 600, step, params))

    smallest, largest = np.linalg.eigvalsh(hessian_at_the_end(start))
    assert largest < 1 / rate
    _, converged = of(hypergrad.unrolled(), 600)
    counts, falling = np.array([60, 90, 120]), []
    for steps in counts:
        aux, grads = of(hypergrad.implicit(tol=1e-14), int(steps))
        exact = of(hypergrad.unrolled(), int(steps))[1]
        distances = (worlds.relative_distance(grads, other) for other in (converged, exact))
        falling.append([*distances, float(aux.metrics["inner_grad_norm"])])
    slopes = np.polyfit(counts, np.log(falling), 1)[0]
    np.testing.assert_allclose(slopes, np.log(1 - rate * smallest), rtol=0.03)


def quadratic(matrix):
    """Inner loss `w A w / 2 - w meta`: the right-hand side is what the outer loss says, the mixed derivative -1."""
    learner = learner_of(lambda w, meta, support: 0.5 * w @ matrix @ w - w @ meta["pull"], start=jnp.zeros(len(matrix)))
    return learner


def solution_of(matrix, estimator, target):
    """What a solver makes of a linear system, and the residual that it reports."""
    zeros = jnp.zeros(len(matrix))
    examples = metajax.Examples(zeros, -jnp.array(target), jnp.ones(len(matrix), bool))
    (_, aux), grads = gradient(quadratic(jnp.array(matrix)), estimator)(
        {"pull": zeros}, metajax.Episode(examples, examples)
    )
    return np.asarray(grads["pull"]), float(aux.metrics["solver_residual"])


TARGET = np.array([1.0, -2.0, 0.5, 3.0])


def bowl(seed=0):
    root = np.random.default_rng(seed).normal(size=(4, 4))
    return root @ root.T + 0.1 * np.eye(4)


@pytest.mark.parametrize(
    ("solver", "rate"), [("cg", None), ("gmres", None), ("neumann", 0.05)]
)  # fmt: skip
def test_a_solver_stopped_early_reports_its_residual(solver, rate, x64):
    matrix, ridge = bowl(), 0.2
    estimator = hypergrad.implicit(solver, steps=2, tol=0.0, ridge=ridge, rate=rate)
    solution, reported = solution_of(matrix, estimator, TARGET)
    system = matrix + ridge * np.eye(4)
    residual = np.linalg.norm(TARGET - system @ solution) / np.linalg.norm(TARGET)
    np.testing.assert_allclose(reported, residual, rtol=1e-10)
    assert reported > 0.05

    krylov = np.stack([TARGET, system @ TARGET], axis=1)
    expected = {
        "cg": krylov @ np.linalg.solve(krylov.T @ system @ krylov, krylov.T @ TARGET),  # smallest error in energy
        "gmres": krylov @ np.linalg.lstsq(system @ krylov, TARGET)[0],  # smallest residual
        "neumann": 0.05 * (2 * TARGET - 0.05 * system @ TARGET),
    }[solver]
    np.testing.assert_allclose(solution, expected, rtol=1e-10)


@pytest.mark.parametrize(("solver", "rate"), [("cg", None), ("neumann", 0.1)])
def test_a_solver_stops_at_its_tolerance(solver, rate, x64):
    loose = solution_of(bowl(), hypergrad.implicit(solver, steps=5000, tol=0.6, rate=rate), TARGET)[1]
    tight = solution_of(bowl(), hypergrad.implicit(solver, steps=5000, tol=1e-9, rate=rate), TARGET)[1]
    assert 0.1 < loose <= 0.6
    assert tight <= 1e-9


def test_an_indefinite_hessian(x64):
    """GMRES solves it; conjugate gradients end with the solution so far, here after one step and before the first."""
    matrix = np.diag([1.0, -0.5, 3.0, 0.5])
    solution, residual = solution_of(matrix, hypergrad.implicit("gmres", steps=6), TARGET)
    np.testing.assert_allclose(solution, np.linalg.solve(matrix, TARGET), rtol=1e-10)
    assert residual < 1e-12
    one_step = (TARGET @ TARGET) / (TARGET @ matrix @ TARGET) * TARGET
    solution, residual = solution_of(matrix, hypergrad.implicit(steps=10), TARGET)
    np.testing.assert_allclose(solution, one_step, rtol=1e-12)
    assert residual > 0.1
    solution, residual = solution_of(-matrix @ matrix, hypergrad.implicit(steps=10), TARGET)
    np.testing.assert_array_equal(solution, 0)
    assert residual == 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_singular_hessian_gives_finite_numbers(solver, x64):
    solution, residual = solution_of(np.diag([1.0, 0.0, 3.0, 0.5]), SOLVERS[solver], TARGET)
    assert np.all(np.isfinite(solution))
    assert residual > 0.1


def test_a_diverging_series_is_refused_where_asked(x64):
    accepting = hypergrad.implicit("neumann", steps=20, rate=1.0)
    refusing = hypergrad.implicit("neumann", steps=20, rate=1.0, max_residual=0.5)
    solution, residual = solution_of(bowl(), accepting, TARGET)
    assert residual > 1
    assert np.all(np.isfinite(solution))
    solution, residual = solution_of(bowl(), refusing, TARGET)
    assert residual > 1
    assert np.all(np.isnan(solution))
    solution, _ = solution_of(bowl(), hypergrad.implicit(max_residual=1e-4), TARGET)
    np.testing.assert_allclose(solution, np.linalg.solve(bowl(), TARGET), rtol=1e-8)


def test_memory_does_not_grow_with_the_number_of_inner_steps():
    few, many = worlds.bytes_by_steps(SOLVERS["cg"], optax.sgd(0.1))
    assert few > 200 * 32 * 4
    assert abs(many - few) < 8192  # the inner losses, one number a step


@pytest.mark.parametrize("name", worlds.WITHOUT_PROBLEM)
def test_needs_an_inner_problem(name, x64):
    with pytest.raises(ValueError, match=r"hypergrad: implicit\(\) needs a learner with an inner problem"):
        worlds.trace(name, hypergrad.implicit())


ZERO = r"hypergrad: implicit\(\) would be zero, because the inner loss does not depend .* proximal= term"


@pytest.mark.parametrize("name", ["maml", "reptile"])
def test_a_start_alone_is_refused(name, x64):
    with pytest.raises(ValueError, match=ZERO):
        worlds.trace(name, hypergrad.implicit())


INDEPENDENT = {
    "not at all": lambda w, meta: jnp.sum(w**2),
    "under jit": jax.jit(lambda w, meta: jnp.sum(w**2)),
    "stopped": lambda w, meta: jnp.sum(w**2 * jax.lax.stop_gradient(meta["pull"])),
    "beside the fast weights": lambda w, meta: jnp.sum(w**2) + jnp.sum(meta["pull"] ** 2),
    "in a scan": lambda w, meta: jax.lax.scan(
        lambda carry, x: ((carry[0] + jnp.sum(w**2) * x, carry[1] + jnp.sum(meta["pull"]) * x), None),
        (0.0, 0.0), jnp.ones(3),
    )[0][0],
}  # fmt: skip


@pytest.mark.parametrize("kind", INDEPENDENT)
@pytest.mark.parametrize("jit", [False, True])
def test_an_inner_loss_that_does_not_depend_on_the_meta_parameters_is_refused(kind, jit):
    learner = learner_of(lambda w, meta, support: INDEPENDENT[kind](w, meta), start=jnp.ones(2))
    examples = metajax.Examples(jnp.ones(2), jnp.ones(2), jnp.ones(2, bool))
    fn = hypergrad.value_and_grad(learner, hypergrad.implicit())
    with pytest.raises(ValueError, match=ZERO):
        (jax.jit(fn) if jit else fn)({"pull": jnp.ones(2)}, metajax.Episode(examples, examples))


def test_the_frozen_part(x64):
    """Of ANIL, the body alone can be trained so; the head alone is a start and refused."""
    row = worlds.LEARNERS["anil"]
    params, episode = worlds.parameters(row), worlds.episode(row)
    _, whole = implicit_of("anil", "cg")(params, episode)
    none = lambda tree: jax.tree.map(lambda _: None, tree)  # noqa: E731
    body = {name: value if name != "head" else none(value) for name, value in params.items()}
    head = {name: value if name == "head" else none(value) for name, value in params.items()}
    estimator = hypergrad.implicit(steps=100, tol=1e-12, ridge=1.0)

    def grads(trained, frozen):
        return estimator.value_and_grad(row.learner, trained, (), episode, frozen=frozen)[1]

    got = jax.jit(grads)(body, head)
    assert jax.tree.structure(got) == jax.tree.structure(body)
    assert worlds.relative_distance(got["layer_0"], whole["layer_0"]) < 1e-12
    with pytest.raises(ValueError, match=ZERO):
        jax.eval_shape(grads, head, body)


def test_tasks_under_vmap_and_scan_agree(x64):
    """Tasks whose solvers stop after different numbers of products."""
    row, estimator = worlds.LEARNERS["anil"], hypergrad.implicit(steps=100, tol=1e-3, ridge=1.0)
    params, tasks = worlds.parameters(row), worlds.stack([worlds.episode(row, seed) for seed in range(4)])
    one = lambda episode: hypergrad.value_and_grad(row.learner, estimator)(params, episode)  # noqa: E731
    together = jax.jit(jax.vmap(one))(tasks)
    apart = jax.jit(lambda tasks: jax.lax.map(one, tasks))(tasks)
    assert worlds.relative_distance(together, apart) < 1e-12
    assert len(set(np.asarray(together[0][1].metrics["solver_residual"]).tolist())) == 4


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_a_solver_carries_keeps_its_type_under_shard_map(solver):
    row = worlds.LEARNERS["anil"]
    outer = metajax.outer_update(row.learner, optax.sgd(0.1), hypergrad=SOLVERS[solver])
    outer = metajax.parallel.shard(outer, metajax.parallel.make_mesh(devices=jax.devices()[:2]))
    episode = worlds.episode(row, dtype=np.float32)
    state = outer.init(jax.random.key(0), episode, params=worlds.parameters(row, dtype=np.float32))
    after, _ = jax.eval_shape(outer.update, state, worlds.stack([episode] * 2))
    assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize("solver", SOLVERS)
def test_padding_and_nan(solver, x64):
    name = "anil"
    params, episode = worlds.parameters(worlds.LEARNERS[name]), episode_of(name)
    fn = implicit_of(name, solver)
    (loss, _), grads = fn(params, episode)

    (same_loss, _), same = fn(params, metajax.Episode(*(worlds.with_nan(part, ~part.mask) for part in episode)))
    assert same_loss == loss
    assert worlds.relative_distance(same, grads) == 0

    first = jnp.arange(8) == 0
    (bad_loss, bad_aux), bad = fn(params, episode._replace(support=worlds.with_nan(episode.support, first)))
    assert np.isnan(bad_loss)
    assert np.isnan(bad_aux.metrics["solver_residual"])
    assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(bad["layer_0"]))

    nothing = lambda part: part._replace(mask=jnp.zeros_like(part.mask))  # noqa: E731
    _, unadapted = fn(params, episode._replace(support=nothing(episode.support)))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(unadapted))
    assert worlds.dot(unadapted, unadapted) > 0
    (no_loss, no_aux), unjudged = fn(params, episode._replace(query=nothing(episode.query)))
    assert (no_loss, no_aux.metrics["solver_residual"], worlds.dot(unjudged, unjudged)) == (0, 0, 0)


@pytest.mark.parametrize("solver", ["cg", "gmres"])
def test_no_support_without_a_ridge(solver, x64):
    """The Hessian is zero: no system to solve, and no NaN."""
    row = worlds.LEARNERS["anil"]
    episode = worlds.episode(row)
    episode = episode._replace(support=episode.support._replace(mask=jnp.zeros(8, bool)))
    (_, aux), grads = gradient(row.learner, hypergrad.implicit(solver))(worlds.parameters(row), episode)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
    np.testing.assert_allclose(aux.metrics["solver_residual"], 1, rtol=1e-12)


@pytest.mark.slow
def test_nan_without_a_mixed_product_that_shows_it(x64):
    """Of proximal MAML the gradient is the solution alone: it must not stop at a finite one."""
    row = worlds.LEARNERS["maml_proximal"]
    episode = worlds.episode(row)
    spoiled = episode.support._replace(inputs=episode.support.inputs.at[0].set(jnp.nan))
    for solver in SOLVERS:
        _, grads = implicit_of("maml_proximal", solver)(worlds.parameters(row), episode._replace(support=spoiled))
        assert np.isnan(worlds.dot(grads, grads)), solver


def test_zero_inner_steps(x64):
    """The formula at the start."""
    learner = learner_of(
        lambda w, meta, support: 0.5 * jnp.sum(w**2) - w @ meta["pull"], start=jnp.ones(2), num_steps=0
    )
    examples = metajax.Examples(jnp.ones(2), jnp.array([3.0, 5.0]), jnp.ones(2, bool))
    meta = {"pull": jnp.zeros(2)}
    (_, aux), grads = gradient(learner, hypergrad.implicit())(meta, metajax.Episode(examples, examples))
    np.testing.assert_allclose(grads["pull"], [-2.0, -4.0], rtol=1e-12)
    np.testing.assert_allclose(aux.metrics["inner_grad_norm"], 2**0.5, rtol=1e-12)
    assert aux.metrics["inner_loss"].shape == (0,)


def test_low_precision_is_solved_in_float32():
    learner = metajax.learners.maml(LINEAR, optax.sgd(0.1), 2, proximal=0.7, loss=metajax.core.squared_error)
    ones = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    examples = metajax.Examples(ones(7, 3), ones(7, 1), jax.ShapeDtypeStruct([7], jnp.bool))
    for solver in SOLVERS:
        fn = hypergrad.value_and_grad(learner, SOLVERS[solver])
        (_, aux), grads = jax.eval_shape(fn, ones(3, 1), metajax.Episode(examples, examples))
        assert grads.dtype == jnp.bfloat16
        assert aux.metrics["solver_residual"].dtype == jnp.float32


def test_minibatches_are_drawn_once_for_all_products():
    """A proximal term over minibatches: the system is one that can be solved, and the key decides which."""
    model = metajax.models.mlp(worlds.WAYS, hidden=())

    def noisy(params, meta, support, step, key):
        inputs = support.inputs + (0 if key is None else jax.random.normal(key, support.inputs.shape))
        return jnp.mean((model.apply(params, inputs) - 1.0) ** 2) + optax.tree.norm(
            jax.tree.map(jnp.subtract, params, meta), squared=True
        )

    learner = metajax.learners.maml(model, optax.sgd(0.1), 2)
    learner = learner._replace(problem=learner.problem._replace(loss=noisy))
    examples = worlds.examples(0, 6, 0, dtype=np.float32)
    params = learner.init(jax.random.key(0), examples.inputs)
    fn, episode = gradient(learner, hypergrad.implicit(steps=40)), metajax.Episode(examples, examples)
    (_, aux), first = fn(params, episode, key=jax.random.key(1))
    _, again = fn(params, episode, key=jax.random.key(1))
    _, other = fn(params, episode, key=jax.random.key(2))
    assert aux.metrics["solver_residual"] < 1e-4
    assert worlds.relative_distance(first, again) == 0
    assert worlds.relative_distance(other, first) > 1e-3


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: hypergrad.implicit("lu"), "solver must be one of 'cg', 'neumann', 'gmres', got 'lu'"),
        (lambda: hypergrad.implicit(steps=0), "steps must be an integer of at least 1, got 0"),
        (lambda: hypergrad.implicit(tol=-1.0), "tol must be a finite number of at least 0, got -1.0"),
        (lambda: hypergrad.implicit(ridge=float("nan")), "ridge must be a finite number of at least 0, got nan"),
        (lambda: hypergrad.implicit(max_residual=0), "max_residual must be a finite number above 0, got 0"),
        (lambda: hypergrad.implicit("neumann"), "rate must be a finite number above 0, got None"),
        (lambda: hypergrad.implicit(rate=0.1), 'rate must be None except with solver="neumann", got 0.1'),
    ],
)
def test_bad_arguments(make, text):
    with pytest.raises(ValueError, match=text):
        make()
