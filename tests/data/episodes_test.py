"""Streams of episodes: what they depend on, and that hosts and restarts share one stream."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from scipy import stats

from metajax.data import ClassSource, EpisodeSpec, batches, episode, episode_batch, episodes, from_sampler, sinusoids
from metajax.data import _pipeline as module
from metajax.data._episodes import EPISODES, Numbers

SPEC = EpisodeSpec(ways=3, shots=1, queries=2)
WAVES = EpisodeSpec(ways=1, shots=4, queries=3)


def toy(split="train", classes=20, each=6):
    """A source whose inputs are unique numbers."""
    labels = np.repeat(np.arange(classes), each)
    inputs = np.arange(len(labels), dtype=np.int32)[:, None]
    return ClassSource("toy", split, inputs, labels, tuple(map(str, range(classes))))


def take(stream, count):
    return [next(stream) for _ in range(count)]


def joined(several):
    """Batches as one, along the task axis."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *several)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("source", "spec"), [(toy(), SPEC), (sinusoids(), WAVES)], ids=["classes", "waves"])
def test_stream_is_the_list_of_episodes(source, spec):
    stream = episodes(source, spec, batch=4, seed=7)
    assert iter(stream) is stream
    several = take(stream, 3)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(several))
    assert_same(joined(several), episode_batch(source, spec, seed=7, start=0, count=12))
    for index in range(12):
        single = episode(source, spec, seed=7, index=index)
        assert_same(jax.tree.map(lambda leaf, k=index: leaf[k], joined(several)), single)


def test_class_mask_none_survives():
    batch = next(episodes(sinusoids(), WAVES, batch=2, seed=0))
    assert batch.support.class_mask is None
    assert batch.query.class_mask is None
    assert batch.query.inputs.shape == (2, 3, 1)


def test_numbers_are_those_of_philox_keyed_by_seed_and_index():
    for split, stream in (("train", 0), ("val", 1), ("test", 2)):
        source = toy(split)
        bits = np.random.Philox(key=np.array([7, 5], np.uint64), counter=np.array([0, 0, 0, stream], np.uint64))
        expected = bits.random_raw(20).astype("<u8").view("<u4")[:39]
        found = Numbers(source, 7, EPISODES)([3, 5, 4], 39)
        np.testing.assert_array_equal(found[1], expected)
        drawn = source.draw(SPEC, source.tables(SPEC), found[:, : source.bits(SPEC)])
        np.testing.assert_array_equal(
            episode(source, SPEC, seed=7, index=5).query.inputs[:, 0], drawn.episode.query.inputs[1]
        )


def test_what_was_drawn_before_does_not_matter():
    source = toy()
    expected = [episode(source, SPEC, seed=1, index=index) for index in range(6)]
    for index in (5, 0, 3, 3):
        assert_same(episode(source, SPEC, seed=1, index=index), expected[index])
    assert_same(jax.tree.map(lambda leaf: leaf[1], episode_batch(source, SPEC, seed=1, start=4, count=2)), expected[5])


@pytest.mark.parametrize("start", [0, 8, 13])
def test_start_skips_episodes(start):
    source = toy()
    assert_same(
        joined(take(episodes(source, SPEC, batch=4, seed=3, start=start), 2)),
        episode_batch(source, SPEC, seed=3, start=start, count=8),
    )


@pytest.mark.parametrize("hosts", [2, 3, 8])
def test_hosts_share_the_stream_of_one_host(hosts):
    source = toy()
    whole = take(episodes(source, SPEC, batch=2 * hosts, seed=3, start=5), 2)
    parts = [
        take(episodes(source, SPEC, batch=2, seed=3, start=5, process_index=host, process_count=hosts), 2)
        for host in range(hosts)
    ]
    for step in range(2):
        assert_same(joined([part[step] for part in parts]), whole[step])


def test_seeds_splits_and_episodes_differ():
    kinds = {
        episode(toy(split), SPEC, seed=seed, index=index).query.inputs.tobytes()
        for split in ("train", "val", "test")
        for seed in (0, 1, 2**63)
        for index in (0, 1, 1000)
    }
    assert len(kinds) == 27


def test_episodes_of_a_stream_are_independent():
    source = toy(classes=10)
    batch = episode_batch(source, EpisodeSpec(2, 1, 1), seed=0, start=0, count=8000)
    classes = source.labels[batch.support.inputs[..., 0]]
    assert stats.chisquare(np.bincount(classes[:, 0], minlength=10)).pvalue > 1e-3
    following = np.bincount(classes[:-1, 0] * 10 + classes[1:, 0], minlength=100)
    assert stats.chisquare(following).pvalue > 1e-3
    assert stats.chisquare(np.bincount(batch.query.inputs.ravel(), minlength=60)).pvalue > 1e-3


def test_batches_are_uniform_and_labelled():
    source = toy()
    stream = batches(source, 64, 5)
    drawn = take(stream, 50)
    first = drawn[0]
    assert first.query.inputs.shape == (1, 64, 1)
    assert first.query.targets.shape == first.query.mask.shape == (1, 64)
    assert first.query.targets.dtype == np.int32
    assert first.query.mask.all()
    assert first.support.inputs.shape == (1, 0, 1)
    assert first.support.targets.shape == first.support.mask.shape == (1, 0)
    for part in first:
        assert part.class_mask.shape == (1, 20)
        assert part.class_mask.all()
    inputs = np.concatenate([batch.query.inputs.ravel() for batch in drawn])
    targets = np.concatenate([batch.query.targets.ravel() for batch in drawn])
    np.testing.assert_array_equal(source.labels[inputs], targets)
    assert stats.chisquare(np.bincount(inputs, minlength=120)).pvalue > 1e-3


def test_batches_start_and_hosts():
    source = toy()
    whole = take(batches(source, 8, 5), 6)
    assert_same(joined(take(batches(source, 8, 5, start=2), 4)), joined(whole[2:]))
    for host in range(2):
        part = take(batches(source, 8, 5, start=2, process_index=host, process_count=2), 2)
        assert_same(joined(part), joined(whole[2 + host :: 2]))
    assert len({batch.query.inputs.tobytes() for batch in whole}) == 6


def test_batches_of_waves():
    batch = next(batches(sinusoids(), 16, 0))
    assert batch.query.inputs.shape == batch.query.targets.shape == (1, 16, 1)
    assert batch.support.inputs.shape == (1, 0, 1)
    assert batch.query.class_mask is None
    assert batch.support.class_mask is None
    assert (np.abs(batch.query.targets) <= 5).all()
    assert len(np.unique(batch.query.inputs)) == 16


def test_what_the_source_raises_is_raised():
    left = [200]

    def sample(spec, rng):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("the disk is gone")
        return episode(sinusoids(), spec, seed=0, index=0)

    stream = episodes(from_sampler(sample), WAVES, batch=1, seed=0)
    next(stream)
    with pytest.raises(RuntimeError, match=r"the disk is gone"):
        take(stream, 300)


def test_what_reading_raises_is_raised():
    class Damaged:
        shape, dtype = (120, 1), np.dtype(np.uint8)

        def take(self, rows, axis):
            raise ValueError("'a/1.png' is damaged")

    stream = episodes(dataclasses.replace(toy(), inputs=Damaged()), SPEC, batch=1, seed=0)
    with pytest.raises(ValueError, match=r"'a/1.png' is damaged"):
        next(stream)


def test_close_ends_the_stream():
    stream = episodes(toy(), SPEC, batch=1, seed=0)
    next(stream)
    stream.close()
    assert list(stream) == []
    stream.close()


GOOD = {"batch": 1, "seed": 0, "start": 0, "process_index": 0, "process_count": 1}


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"batch": 0}, "batch must be an integer of at least 1, got 0"),
        ({"batch": 2.0}, "batch must be an integer of at least 1, got 2.0"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"seed": 2**64}, r"seed must lie below 2\*\*64, got 18446744073709551616"),
        ({"seed": None}, "seed must be an integer of at least 0, got None"),
        ({"start": -1}, "start must be an integer of at least 0, got -1"),
        ({"process_count": 0}, "process_count must be an integer of at least 1, got 0"),
        ({"process_index": -1}, "process_index must be an integer of at least 0, got -1"),
        ({"process_index": 2, "process_count": 2}, "process_index must lie below process_count, 2, got 2"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(bad, text):
    with pytest.raises(ValueError, match=text):
        episodes(toy(), SPEC, **(GOOD | bad))
    if "batch" not in bad:
        options = {key: value for key, value in (GOOD | bad).items() if key not in ("batch", "seed")}
        with pytest.raises(ValueError, match=text):
            batches(toy(), 4, (GOOD | bad)["seed"], **options)


def test_bad_sources_and_sizes():
    with pytest.raises(ValueError, match=r"ways is 21, but toy"):
        episodes(toy(), EpisodeSpec(21, 1, 1), **GOOD)
    with pytest.raises(ValueError, match=r"spec must be of type EpisodeSpec, got 5"):
        episodes(toy(), 5, **GOOD)
    with pytest.raises(ValueError, match=r"source must be a data source"):
        episodes("omniglot", SPEC, **GOOD)
    with pytest.raises(ValueError, match=r"size must be an integer of at least 1, got 0"):
        batches(toy(), 0, 0)
    with pytest.raises(ValueError, match=r"source must be a data source"):
        batches(None, 4, 0)
    with pytest.raises(ValueError, match=r"index must be an integer of at least 0, got -1"):
        episode(toy(), SPEC, seed=0, index=-1)
    with pytest.raises(ValueError, match=r"start must be an integer of at least 0, got -1"):
        episode_batch(toy(), SPEC, seed=0, start=-1, count=1)
    with pytest.raises(ValueError, match=r"count must be an integer of at least 1, got 0"):
        episode_batch(toy(), SPEC, seed=0, start=0, count=0)


def test_without_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert episode_batch(toy(), SPEC, seed=0, start=0, count=2).query.inputs.shape == (2, 6, 1)
    for call in (lambda: episodes(toy(), SPEC, **GOOD), lambda: batches(toy(), 4, 0)):
        with pytest.raises(ImportError, match=r"pip install tensorflow"):
            call()
    with pytest.raises(ValueError, match=r"batch"):  # bad arguments come first
        episodes(toy(), SPEC, batch=0, seed=0)


def test_a_program_of_its_own():
    """Only the pipeline imports TensorFlow, and the program ends while its stream is still drawing."""
    # Without the handler at exit some such programs never ended: seldom, so one pass here proves little.
    code = """
import sys
from metajax.data import EpisodeSpec, episode_batch, episodes, sinusoids
spec = EpisodeSpec(1, 10, 10)
episode_batch(sinusoids(), spec, seed=0, start=0, count=2)
print("tensorflow" in sys.modules)
stream = episodes(sinusoids(), spec, batch=2000, seed=0)
next(stream)
print("end")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "end"]


def test_streams_that_are_dropped_are_closed():
    before = len(module._open)
    streams = [episodes(toy(), SPEC, batch=2, seed=seed) for seed in range(3)]
    assert len(module._open) == before + 3
    del streams
    assert len(module._open) <= before
