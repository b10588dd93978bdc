"""Validators name the argument, the value and what is accepted."""

import re

import numpy as np
import pytest

from metajax.core import _validate

INTEGER = "x must be an integer of at least {minimum}, got {value!r}"


@pytest.mark.parametrize("value", [0, -3, 1.0, "5", None, True, np.nan])
def test_positive_int_refuses(value):
    with pytest.raises(ValueError, match=re.escape(INTEGER.format(minimum=1, value=value))):
        _validate.positive_int("x", value)


def test_integers_of_numpy_pass_as_python_integers():
    assert type(_validate.positive_int("x", np.int64(3))) is int
    assert _validate.int_at_least("x", 0, 0) == 0
    with pytest.raises(ValueError, match=re.escape(INTEGER.format(minimum=2, value=1))):
        _validate.int_at_least("x", 1, 2)


@pytest.mark.parametrize("value", [0, -0.1, float("nan"), float("inf"), "1", None, True])
def test_positive_float_refuses(value):
    with pytest.raises(ValueError, match=re.escape(f"x must be a finite number above 0, got {value!r}")):
        _validate.positive_float("x", value)


def test_floats():
    assert _validate.positive_float("x", np.float32(0.5)) == 0.5
    assert _validate.non_negative_float("x", 0) == 0.0
    with pytest.raises(ValueError, match=re.escape("x must be a finite number of at least 0, got -1")):
        _validate.non_negative_float("x", -1)


def test_one_of():
    assert _validate.one_of("x", "a", ("a", "b")) == "a"
    with pytest.raises(ValueError, match=re.escape("x must be one of 'a', 'b', got 'c'")):
        _validate.one_of("x", "c", ("a", "b"))
