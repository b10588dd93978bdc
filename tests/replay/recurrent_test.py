"""Recurrent replay: stretches with their stored states, and burn-in, by hand and on a small recurrent network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metajax import replay


def _leaky(rate, state, step):
    """A linear network that forgets: `rate * state + input`."""
    return rate * state + step, state


def test_burn_in_by_hand():
    # 8 -> 0.5 * 8 + 1 = 5 -> 0.5 * 5 + 2 = 4.5
    state, rest = replay.burn_in(_leaky, 0.5, jnp.float32(8), {"x": jnp.arange(1.0, 5)}["x"], 2)
    assert (float(state), rest.tolist()) == (4.5, [3.0, 4.0])
    state, rest = replay.burn_in(_leaky, 0.5, jnp.float32(8), jnp.arange(1.0, 5), 0)
    assert (float(state), rest.tolist()) == (8.0, [1.0, 2.0, 3.0, 4.0])


def test_no_gradient_goes_through_burn_in():
    def after(rate, start, steps):
        state, rest = replay.burn_in(_leaky, rate, start, jnp.arange(1.0, 4), steps)
        return jax.lax.scan(lambda state, step: _leaky(rate, state, step), state, rest)[0]

    # after two steps of burn-in the state is 4.5, and the one that is left gives 4.5 * rate + 3
    assert jax.grad(after, argnums=(0, 1))(0.5, 8.0, 2) == (4.5, 0.0)


def test_burn_in_lessens_the_error_of_a_stored_state_as_the_network_forgets():
    inputs = jnp.array([1.0, -2.0, 0.5, 3.0, 1.0, 2.0])
    stored = jax.lax.scan(lambda state, step: _leaky(0.9, state, step), jnp.float32(4), inputs)[1]  # of old parameters
    true = jax.lax.scan(lambda state, step: _leaky(0.5, state, step), jnp.float32(4), inputs)[1]  # of the present ones
    for steps in range(4):
        state, _ = replay.burn_in(_leaky, 0.5, stored[2], inputs[2:], steps)
        np.testing.assert_allclose(state - true[2 + steps], 0.5**steps * (stored[2] - true[2]), rtol=1e-5)


@pytest.mark.parametrize(("period", "starts"), [(1, [7, 8, 9, 10, 11, 12]), (2, [8, 10, 12])])
def test_stretches_are_whole_and_of_one_row_also_when_the_ring_is_full(period, starts):
    memory = replay.sequences(8, 3, rows=2, period=period, exponent=0.0)
    state = memory.init({"time": jnp.int32(0), "state": jnp.zeros(2)})
    add = jax.jit(memory.add)
    for first in (0, 5, 10):  # 15 steps: 7 to 14 are there
        time = first + jnp.arange(5) + jnp.array([[0], [100]])
        state = add(state, {"time": time, "state": jnp.stack([time, -time], axis=-1).astype(jnp.float32)})
    assert int(memory.size(state)) == 2 * len(starts)
    draw = jax.jit(jax.vmap(lambda key: memory.sample(state, 1, key=key)))
    drawn = draw(jax.random.split(jax.random.key(0), 1200))
    time = np.asarray(drawn.items["time"])[:, 0]
    np.testing.assert_array_equal(time, time[:, :1] + np.arange(3))
    np.testing.assert_array_equal(drawn.items["state"][:, 0], np.stack([time, -time], axis=-1))
    assert (np.asarray(drawn.weights) == 1).all()
    found, counts = np.unique(time[:, 0], return_counts=True)
    assert found.tolist() == [*starts, *(100 + start for start in starts)]
    expected = 1200 / len(found)
    assert np.sum(np.square(counts - expected)) / expected < {12: 24.7, 6: 15.1}[len(found)]  # 99 %


def test_a_stretch_of_large_error_is_drawn_more_often():
    memory = replay.sequences(6, 2, exponent=1.0, floor=1e-9)
    state = memory.add(memory.init(jnp.float32(0)), jnp.arange(5.0)[None])  # stretches begin at 0 to 3
    errors = jnp.array([[1.0, 1.0], [2.0, 4.0], [0.0, 0.0], [1.0, 1.0]])
    priorities = replay.sequence_priority(errors, mix=0.5)
    np.testing.assert_allclose(priorities, [1.0, 3.5, 0.0, 1.0])
    state = memory.update(state, jnp.arange(4), priorities)
    draw = jax.jit(jax.vmap(lambda key: memory.sample(state, 1, key=key).items[0, 0]))
    counts = np.bincount(np.asarray(draw(jax.random.split(jax.random.key(1), 5500)), int), minlength=4)
    assert counts[2] == 0
    expected = 5500 * np.array([1.0, 3.5, 1.0]) / 5.5
    assert np.sum(np.square(counts[[0, 1, 3]] - expected) / expected) < 9.2  # 99 %, 2 degrees of freedom


def test_nothing_is_drawn_before_a_stretch_is_whole():
    memory = replay.sequences(4, 3)
    add = jax.jit(memory.add)
    state = add(memory.init(0.0), jnp.ones([1, 2]))
    with pytest.raises(ValueError, match="state must hold an item to draw"):
        memory.sample(state, 1, key=jax.random.key(0))
    assert jax.jit(lambda state: memory.sample(state, 1, key=jax.random.key(0)))(state).weights.tolist() == [0]
    state = add(state, 2 * jnp.ones([1, 1]))
    assert memory.sample(state, 1, key=jax.random.key(0)).items.tolist() == [[1.0, 1.0, 2.0]]


def test_burn_in_helps_a_recurrent_regression_whose_states_were_stored_while_it_learned():
    """A network learns to follow a leaky sum, from stretches that hold the states of its former parameters."""
    length, steps, size = 20, 10, 8

    def apply(params, state, step):
        state = jnp.tanh(params["state"] @ state + params["input"] * step["x"])
        return state, params["out"] @ state

    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "state": 0.3 * jax.random.normal(keys[0], (size, size)),
        "input": jax.random.normal(keys[1], (size,)),
        "out": 0.3 * jax.random.normal(keys[2], (size,)),
    }
    x = jax.random.normal(keys[3], (400,))
    _, y = jax.lax.scan(lambda total, x: (0.7 * total + x, 0.7 * total + x), 0.0, x)

    def run(params, state, sequence):
        def one(state, step):
            after, output = apply(params, state, step)
            return after, (state, output)

        return jax.lax.scan(one, state, sequence)[1]

    stream = {"x": x, "y": 0.3 * y}
    memory = replay.sequences(400, length, period=10, exponent=0.0)
    stored, _ = run(params, jnp.zeros(size), stream)  # those of the parameters of the beginning
    held = memory.init({"x": 0.0, "y": 0.0, "state": jnp.zeros(size)})
    held = memory.add(held, jax.tree.map(lambda leaf: leaf[None], {**stream, "state": stored}))
    optimizer = optax.adam(0.01)

    def loss(params, stretch):
        state, rest = replay.burn_in(apply, params, stretch["state"][0], stretch, steps)
        return jnp.mean(jnp.square(run(params, state, rest)[1] - rest["y"]))

    @jax.jit
    def train(params, opt_state, key):
        drawn = memory.sample(held, 4, key=key).items
        value, grads = jax.value_and_grad(lambda params: jnp.mean(jax.vmap(loss, (None, 0))(params, drawn)))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, losses = optimizer.init(params), []
    for number in range(150):
        params, opt_state, value = train(params, opt_state, jax.random.key(number))
        losses.append(float(value))
    assert np.mean(losses[-20:]) < 0.1 * np.mean(losses[:5])

    true, _ = run(params, jnp.zeros(size), stream)
    starts = np.arange(20, 380, 10)
    burnt = jax.vmap(lambda state, x: replay.burn_in(apply, params, state, {"x": x}, steps)[0])(
        stored[starts], x[starts[:, None] + np.arange(length)]
    )
    errors = [np.linalg.norm(found - true[starts + steps], axis=1) for found in (stored[starts + steps], burnt)]
    assert np.mean(errors[1]) < 0.2 * np.mean(errors[0])


def test_bad_input():
    with pytest.raises(ValueError, match="steps must be below the length of the sequence, 3, got 3"):
        replay.burn_in(_leaky, 0.5, 0.0, jnp.zeros(3), 3)
    with pytest.raises(ValueError, match="steps must be an integer of at least 0, got -1"):
        replay.burn_in(_leaky, 0.5, 0.0, jnp.zeros(3), -1)
    for name, rest in (("capacity", (0, 1)), ("length", (3, 0))):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
            replay.sequences(*rest)
    for name in ("rows", "period"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
            replay.sequences(4, 2, **{name: 0})
    for capacity, period in ((3, 1), (7, 2)):
        with pytest.raises(ValueError, match=f"at least the length 4 and a multiple of the period {period}, got"):
            replay.sequences(capacity, 4, period=period)
    with pytest.raises(ValueError, match="period must be at most the length 2"):
        replay.sequences(6, 2, period=3)
    with pytest.raises(ValueError, match="mix must be a number from 0 to 1, got 2"):
        replay.sequence_priority(jnp.ones(3), mix=2)
    memory = replay.sequences(4, 2, rows=2)
    state = memory.init({"x": 0.0, "y": 0.0})
    for x, y in (([2, 5], [2, 5]), ([1, 3], [1, 3]), ([2, 3], [2, 2]), ([2, 0], [2, 0]), ([2], [2])):
        with pytest.raises(ValueError, match="steps must have 2 rows of one number of steps from 1 to 4, got leading"):
            memory.add(state, {"x": jnp.zeros(x), "y": jnp.zeros(y)})
    with pytest.raises(ValueError, match="item must have the structure, shapes and dtypes of the example"):
        memory.add(state, {"x": jnp.zeros([2, 1]), "y": jnp.zeros([2, 1], int)})
    with pytest.raises(ValueError, match="count must be at most the capacity of the memory, 8, got 9"):
        memory.sample(state, 9, key=jax.random.key(0))
