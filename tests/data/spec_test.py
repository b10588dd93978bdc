"""EpisodeSpec."""

import dataclasses

import pytest

from metajax.data import Bucket, EpisodeSpec, Imbalanced


def test_is_a_value():
    assert EpisodeSpec(5, 1, 15) == EpisodeSpec(ways=5, shots=1, queries=15) == EpisodeSpec()
    assert len({EpisodeSpec(5, 1, 15), EpisodeSpec(5, 1, 15), EpisodeSpec(5, 5, 15)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        EpisodeSpec().ways = 3


@pytest.mark.parametrize("field", ["ways", "shots", "queries"])
@pytest.mark.parametrize("value", [0, -1, 1.0, "5", None, True])
def test_refuses_what_is_no_positive_integer(field, value):
    with pytest.raises(ValueError, match=rf"{field} must be an integer of at least 1.*, got {value!r}"):
        EpisodeSpec(**{field: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ways": (5, 3)}, r"ways must be an integer of at least 1 or a pair \(low, high\), got \(5, 3\)"),
        ({"ways": (5,)}, r"ways must be an integer of at least 1 or a pair"),
        ({"shots": (0, 3)}, r"shots must be an integer of at least 1, got 0"),
        ({"queries": (1, 2)}, r"queries must be an integer of at least 1"),
        ({"ways": (5, 50), "shots": Imbalanced(support=49)}, r"shots.support must hold one example of each of 50 ways"),
        ({"hierarchical": 1}, r"hierarchical must be of type bool, got 1"),
        ({"buckets": [(5, 5, 75)]}, r"buckets must be a tuple of \(ways, support, query\), got"),
        ({"buckets": ((5, 5),)}, r"buckets must be a tuple of \(ways, support, query\), got"),
        ({"buckets": ((5, 5, 0),)}, r"query of a bucket must be an integer of at least 1, got 0"),
        (
            {"buckets": ((5, 5, 74), (5, 4, 90))},
            r"buckets must have one that holds the largest episode, \(5, 5, 75\) \(ways, support, query\), got",
        ),
    ],
)
def test_refuses_what_no_episode_can_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        EpisodeSpec(**arguments)


@pytest.mark.parametrize("arguments", [{"support": 0}, {"per_class": 1.5}, {"log_weights": (1.0, 0.0)}])
def test_refuses_a_rule_that_is_none(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Imbalanced(**arguments)


def test_sizes():
    assert EpisodeSpec(5, 1, 15).sizes == (Bucket(5, 5, 75),)
    spec = EpisodeSpec((5, 50), Imbalanced(), 10)
    assert spec.sizes == (Bucket(50, 125, 125), Bucket(50, 250, 250), Bucket(50, 500, 500))
    assert spec.size_for(5, 125, 50) == spec.sizes[0]
    assert spec.size_for(5, 126, 50) == spec.sizes[1]
    assert (spec.min_ways, spec.max_ways, spec.max_shots, spec.is_fixed) == (5, 50, 496, False)
    roomy = EpisodeSpec(2, 1, 1, buckets=((2, 9, 2), (3, 2, 8)))
    assert roomy.capacity == Bucket(3, 9, 8)
    assert roomy.pads
    assert not EpisodeSpec().pads


def test_reads_well():
    assert str(EpisodeSpec()) == "5-way 1-shot, 15 queries a class"
    assert str(EpisodeSpec(5, (1, 5))) == "5-way, 1 to 5 shots, 15 queries a class"
    assert str(EpisodeSpec((5, 50), Imbalanced(), 10, hierarchical=True)) == (
        "5 to 50 ways, imbalanced support of up to 500, up to 10 queries a class, classes of one node"
    )
