"""The inner loop: one engine that adaptation and every explicit estimator share.

What differs between estimators is how the loop is run and differentiated (a `Loop`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metajax.core import _keys, _losses, _tree, _validate
from metajax.core._types import Examples, InnerLosses, InnerProblem, Params


class InnerState(NamedTuple):
    """What an inner step carries.

    Attributes:
      params: fast weights.
      opt_state: state of the inner optimizer.
      step: int32 scalar, inner steps taken.
      carry: of the inner problem, `()` where it has none.

    >>> InnerState._fields
    ('params', 'opt_state', 'step', 'carry')
    """

    params: Params
    opt_state: Any
    step: jax.Array
    carry: Any = ()


class InnerResult(NamedTuple):
    """What an inner loop gives.

    Attributes:
      initial: first fast weights.
      params: last fast weights.
      carry: last carry.
      adapted: what predict needs.
      losses: the inner losses, before each step.
      visits: `[num_steps]`, what `visit` said after each step; `()` without one.
    """

    initial: Params
    params: Params
    carry: Any
    adapted: Any
    losses: InnerLosses
    visits: Any = ()


class Arguments(NamedTuple):
    """What stays the same over an inner loop.

    Attributes:
      meta_params: the meta-parameters, or the part of them that is differentiated.
      frozen: the rest of them, where they are split.
      support: the support set.
      key: PRNG key of the steps or None.
      context: of the inner problem, `()` where it has none.
      query: what `visit` reads besides.
    """

    meta_params: Params
    frozen: Params
    support: Examples
    key: Any
    context: Any = ()
    query: Any = None

    @property
    def full(self) -> Params:
        """All meta-parameters."""
        return _tree.fill(self.meta_params, self.frozen)


class Steps(NamedTuple):
    """What differs from step to step, leaves `[num_steps, ...]`, or of one step `[...]`.

    Attributes:
      data: of the stream, None without one.
      valid: bool, False for a step whose data is all padding; None where every step counts.
    """

    data: Any = None
    valid: Any = None


class Rest(NamedTuple):
    """What an inner loss reads and no estimator differentiates."""

    frozen: Params
    support: Examples
    step: jax.Array
    key: Any
    valid: Any


# (params, carry, arguments, steps taken) -> scalar
Visit = Callable[[Params, Any, Arguments, jax.Array], jax.Array]
# (problem, start, arguments, steps, num_steps, visit) -> (end, (losses [num_steps], visits [num_steps]))
Loop = Callable[..., tuple[InnerState, tuple[jax.Array, Any]]]
# (loss) -> (*loss_inputs) -> ((loss, carry), (gradient with respect to params, loss as the update rule reads it))
Gradient = Callable[[Callable[..., Any]], Callable[..., Any]]


def step_loss(problem: InnerProblem) -> Callable[..., tuple[jax.Array, Any]]:
    """The inner loss of a step: `(params, meta_params, context, carry, data, rest) -> (scalar, carry)`.

    What may be differentiated comes first. A step that is not valid has the loss 0 and leaves the carry as it is.
    """

    def loss(
        params: Params, meta_params: Params, context: Any, carry: Any, data: Any, rest: Rest
    ) -> tuple[jax.Array, Any]:
        keywords = _keywords(problem, context=context, carry=carry, stream=data)
        full = _tree.fill(meta_params, rest.frozen)
        found = problem.loss(params, full, rest.support, rest.step, rest.key, **keywords)
        value, after = _checked_loss(problem, found, carry)
        if rest.valid is not None:
            # where, not a product: what padding makes of the loss may be NaN
            value, after = select(rest.valid, (value, after), (jnp.zeros_like(value), carry))
        return value, after

    return loss


def _keywords(problem: InnerProblem, **values: Any) -> dict[str, Any]:
    """Keywords of the fields that a problem has; a stream is passed as `data`."""
    return {
        "data" if name == "stream" else name: value
        for name, value in values.items()
        if getattr(problem, name) is not None
    }


def _checked_loss(problem: InnerProblem, found: Any, carry: Any) -> tuple[jax.Array, Any]:
    """The loss and the carry after it.

    Raises:
      ValueError: the loss is no scalar, or the carry is not of the form that it had.
    """
    pair = isinstance(found, tuple) and len(found) == 2
    if (problem.carry is not None) != pair:
        wanted = "(scalar, carry)" if problem.carry is not None else "a scalar, for a problem without a carry"
        shapes = jax.tree.map(jnp.shape, found)
        got = "a scalar alone" if shapes == () else f"shapes {shapes}"
        raise ValueError(f"loss of the inner problem must return {wanted}, got {got}")
    value, after = found if pair else (found, ())
    if jnp.shape(value) != ():
        raise ValueError(f"loss of the inner problem must be a scalar, got shape {jnp.shape(value)}")
    before, now = (str(jax.tree.structure(tree)) for tree in (carry, after))
    if before != now:
        raise ValueError(f"carry of the inner problem must keep its structure, {before}, got {now}")
    for path, old, new in zip(_tree.paths(carry), jax.tree.leaves(carry), jax.tree.leaves(after), strict=True):
        kinds = [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in (old, new)]
        if kinds[0] != kinds[1]:
            (shape, dtype), (new_shape, new_dtype) = kinds
            raise ValueError(
                f"carry of the inner problem must keep shapes and dtypes, {dtype.name}{list(shape)} for "
                f"{path or 'it'}, got {new_dtype.name}{list(new_shape)}"
            )
    return jnp.asarray(value), jax.tree.map(jnp.asarray, after)


def loss_inputs(state: InnerState, arguments: Arguments, inputs: Steps) -> tuple[Any, ...]:
    """What `step_loss` takes at a state; `inputs` are those of the step."""
    rest = Rest(arguments.frozen, arguments.support, state.step, _keys.fold(arguments.key, state.step), inputs.valid)
    return state.params, arguments.meta_params, arguments.context, state.carry, inputs.data, rest


def apply_gradient(
    problem: InnerProblem, state: InnerState, grads: Params, loss: jax.Array, carry: Any, arguments: Arguments,
    valid: Any = None,
) -> InnerState:  # fmt: skip
    """The update rule: the state after a step whose inner gradient and whose next carry are known."""
    optimizer = optax.with_extra_args_support(problem.optimizer(arguments.full))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=loss)
    after = optax.apply_updates(state.params, updates), opt_state
    if valid is not None:
        after = select(valid, after, (state.params, state.opt_state))
    return InnerState(*after, state.step + 1, carry)


def select(condition: jax.Array, yes: Any, no: Any) -> Any:
    """One of two trees.

    >>> int(select(True, 1, 2))
    1
    """
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def plain_gradient(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The inner gradient as JAX differentiates it."""
    gradient = jax.value_and_grad(loss, has_aux=True)

    def run(*inputs: Any) -> Any:
        (value, carry), grads = gradient(*inputs)
        return (value, carry), (grads, value)

    return run


def scan_loop(
    gradient: Gradient = plain_gradient,
    wrap: Callable[..., Any] = lambda step: step,
    block: int = 1,
    unroll: int = 1,
) -> Loop:
    """A loop that JAX differentiates by itself.

    Args:
      gradient: how the gradient of the inner loss is taken.
      wrap: applied to functions `(state, arguments, steps) -> (state, outputs)`, to a step and to a block of steps,
        such as `jax.checkpoint`.
      block: how many steps are wrapped together.
      unroll: how many steps are written out one after the other in the program.
    """

    def loop(
        problem: InnerProblem, start: InnerState, arguments: Arguments, steps: Steps, num_steps: int,
        visit: Visit | None = None,
    ) -> tuple[InnerState, tuple[jax.Array, Any]]:  # fmt: skip
        inner_gradient = gradient(step_loss(problem))

        @wrap
        def step(state: InnerState, arguments: Arguments, inputs: Steps) -> tuple[InnerState, tuple[jax.Array, Any]]:
            (loss, carry), (grads, value) = inner_gradient(*loss_inputs(state, arguments, inputs))
            state = apply_gradient(problem, state, grads, value, carry, arguments, inputs.valid)
            return state, (loss, visit(state.params, carry, arguments, state.step) if visit else ())

        def several(state: InnerState, arguments: Arguments, steps: Steps, length: int) -> tuple[InnerState, Any]:
            return jax.lax.scan(
                lambda state, inputs: step(state, arguments, inputs), state, steps, length=length, unroll=unroll
            )

        if num_steps == 0:  # not a scan, which has no turns under jax.disable_jit
            one = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), steps)
            shapes = jax.eval_shape(step, start, arguments, one)[1]
            return start, jax.tree.map(lambda leaf: jnp.zeros((0, *leaf.shape), leaf.dtype), shapes)
        if block == 1:
            return several(start, arguments, steps, num_steps)
        whole, left = num_steps - num_steps % block, num_steps % block
        blocks = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, block, *leaf.shape[1:]), steps)
        run = wrap(lambda state, arguments, steps: several(state, arguments, steps, block))
        state, outputs = jax.lax.scan(
            lambda state, steps: run(state, arguments, steps), start, blocks, length=num_steps // block
        )
        outputs = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)
        if left:
            run = wrap(lambda state, arguments, steps: several(state, arguments, steps, left))
            state, last = run(state, arguments, jax.tree.map(lambda leaf: leaf[whole:], steps))
            outputs = jax.tree.map(lambda *parts: jnp.concatenate(parts), outputs, last)
        return state, outputs

    return loop


def context_of(problem: InnerProblem, meta_params: Params, support: Examples, keys: _keys.AdaptationKeys) -> Any:
    """The context of a task, `()` where the problem has none."""
    return () if problem.context is None else problem.context(meta_params, support, keys.context)


def params_of(
    problem: InnerProblem, meta_params: Params, support: Examples, keys: _keys.AdaptationKeys, context: Any
) -> Params:
    """The first fast weights."""
    return problem.init(meta_params, support, keys.init, **_keywords(problem, context=context))


def start_of(
    problem: InnerProblem, meta_params: Params, support: Examples, keys: _keys.AdaptationKeys, context: Any
) -> InnerState:
    """The state before the first step."""
    keywords = _keywords(problem, context=context)
    params = params_of(problem, meta_params, support, keys, context)
    carry = () if problem.carry is None else problem.carry(meta_params, support, keys.carry, **keywords)
    opt_state = problem.optimizer(meta_params).init(params)
    return InnerState(params, opt_state, jnp.zeros([], jnp.int32), _tree.strong(carry))


def steps_of(
    problem: InnerProblem, meta_params: Params, support: Examples, keys: _keys.AdaptationKeys, num_steps: int
) -> Steps:
    """What the steps of a task read.

    Raises:
      ValueError: the stream has no data, or none for some of the steps.
    """
    if problem.stream is None:
        return Steps()
    data = problem.stream(meta_params, support, keys.stream)
    shapes = {path: jnp.shape(leaf) for path, leaf in zip(_tree.paths(data), jax.tree.leaves(data), strict=True)}
    short = [f"{list(shape)} of {path or 'it'}" for path, shape in shapes.items() if not shape or shape[0] < num_steps]
    if short or not shapes:
        raise ValueError(
            f"stream must return data for each of {num_steps} inner steps, leaves [{num_steps}, ...], got "
            f"{', '.join(short) or 'no leaf'}"
        )
    return jax.tree.map(lambda leaf: leaf[:num_steps], _steps_that_count(data, first=1))


def _steps_that_count(data: Any, *, first: int) -> Steps:
    """The data of steps without what stands in padding, and which steps count.

    Args:
      data: of one step, or of all.
      first: axes in front of those of the examples: 0 for one step, 1 for all.
    """
    if not isinstance(data, Examples):
        return Steps(data)
    mask = jnp.asarray(data.mask)
    inputs, targets = _losses.clear_padding((data.inputs, data.targets), mask)
    return Steps(
        data._replace(inputs=inputs, targets=targets, mask=mask), jnp.any(mask, axis=tuple(range(first, mask.ndim)))
    )


def without_padding(support: Any) -> Any:
    """The support set, zeros in its padding: no function of an inner problem sees what stands there.

    Leaves that do not begin with the axes of the mask are no examples, and stay as they are. None stays None, for a
    problem that reads no support set.
    """
    if support is None:
        return None
    inputs, targets = _losses.clear_padding((support.inputs, support.targets), support.mask, strict=False)
    return support._replace(inputs=inputs, targets=targets)


def finalize(
    problem: InnerProblem, params: Params, carry: Any, arguments: Arguments, keys: _keys.AdaptationKeys, taken: Any
) -> Any:
    """What predict needs, after so many steps."""
    keywords = _keywords(problem, carry=carry, context=arguments.context)
    return problem.finalize(params, arguments.full, arguments.support, _keys.fold(keys.end, taken), **keywords)


def inner_init(problem: InnerProblem) -> Callable[..., InnerState]:
    """The start of an inner loop: `(meta_params, support, *, key=None) -> InnerState`.

    The key is that of `learner.adapt`, and serves the whole loop.

    >>> import jax.numpy as jnp, optax, metajax
    >>> model = metajax.Model(lambda key, x: jnp.zeros([3, 2]), lambda w, x: x @ w)
    >>> learner = metajax.learners.maml(model, inner=optax.sgd(0.1))
    >>> examples = metajax.Examples(jnp.ones([2, 3]), jnp.array([0, 1]), jnp.ones(2, bool))
    >>> int(metajax.inner_init(learner.problem)(jnp.zeros([3, 2]), examples).step)
    0
    """

    def init(meta_params: Params, support: Examples, *, key: Any = None) -> InnerState:
        keys, support = _keys.of_adaptation(key), without_padding(support)
        return start_of(problem, meta_params, support, keys, context_of(problem, meta_params, support, keys))

    return init


def inner_update(problem: InnerProblem) -> Callable[..., InnerState]:
    """One inner step: `(state, meta_params, support, key=None, *, data=None, context=None) -> state`.

    `state` is from `inner_init`, and the key the same in each step: n steps are `learner.adapt(..., num_steps=n)`.
    Where the problem has a stream, a step reads its own data from it; beyond its end, parameters, optimizer and carry
    stay as they are. `data=` gives the data of this step instead, such as a chunk of a document that has just arrived,
    and `context=` spares computing the context anew. A problem that reads no support set takes None for it. The loss
    of a chunk before its step is `problem.loss(state.params, ...)`, and what predictions need is
    `problem.finalize(state.params, ...)`.

    >>> import jax.numpy as jnp, optax, metajax
    >>> model = metajax.Model(lambda key, x: jnp.zeros([3, 2]), lambda w, x: x @ w)
    >>> learner = metajax.learners.maml(model, inner=optax.sgd(0.1))
    >>> examples = metajax.Examples(jnp.ones([2, 3]), jnp.array([0, 1]), jnp.ones(2, bool))
    >>> state = metajax.inner_init(learner.problem)(jnp.zeros([3, 2]), examples)
    >>> int(metajax.inner_update(learner.problem)(state, jnp.zeros([3, 2]), examples).step)
    1
    """
    loop = scan_loop()

    def update(
        state: InnerState, meta_params: Params, support: Examples, key: Any = None, *, data: Any = None,
        context: Any = None,
    ) -> InnerState:  # fmt: skip
        keys, support, given = _keys.of_adaptation(key), without_padding(support), context is not None
        if not given:
            context = context_of(problem, meta_params, support, keys)
        if data is not None and problem.stream is None:
            raise ValueError("data must be None for an inner problem without a stream, got data of a step")
        if given and problem.context is None:
            raise ValueError("context must be None for an inner problem without one, got a context")
        if data is not None:
            inputs = _steps_that_count(data, first=0)
        else:
            steps = steps_of(problem, meta_params, support, keys, problem.num_steps)
            inputs = jax.tree.map(lambda leaf: leaf[state.step], steps)
            if problem.stream is not None:
                within = state.step < problem.num_steps
                inputs = inputs._replace(valid=within if inputs.valid is None else within & inputs.valid)
        one = jax.tree.map(lambda leaf: leaf[None], inputs)
        return loop(problem, state, Arguments(meta_params, None, support, keys.step, context), one, 1)[0]

    return update


def unroll(
    problem: InnerProblem,
    meta_params: Params,
    support: Examples,
    *,
    key: Any = None,
    num_steps: int | None = None,
    frozen: Params = None,
    loop: Loop | None = None,
    visit: Visit | None = None,
    query: Any = None,
) -> InnerResult:
    """Runs the whole inner loop of one task.

    Args:
      problem: what is optimised.
      meta_params: the meta-parameters, or the part of them that is differentiated.
      support: the support set.
      key: PRNG key; None is deterministic.
      num_steps: instead of `problem.num_steps`; 0 returns the initial fast weights, finalized.
      frozen: the rest of the meta-parameters where they are split.
      loop: how it is run and differentiated; `scan_loop()` by default.
      visit: a scalar of the fast weights after each step.
      query: what `visit` finds in `arguments.query`.

    Raises:
      ValueError: `num_steps` is negative or no integer; or the stream is too short.
    """
    num_steps = _validate.int_at_least("num_steps", problem.num_steps if num_steps is None else num_steps, 0)
    full, keys, support = _tree.fill(meta_params, frozen), _keys.of_adaptation(key), without_padding(support)
    context = context_of(problem, full, support, keys)
    start = start_of(problem, full, support, keys, context)
    # a start that devices share (zeros, frozen parameters) adapts to the task of each
    start = _tree.vary(start, _tree.varying_axes((full, support)))
    steps = steps_of(problem, full, support, keys, num_steps)
    arguments = Arguments(meta_params, frozen, support, keys.step, context, query)
    state, (values, visits) = (loop or scan_loop())(problem, start, arguments, steps, num_steps, visit)
    adapted = finalize(problem, state.params, state.carry, arguments, keys, num_steps)
    return InnerResult(start.params, state.params, state.carry, adapted, inner_losses(values, steps), visits)


def inner_losses(values: jax.Array, steps: Steps) -> InnerLosses:
    """Inner losses with the steps that count."""
    return InnerLosses(values, jnp.ones(values.shape, bool) if steps.valid is None else steps.valid)


def adaptation(problem: InnerProblem) -> Callable[..., Any]:
    """The `adapt` of a learner that adapts by its inner loop alone."""

    def adapt(meta_params: Params, support: Examples, *, num_steps: int | None = None, key: Any = None) -> Any:
        return unroll(problem, meta_params, support, key=key, num_steps=num_steps).adapted

    return adapt
