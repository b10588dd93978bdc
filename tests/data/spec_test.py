"""EpisodeSpec."""

import dataclasses

import pytest

from metajax.data import EpisodeSpec


def test_is_a_value():
    assert EpisodeSpec(5, 1, 15) == EpisodeSpec(ways=5, shots=1, queries=15) == EpisodeSpec()
    assert len({EpisodeSpec(5, 1, 15), EpisodeSpec(5, 1, 15), EpisodeSpec(5, 5, 15)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        EpisodeSpec().ways = 3


@pytest.mark.parametrize("field", ["ways", "shots", "queries"])
@pytest.mark.parametrize("value", [0, -1, 1.0, "5", None, True])
def test_refuses_what_is_no_positive_integer(field, value):
    with pytest.raises(ValueError, match=rf"{field} must be an integer of at least 1, got {value!r}"):
        EpisodeSpec(**{field: value})
