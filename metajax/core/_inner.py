"""The inner loop: one implementation that adaptation and all explicit estimators share.

Estimators differ in how they run and differentiate the loop (a `Loop`).
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
    """State that is passed from one inner step to the next.

    Attributes:
      params: fast weights.
      opt_state: state of the inner optimizer.
      step: int32 scalar, number of inner steps taken.
      carry: carry of the inner problem, `()` if it has none.

    >>> InnerState._fields
    ('params', 'opt_state', 'step', 'carry')
    """

    params: Params
    opt_state: Any
    step: jax.Array
    carry: Any = ()


class InnerResult(NamedTuple):
    """Result of an inner loop.

    Attributes:
      initial: initial fast weights.
      params: final fast weights.
      carry: final carry.
      adapted: input of `predict`.
      losses: inner losses, each computed before its step.
      visits: `[num_steps]`, outputs of `visit` after each step; `()` if there is no `visit`.
    """

    initial: Params
    params: Params
    carry: Any
    adapted: Any
    losses: InnerLosses
    visits: Any = ()


class Arguments(NamedTuple):
    """Values that stay the same during an inner loop.

    Attributes:
      meta_params: the meta-parameters, or the part of them that is differentiated.
      frozen: the rest of the meta-parameters, if they are split.
      support: the support set.
      key: PRNG key of the steps or None.
      context: context of the inner problem, `()` if it has none.
      query: additional input of `visit`.
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
    """Values that differ between steps: leaves `[num_steps, ...]`, or `[...]` for a single step.

    Attributes:
      data: data of the stream, None if there is no stream.
      valid: bool, False for a step whose data is all padding; None if every step counts.
    """

    data: Any = None
    valid: Any = None


class Rest(NamedTuple):
    """Inputs of an inner loss that no estimator differentiates."""

    frozen: Params
    support: Examples
    step: jax.Array
    key: Any
    valid: Any


# (params, carry, arguments, steps taken) -> scalar
Visit = Callable[[Params, Any, Arguments, jax.Array], jax.Array]
# (problem, start, arguments, steps, num_steps, visit) -> (end, (losses [num_steps], visits [num_steps]))
Loop = Callable[..., tuple[InnerState, tuple[jax.Array, Any]]]
# (loss) -> (*loss_inputs) -> ((loss, carry), (gradient with respect to params, loss that the update rule reads))
Gradient = Callable[[Callable[..., Any]], Callable[..., Any]]


def step_loss(problem: InnerProblem) -> Callable[..., tuple[jax.Array, Any]]:
    """Returns the inner loss of a step: `(params, meta_params, context, carry, data, rest) -> (scalar, carry)`.

    The arguments that may be differentiated come first. An invalid step has loss 0 and does not change the carry.
    """

    def loss(
        params: Params, meta_params: Params, context: Any, carry: Any, data: Any, rest: Rest
    ) -> tuple[jax.Array, Any]:
        keywords = _keywords(problem, context=context, carry=carry, stream=data)
        full = _tree.fill(meta_params, rest.frozen)
        found = problem.loss(params, full, rest.support, rest.step, rest.key, **keywords)
        value, after = _checked_loss(problem, found, carry)
        if rest.valid is not None:
            # `where` instead of a product, because the loss of padding may be NaN
            value, after = select(rest.valid, (value, after), (jnp.zeros_like(value), carry))
        return value, after

    return loss


def _keywords(problem: InnerProblem, **values: Any) -> dict[str, Any]:
    """Returns the keywords of the fields that are set in a problem; a stream is passed as `data`."""
    return {
        "data" if name == "stream" else name: value
        for name, value in values.items()
        if getattr(problem, name) is not None
    }


def _checked_loss(problem: InnerProblem, found: Any, carry: Any) -> tuple[jax.Array, Any]:
    """Returns the loss and the next carry.

    Raises:
      ValueError: the loss is not a scalar, or the carry changed its structure, shapes or dtypes.
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
    """Returns the inputs of `step_loss` at a state; `inputs` belong to the step."""
    rest = Rest(arguments.frozen, arguments.support, state.step, _keys.fold(arguments.key, state.step), inputs.valid)
    return state.params, arguments.meta_params, arguments.context, state.carry, inputs.data, rest


def apply_gradient(
    problem: InnerProblem, state: InnerState, grads: Params, loss: jax.Array, carry: Any, arguments: Arguments,
    valid: Any = None,
) -> InnerState:  # fmt: skip
    """Applies the update rule: returns the state after a step, given its inner gradient and the next carry."""
    optimizer = optax.with_extra_args_support(problem.optimizer(arguments.full))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=loss)
    after = optax.apply_updates(state.params, updates), opt_state
    if valid is not None:
        after = select(valid, after, (state.params, state.opt_state))
    return InnerState(*after, state.step + 1, carry)


def select(condition: jax.Array, yes: Any, no: Any) -> Any:
    """Selects one of two trees.

    >>> int(select(True, 1, 2))
    1
    """
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def plain_gradient(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the inner gradient that `jax.value_and_grad` computes."""
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
    """Returns a loop without a custom derivative: JAX differentiates it.

    Args:
      gradient: computes the gradient of the inner loss.
      wrap: wrapper of a step and of a block of steps, both functions `(state, arguments, steps) -> (state, outputs)`,
        such as `jax.checkpoint`.
      block: number of steps that are wrapped together.
      unroll: number of steps that are unrolled in the program.
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

        if num_steps == 0:  # no scan, because jax.disable_jit does not support a scan of length 0
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
    """Returns the context of a task, `()` if the problem has none."""
    return () if problem.context is None else problem.context(meta_params, support, keys.context)


def params_of(
    problem: InnerProblem, meta_params: Params, support: Examples, keys: _keys.AdaptationKeys, context: Any
) -> Params:
    """Returns the initial fast weights."""
    return problem.init(meta_params, support, keys.init, **_keywords(problem, context=context))


def start_of(
    problem: InnerProblem, meta_params: Params, support: Examples, keys: _keys.AdaptationKeys, context: Any
) -> InnerState:
    """Returns the state before the first step."""
    keywords = _keywords(problem, context=context)
    params = params_of(problem, meta_params, support, keys, context)
    carry = () if problem.carry is None else problem.carry(meta_params, support, keys.carry, **keywords)
    opt_state = problem.optimizer(meta_params).init(params)
    return InnerState(params, opt_state, jnp.zeros([], jnp.int32), _tree.strong(carry))


def steps_of(
    problem: InnerProblem, meta_params: Params, support: Examples, keys: _keys.AdaptationKeys, num_steps: int
) -> Steps:
    """Returns the step inputs of a task.

    Raises:
      ValueError: the stream has no data, or no data for some of the steps.
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
    """Returns the data of steps with cleared padding, and which steps count.

    Args:
      data: data of one step, or of all steps.
      first: number of axes before the example axes: 0 for one step, 1 for all steps.
    """
    if not isinstance(data, Examples):
        return Steps(data)
    mask = jnp.asarray(data.mask)
    inputs, targets = _losses.clear_padding((data.inputs, data.targets), mask)
    return Steps(
        data._replace(inputs=inputs, targets=targets, mask=mask), jnp.any(mask, axis=tuple(range(first, mask.ndim)))
    )


def without_padding(support: Any) -> Any:
    """Returns the support set with zeros in its padding, so that no function of an inner problem reads padding values.

    Leaves that do not begin with the axes of the mask are not examples and are returned unchanged. None is returned
    as None, for a problem that reads no support set.
    """
    if support is None:
        return None
    inputs, targets = _losses.clear_padding((support.inputs, support.targets), support.mask, strict=False)
    return support._replace(inputs=inputs, targets=targets)


def finalize(
    problem: InnerProblem, params: Params, carry: Any, arguments: Arguments, keys: _keys.AdaptationKeys, taken: Any
) -> Any:
    """Returns the input of `predict` after `taken` steps."""
    keywords = _keywords(problem, carry=carry, context=arguments.context)
    return problem.finalize(params, arguments.full, arguments.support, _keys.fold(keys.end, taken), **keywords)


def inner_init(problem: InnerProblem) -> Callable[..., InnerState]:
    """Returns a function that starts an inner loop: `(meta_params, support, *, key=None) -> InnerState`.

    The key is the key of `learner.adapt` and is used for the whole loop.

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
    """Returns one inner step: `(state, meta_params, support, key=None, *, data=None, context=None) -> state`.

    `inner_init` returns the first `state`. Pass the same key to each step: n steps then equal
    `learner.adapt(..., num_steps=n)`. If the problem has a stream, each step reads its own data from it; after the
    end of the stream, a step does not change parameters, optimizer state or carry. `data=` passes the data of this step
    instead, such as a chunk of a document that has just arrived. `context=` passes the context, which is then not
    computed again. The support set is None for a problem that reads none. `problem.loss(state.params, ...)` is the
    loss of a chunk before its step, and `problem.finalize(state.params, ...)` returns the input of `predict`.

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
      problem: the inner problem.
      meta_params: the meta-parameters, or the part of them that is differentiated.
      support: the support set.
      key: PRNG key; None is deterministic.
      num_steps: replaces `problem.num_steps`; 0 returns the initial fast weights, finalized.
      frozen: the rest of the meta-parameters, if they are split.
      loop: runs the steps and defines how they are differentiated; `scan_loop()` by default.
      visit: computes a scalar from the fast weights after each step.
      query: passed to `visit` as `arguments.query`.

    Raises:
      ValueError: `num_steps` is negative or not an integer; or the stream is too short.
    """
    num_steps = _validate.int_at_least("num_steps", problem.num_steps if num_steps is None else num_steps, 0)
    full, keys, support = _tree.fill(meta_params, frozen), _keys.of_adaptation(key), without_padding(support)
    context = context_of(problem, full, support, keys)
    start = start_of(problem, full, support, keys, context)
    # a start that the devices share (zeros, frozen parameters) adapts to a different task on each device
    start = _tree.vary(start, _tree.varying_axes((full, support)))
    steps = steps_of(problem, full, support, keys, num_steps)
    arguments = Arguments(meta_params, frozen, support, keys.step, context, query)
    state, (values, visits) = (loop or scan_loop())(problem, start, arguments, steps, num_steps, visit)
    adapted = finalize(problem, state.params, state.carry, arguments, keys, num_steps)
    return InnerResult(start.params, state.params, state.carry, adapted, inner_losses(values, steps), visits)


def inner_losses(values: jax.Array, steps: Steps) -> InnerLosses:
    """Returns the inner losses, marked with the steps that count."""
    return InnerLosses(values, jnp.ones(values.shape, bool) if steps.valid is None else steps.valid)


def adaptation(problem: InnerProblem) -> Callable[..., Any]:
    """Returns the `adapt` function of a learner that adapts only by its inner loop."""

    def adapt(meta_params: Params, support: Examples, *, num_steps: int | None = None, key: Any = None) -> Any:
        return unroll(problem, meta_params, support, key=key, num_steps=num_steps).adapted

    return adapt
