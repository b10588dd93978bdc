"""Memories: what stays, what is drawn and how often, against probabilities that are known."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax import replay


def _filled(memory, items, seed=0):
    state = memory.init(jax.tree.map(lambda leaf: leaf[0], items))
    return jax.jit(lambda state, items: replay.remember(memory, state, items, key=jax.random.key(seed)))(state, items)


def _chi_square(counts, expected):
    return float(np.sum(np.square(np.asarray(counts, float) - expected) / expected))


def test_every_item_of_a_stream_stays_in_a_reservoir_with_the_same_probability():
    memory, runs = replay.reservoir(5), 4000
    empty = memory.init(jnp.int32(0))
    fill = jax.jit(jax.vmap(lambda key: replay.remember(memory, empty, jnp.arange(20), key=key).items))
    held = np.asarray(fill(jax.random.split(jax.random.key(7), runs))).reshape(runs, 5)
    assert all(len(set(row)) == 5 for row in held.tolist())
    counts = np.bincount(held.reshape(-1), minlength=20)
    # 20 cells that sum to 5 runs; each varies as a draw of 5 of 20 does, 15/20 of a multinomial's 19 degrees of freedom
    statistic = _chi_square(counts, runs * 5 / 20) / (15 / 20) * 19 / 20
    assert statistic < 36.2  # the 99 % point of chi-square with 19 degrees of freedom


def test_the_first_items_of_a_reservoir_take_the_free_places_in_order():
    state = _filled(replay.reservoir(4), jnp.array([5.0, 6.0, 7.0]))
    assert state.items[0].tolist() == [5.0, 6.0, 7.0, 0.0]
    assert state.seen.tolist() == [3]


def test_a_draw_of_a_reservoir_is_uniform_without_replacement():
    memory = replay.reservoir(8)
    state = _filled(memory, jnp.arange(6))
    draw = jax.jit(jax.vmap(lambda key: memory.sample(state, 3, key=key)))
    drawn = draw(jax.random.split(jax.random.key(3), 3000))
    items = np.asarray(drawn.items)
    assert (np.asarray(drawn.weights) == 1).all()
    assert all(len(set(row)) == 3 for row in items.tolist())
    # the first of a draw is one of 6 with equal probability
    assert _chi_square(np.bincount(items[:, 0], minlength=6), 500) < 15.1  # 99 %, 5 degrees of freedom
    np.testing.assert_array_equal(state.items.reshape(-1)[drawn.indices], items)


def test_more_than_is_there_gives_weights_of_zero():
    memory = replay.reservoir(5)
    drawn = memory.sample(_filled(memory, jnp.array([3, 4])), 4, key=jax.random.key(0))
    assert sorted(drawn.items[:2].tolist()) == [3, 4]
    assert drawn.weights.tolist() == [1, 1, 0, 0]


def _of_groups(groups, slots, labels):
    memory = replay.balanced(groups, slots, lambda item: item["label"])
    items = {"label": jnp.array(labels, jnp.int32), "place": jnp.arange(len(labels))}
    return memory, _filled(memory, items)


def test_a_balanced_memory_draws_equally_from_each_group_whatever_the_stream_held():
    memory, state = _of_groups(3, 5, [0] * 40 + [1] * 10 + [2] * 5)
    assert state.seen.tolist() == [40, 10, 5]
    assert int(memory.size(state)) == 15
    draw = jax.jit(lambda key, count: memory.sample(state, count, key=key), static_argnums=1)
    singles = []
    for seed in range(20):
        drawn = draw(jax.random.key(seed), 7)
        assert sorted(np.bincount(drawn.items["label"], minlength=3).tolist()) == [2, 2, 3]
        assert len(set(drawn.indices.tolist())) == 7
        singles.append(int(draw(jax.random.key(seed), 1).items["label"][0]))
    assert set(singles) == {0, 1, 2}
    # each group is a reservoir of its own
    held = np.asarray(state.items["place"])
    assert set(held[2]) == set(range(50, 55))
    assert set(held[1]) <= set(range(40, 50))
    assert len(set(held[0])) == 5


def test_where_a_group_has_no_more_the_others_give_more():
    memory, state = _of_groups(3, 4, [0, 2, 2, 2, 2])
    drawn = memory.sample(state, 5, key=jax.random.key(0))
    assert np.bincount(drawn.items["label"], minlength=3).tolist() == [1, 0, 4]
    assert drawn.weights.tolist() == [1] * 5
    drawn = memory.sample(state, 6, key=jax.random.key(0))
    assert drawn.weights.tolist() == [1] * 5 + [0]


def test_groups_that_there_are_not_are_not_remembered():
    memory, state = _of_groups(2, 2, [-1, 2, 7, 1])
    assert state.seen.tolist() == [0, 1]
    assert np.asarray(state.items["label"]).tolist() == [[0, 0], [1, 0]]
    assert int(memory.size(state)) == 1


@pytest.mark.parametrize("exponent", [1.0, 0.5])
@pytest.mark.slow
def test_prioritised_draws_are_in_proportion_and_weights_undo_it(exponent):
    memory = replay.prioritised(8, exponent=exponent, correction=0.5, floor=1e-9)
    state = _filled(memory, jnp.arange(5.0))
    priorities = np.array([1.0, 4.0, 9.0, 16.0, 0.0])
    state = memory.update(state, jnp.arange(5), jnp.asarray(priorities))
    shares = (priorities + 1e-9) ** exponent / np.sum((priorities + 1e-9) ** exponent)
    draw = jax.jit(jax.vmap(lambda key: memory.sample(state, 1, key=key)))
    drawn = draw(jax.random.split(jax.random.key(1), 6000))
    counts = np.bincount(np.asarray(drawn.items, int)[:, 0], minlength=5)
    assert counts[4] <= 6  # a share of 6e-6, or of 3e-10
    assert _chi_square(counts[:4], 6000 * shares[:4]) < 11.4  # 99 %, 3 degrees of freedom
    # of one draw of many: (N P)^-beta over the largest; 5 items are there
    drawn = memory.sample(state, 8, key=jax.random.key(2))
    raw = (5 * shares[np.asarray(drawn.indices)]) ** -0.5
    np.testing.assert_allclose(drawn.weights, raw / raw.max(), rtol=1e-5)
    np.testing.assert_array_equal(drawn.indices, np.asarray(drawn.items, int))


def test_weights_by_hand():
    memory = replay.prioritised(2, exponent=1.0, correction=1.0, floor=1e-9)
    state = memory.update(_filled(memory, jnp.array([10.0, 20.0])), jnp.arange(2), jnp.array([1.0, 3.0]))
    # stratified: the halves of [0, 4) hold 0 or 1 by their cuts at 1; P = 1/4, 3/4; N P = 1/2, 3/2; weights 1, 1/3
    draw = jax.jit(lambda key: memory.sample(state, 2, key=key))
    drawn = [draw(jax.random.key(seed)) for seed in range(12)]
    both = next(one for one in drawn if one.items.tolist() == [10.0, 20.0])
    np.testing.assert_allclose(both.weights, [1, 1 / 3], rtol=1e-6)
    assert all(one.items[1] == 20.0 for one in drawn)  # the second half lies above 1 wholly


def test_a_new_item_has_the_highest_priority_rounded_up_and_takes_the_place_of_the_oldest():
    memory = replay.prioritised(3, exponent=1.0, floor=1e-9)
    state = memory.update(_filled(memory, jnp.arange(3.0)), jnp.arange(3), jnp.array([1.0, 7.6, 1.0]))
    state = memory.add(state, jnp.float32(3))
    assert state.experience.reshape(-1).tolist() == [3.0, 1.0, 2.0]
    draw = jax.jit(jax.vmap(lambda key: memory.sample(state, 1, key=key).items[0]))
    drawn = draw(jax.random.split(jax.random.key(1), 17000))
    counts = np.bincount(np.asarray(drawn, int), minlength=4)
    assert counts[0] == 0
    expected = 17000 * np.array([7.6, 1, 8]) / 16.6
    assert _chi_square(counts[1:], expected) < 9.2  # 99 %, 2 degrees of freedom


def test_priorities_of_places_where_nothing_is_stay_zero():
    memory = replay.prioritised(4)
    state = memory.update(_filled(memory, jnp.array([1.0])), jnp.array([0, 2, 3]), jnp.array([1.0, 50.0, 50.0]))
    assert int(memory.size(state)) == 1
    assert memory.sample(state, 4, key=jax.random.key(0)).items.tolist() == [1.0] * 4


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_bad_priorities_are_refused_or_under_jit_the_floor(bad):
    memory = replay.prioritised(2, exponent=1.0, floor=0.5)
    state = _filled(memory, jnp.array([1.0, 2.0]))
    with pytest.raises(ValueError, match="priorities must be finite numbers of at least 0, got"):
        memory.update(state, jnp.arange(2), jnp.array([bad, 1.0]))
    state = jax.jit(memory.update)(state, jnp.arange(2), jnp.array([bad, 1.0]))
    np.testing.assert_allclose(state.sum_tree_state.nodes, [2.0, 0.5, 1.5])


_KINDS = {
    "reservoir": lambda **options: replay.reservoir(3, **options),
    "balanced": lambda **options: replay.balanced(1, 3, lambda item: 0, **options),
    "prioritised": lambda **options: replay.prioritised(3, **options),
}


@pytest.mark.parametrize("kind", _KINDS)
def test_an_empty_memory(kind):
    memory = _KINDS[kind]()
    state = memory.init(jnp.zeros(2))
    assert int(memory.size(state)) == 0
    with pytest.raises(ValueError, match="state must hold an item to draw, got an empty memory"):
        memory.sample(state, 2, key=jax.random.key(0))
    drawn = jax.jit(lambda state: memory.sample(state, 2, key=jax.random.key(0)))(state)
    assert drawn.weights.tolist() == [0, 0]
    assert drawn.items.shape == (2, 2)


@pytest.mark.parametrize("kind", _KINDS)
def test_bad_counts_and_items(kind):
    memory = _KINDS[kind]()
    state = memory.add(memory.init(jnp.zeros(2)), jnp.zeros(2), key=jax.random.key(0))
    for count in (0, 1.5):
        with pytest.raises(ValueError, match="count must be an integer of at least 1, got"):
            memory.sample(state, count, key=jax.random.key(0))
    with pytest.raises(ValueError, match="count must be at most the capacity of the memory, 3, got 4"):
        memory.sample(state, 4, key=jax.random.key(0))
    for item in (jnp.zeros(3), jnp.zeros(2, int), (jnp.zeros(2),)):
        with pytest.raises(ValueError, match=r"item must have the structure, shapes and dtypes of the example: f"):
            memory.add(state, item, key=jax.random.key(0))


@pytest.mark.parametrize("kind", _KINDS)
def test_what_is_not_kept_changes_nothing(kind):
    memory = _KINDS[kind]()
    state = memory.add(memory.init(jnp.float32(0)), jnp.float32(1), key=jax.random.key(0))
    after = jax.jit(memory.add)(state, jnp.float32(2), key=jax.random.key(1), keep=jnp.array(False))
    jax.tree.map(np.testing.assert_array_equal, state, after)


@pytest.mark.parametrize("kind", _KINDS)
def test_bytes_are_known_before_anything_is_allocated(kind):
    state = _KINDS[kind]().init(jnp.zeros(2))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    jax.tree.map(np.testing.assert_array_equal, _KINDS[kind](max_bytes=size).init(jnp.zeros(2)), state)
    with pytest.raises(ValueError, match=f"it takes {size} bytes, and {size - 1} max_bytes allows"):
        _KINDS[kind](max_bytes=size - 1).init(jnp.zeros(2))
    shape = jax.ShapeDtypeStruct((2**50,), jnp.float32)
    with pytest.raises(ValueError, match=r"it takes \d{16,} bytes, and \d+ are free"):
        jax.eval_shape(_KINDS[kind]().init, shape)


def test_bad_settings():
    for make in (replay.reservoir, replay.prioritised):
        for capacity in (0, -1, 2.5, True):
            with pytest.raises(ValueError, match="capacity must be an integer of at least 1, got"):
                make(capacity)
        with pytest.raises(ValueError, match="max_bytes must be an integer of at least 1, got 0"):
            make(1, max_bytes=0)
    with pytest.raises(ValueError, match="groups must be an integer of at least 1, got 0"):
        replay.balanced(0, 3, lambda item: 0)
    with pytest.raises(ValueError, match="slots must be an integer of at least 1, got 0"):
        replay.balanced(2, 0, lambda item: 0)
    for name in ("exponent", "correction"):
        with pytest.raises(ValueError, match=f"{name} must be a number from 0 to 1, got 1.5"):
            replay.prioritised(3, **{name: 1.5})
        with pytest.raises(ValueError, match=f"{name} must be a number from 0 to 1, got -1"):
            replay.prioritised(3, **{name: -1})
    with pytest.raises(ValueError, match="floor must be a finite number above 0, got 0"):
        replay.prioritised(3, floor=0)
    with pytest.raises(ValueError, match="memory must be of type Memory, got None"):
        replay.remember(None, (), jnp.zeros(2), key=jax.random.key(0))


def test_flashbax_is_asked_for_where_it_is_needed_and_no_earlier(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashbax", None)
    replay.reservoir(3)
    for make in (lambda: replay.prioritised(3), lambda: replay.sequences(3, 2)):
        with pytest.raises(ImportError, match=r"need flashbax: install metajax\[replay\]"):
            make()
