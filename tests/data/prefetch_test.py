"""Batches on their way to the device: order, positions, errors, and restarts in other numbers of processes."""

import jax
import numpy as np
import pytest
import worlds
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metajax.data import EpisodeSpec, batches, episode_batch, episodes, prefetch_to_device, sinusoids

_WAVES, _SPEC = sinusoids(), EpisodeSpec(ways=1, shots=4, queries=3)


class _Counting:
    """A stream of numbers that counts what was taken from it, and raises where it is told to."""

    def __init__(self, stop=100, fails=()):
        self.position, self.closed, self._stop, self._fails = 0, 0, stop, fails

    def __iter__(self):
        return self

    def __next__(self):
        if self.position == self._stop:
            raise StopIteration
        self.position += 1
        if self.position - 1 in self._fails:
            raise OSError(f"batch {self.position - 1} is damaged")
        return {"x": np.full(3, self.position - 1, np.uint8)}

    def close(self):
        self.closed += 1


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batches_come_in_order_and_a_few_are_ahead(size):
    stream = _Counting(stop=7)
    ahead = prefetch_to_device(stream, size)
    assert iter(ahead) is ahead
    assert (stream.position, ahead.position) == (0, 0)  # nothing is fetched before it is asked for
    for number in range(7):
        batch = next(ahead)
        assert isinstance(batch["x"], jax.Array)
        assert batch["x"].tolist() == [number] * 3
        assert ahead.position == number + 1
        assert stream.position == min(number + size, 7)
    assert list(ahead) == []
    assert ahead.position == 7


def test_a_stream_without_a_position_has_none():
    ahead = prefetch_to_device([np.ones(2), np.zeros(2)])
    assert ahead.position is None
    assert [batch.sum() for batch in ahead] == [2, 0]
    assert ahead.position is None
    ahead.close()  # a list has nothing to close


def test_errors_come_after_the_batches_before_them():
    stream = _Counting(stop=4, fails=(2,))
    ahead = prefetch_to_device(stream, size=4)
    assert [int(next(ahead)["x"][0]) for _ in range(2)] == [0, 1]
    assert stream.position == 3  # nothing is asked of it until its error was told
    with pytest.raises(OSError, match="batch 2 is damaged"):
        next(ahead)
    assert ahead.position == 2
    assert [int(batch["x"][0]) for batch in ahead] == [3]  # as the stream itself would go on


def test_close_closes_the_stream_and_drops_what_waits():
    stream = _Counting()
    ahead = prefetch_to_device(stream, 3)
    next(ahead)
    ahead.close()
    assert stream.closed == 1
    assert ahead.position == 1
    assert list(ahead) == []


def test_placement():
    one = jax.devices()[3]
    assert next(prefetch_to_device(_Counting(), device=one))["x"].devices() == {one}
    mesh = Mesh(np.array(jax.devices()[:2]), ("task",))
    split = NamedSharding(mesh, PartitionSpec("task"))
    stream = prefetch_to_device(episodes(_WAVES, _SPEC, batch=4, seed=0), device=split)
    batch = next(stream)
    stream.close()
    assert batch.support.class_mask is None
    known = episode_batch(_WAVES, _SPEC, seed=0, start=0, count=4)
    for ours, theirs in zip(jax.tree.leaves(batch), jax.tree.leaves(known), strict=True):
        assert ours.sharding == split
        assert ours.addressable_shards[0].data.shape == (2, *theirs.shape[1:])
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("size", [0, 1.5])
def test_a_bad_size_is_refused(size):
    with pytest.raises(ValueError, match=f"size must be an integer of at least 1, got {size}"):
        prefetch_to_device([], size)


def _hosts(make, count, start=0):
    """The streams of all hosts, which take a global batch of 4 together."""
    return [
        prefetch_to_device(make(4 // count, start=start, process_index=host, process_count=count))
        for host in range(count)
    ]


def _global(streams):
    """The inputs of the next global batch, host after host."""
    return np.concatenate([np.asarray(next(stream).query.inputs) for stream in streams])


@pytest.mark.parametrize("hosts", worlds.few_by_default([1, 2, 4], lambda hosts: hosts == 2))
def test_a_run_of_any_hosts_goes_on_in_any_other_number_with_the_same_episodes(hosts):
    def make(batch, **options):
        return episodes(_WAVES, _SPEC, batch=batch, seed=3, **options)

    one_host = episode_batch(_WAVES, _SPEC, seed=3, start=0, count=16).query.inputs.reshape(4, 4, 3, 1)
    streams = _hosts(make, hosts)
    for taken in range(4):
        (position,) = {stream.position for stream in streams}  # all hosts agree
        assert position == 4 * taken
        for others in (1, 2, 4):
            resumed = _hosts(make, others, start=position)
            for step in range(taken, min(taken + 2, 4)):
                np.testing.assert_array_equal(_global(resumed), one_host[step])
            assert {stream.position for stream in resumed} == {4 * min(taken + 2, 4)}
            for stream in resumed:
                stream.close()
        np.testing.assert_array_equal(_global(streams), one_host[taken])


def test_batches_of_all_classes_go_on_too():
    """Their position counts batches."""
    whole = prefetch_to_device(batches(_WAVES, 5, 3))
    known = [np.asarray(next(whole).query.inputs) for _ in range(4)]
    first = [prefetch_to_device(batches(_WAVES, 5, 3, process_index=host, process_count=2)) for host in range(2)]
    np.testing.assert_array_equal(_global(first), np.concatenate(known[:2]))
    assert {stream.position for stream in first} == {2}
    rest = prefetch_to_device(batches(_WAVES, 5, 3, start=2))
    np.testing.assert_array_equal(next(rest).query.inputs, known[2])
    assert rest.position == 3
