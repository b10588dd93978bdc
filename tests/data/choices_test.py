"""Random choices from bits: exact arithmetic, uniformity, and the same in NumPy and JAX."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from metajax.data import _choices as choices


def bits(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, shape, dtype=np.uint32)


@pytest.mark.parametrize("count", [1, 2, 3, 1000, 65535, 65536, 65537, 10**6, 2**31 - 1])
def test_below_is_the_high_word_of_the_product(count):
    numbers = np.concatenate([bits(500), np.array([0, 1, 2**16 - 1, 2**16, 2**31, 2**32 - 1], np.uint32)])
    expected = [int(number) * count >> 32 for number in numbers]
    assert choices.below(numbers, count).tolist() == expected
    assert choices.below(jnp.asarray(numbers), count).tolist() == expected
    assert max(expected) < count


def test_below_broadcasts_counts():
    counts = np.array([1, 10, 100])
    assert choices.below(bits(4, 3), counts).tolist() == choices.below(jnp.asarray(bits(4, 3)), counts).tolist()


def test_uniform_never_reaches_one():
    assert choices.uniform(np.array([0, 255, 2**32 - 1], np.uint32)).tolist() == [0.0, 0.0, 1 - 2**-24]
    assert choices.uniform(bits(3)).dtype == choices.uniform(jnp.asarray(bits(3))).dtype == np.float32
    assert stats.kstest(choices.uniform(bits(5000)), "uniform").pvalue > 1e-3


@pytest.mark.parametrize(("count", "taken"), [(5, 3), (3, 3), (1, 1)])
def test_distinct_gives_every_sequence_equally_often(count, taken):
    drawn = choices.distinct(bits(6000, taken), np.full(6000, count))
    sequences = list(itertools.permutations(range(count), taken))
    seen = dict.fromkeys(sequences, 0)
    for line in drawn.tolist():
        seen[tuple(line)] += 1
    if len(seen) > 1:
        assert stats.chisquare(list(seen.values())).pvalue > 1e-3


@pytest.mark.parametrize("taken", [1, 7, 40, 90])  # below and above where JAX loops
def test_distinct_is_the_same_on_the_device(taken):
    counts = np.array([[taken, taken + 1, 5 * taken], [10**6, 2**30, taken + 9]])
    numbers = bits(2, 3, taken)
    drawn = choices.distinct(numbers, counts)
    assert (drawn < counts[..., None]).all()
    assert all(len(set(line)) == taken for line in drawn.reshape(-1, taken).tolist())
    np.testing.assert_array_equal(jax.jit(choices.distinct)(numbers, counts), drawn)


def test_distinct_of_too_few_begins_with_all_of_them():
    drawn = choices.distinct(bits(200, 6), np.full(200, 4))
    assert all(sorted(line) == [0, 1, 2, 3] for line in drawn[:, :4].tolist())


def test_shuffled_puts_valid_ones_first_in_any_order():
    valid = np.array([True, False, True, True, False])
    drawn = choices.shuffled(bits(6000, 5), valid)
    assert all(sorted(line[3:]) == [1, 4] for line in drawn.tolist())
    seen = dict.fromkeys(itertools.permutations([0, 2, 3]), 0)
    for line in drawn[:, :3].tolist():
        seen[tuple(line)] += 1
    assert stats.chisquare(list(seen.values())).pvalue > 1e-3
    np.testing.assert_array_equal(jax.jit(choices.shuffled)(bits(6000, 5), valid), drawn)


def test_ties_keep_their_order_everywhere():
    keys = bits(50, 40) % 3
    expected = np.argsort(keys, axis=-1, kind="stable")
    np.testing.assert_array_equal(choices.order(keys), expected)
    np.testing.assert_array_equal(choices.order(jnp.asarray(keys)), expected)


def test_at_takes_one_index_for_all_or_one_for_each():
    values = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(choices.at(values, np.array([3, 0])), values[:, [3, 0]])
    np.testing.assert_array_equal(choices.at(values, np.array([[3], [0], [1]])), [[3], [4], [9]])
    np.testing.assert_array_equal(choices.at(values[0], np.array([[3], [0]])), [[3], [0]])
