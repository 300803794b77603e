"""The helpers that other tests compare with: each sees a difference, and a NaN wherever it is."""

import math

import numpy as np
import pytest
import torch

from tests.helpers.compare import curve_difference, max_difference, relative_difference, worst, worst_of_names

NAN = float("nan")


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_nan_is_infinitely_different(kind, position):
    expected = [1.0, 2.0, 3.0]
    actual = list(expected)
    actual[position] = NAN
    assert worst(kind([abs(a - b) for a, b in zip(actual, expected, strict=True)])) == math.inf
    assert curve_difference(actual, expected) == math.inf
    if kind is not list:
        assert max_difference(kind(actual), kind(expected)) == math.inf
        assert relative_difference(kind(actual), kind(expected)) == math.inf
        assert max_difference(kind(expected), kind(actual)) == math.inf


@pytest.mark.parametrize("name", ["first", "second"])
def test_nan_under_any_name_is_seen(name):
    expected = {"first": torch.ones(2), "second": torch.ones(3)}
    assert worst_of_names(expected, expected) == 0.0
    assert worst_of_names({**expected, name: expected[name] * NAN}, expected) == math.inf


def test_equal_nans_are_not_equal():
    assert max_difference(torch.tensor([NAN]), torch.tensor([NAN])) == math.inf


def test_differences_are_the_largest():
    assert worst([]) == 0.0
    assert worst([0.5, -1.0, 0.25]) == 0.5
    assert max_difference(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.0])) == 0.5
    assert relative_difference(torch.tensor([4.0, 1.0]), torch.tensor([4.0, 2.0])) == 0.25
    assert curve_difference([1.0, 2.0], [1.0, 4.0]) == 0.5


def test_other_shapes_and_names_are_refused():
    with pytest.raises(AssertionError, match="shapes"):
        max_difference(torch.ones(2), torch.ones(1))
    with pytest.raises(AssertionError, match="names differ"):
        worst_of_names({"a": 1.0}, {"b": 1.0})
    with pytest.raises(ValueError, match="zip"):
        curve_difference([1.0], [1.0, 2.0])
