"""Comparisons of numbers that a NaN cannot pass.

`max(0.0, nan)` is 0.0 in Python, so a comparison that reduces with the built-in `max` reports a NaN as equal. The
functions here report it as infinitely different. `tests/helpers/test_compare.py` shows that each of them does.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch


def worst(differences: Any) -> float:
    """The largest of some differences: numbers, arrays or tensors. Infinite if one is NaN, 0.0 if there are none."""
    if isinstance(differences, torch.Tensor | np.ndarray) or not isinstance(differences, Iterable):
        differences = [differences]
    largest = 0.0
    for difference in differences:
        values = _array(difference)
        largest = max(largest, float(np.nan_to_num(values, nan=np.inf, posinf=np.inf).max(initial=0.0)))
    return largest


def max_difference(actual: Any, expected: Any) -> float:
    """The largest absolute difference of two numbers, arrays or tensors of one shape."""
    actual, expected = _array(actual), _array(expected)
    assert actual.shape == expected.shape, f"shapes {actual.shape} and {expected.shape}"
    return worst(np.abs(actual - expected))


def relative_difference(actual: Any, expected: Any, *, floor: float = 1e-30) -> float:
    """The largest absolute difference, as a share of the largest expected value or of `floor`."""
    return max_difference(actual, expected) / max(worst(np.abs(_array(expected))), floor)


def worst_of_names(actual: Mapping[str, Any], expected: Mapping[str, Any], *, floor: float = 1e-30) -> float:
    """`relative_difference` of the worst entry of two mappings, such as gradients by name; the names must agree."""
    assert actual.keys() == expected.keys(), f"names differ: {sorted(actual.keys() ^ expected.keys())[:5]}"
    return worst(relative_difference(actual[name], expected[name], floor=floor) for name in expected)


def curve_difference(actual: Iterable[float], expected: Iterable[float], *, floor: float = 1e-12) -> float:
    """The largest relative difference of two curves of equal length, such as the losses of two runs, point by point."""
    return worst(abs(a - b) / max(abs(b), floor) for a, b in zip(actual, expected, strict=True))


def _array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value
        return value.numpy()
    return np.asarray(value, dtype=np.float64)
