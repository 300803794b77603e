"""Sizes that are rounded up to a few values."""

import doctest
import statistics

import pytest

from moreh.runtime.batch import shape_buckets
from moreh.runtime.batch.shape_buckets import bucket_size


@pytest.mark.parametrize("multiple", [1, 4, 64])
def test_sizes_are_rounded_up_to_few_multiples(multiple):
    sizes = range(1, 40 * multiple)
    buckets = [bucket_size(size, multiple) for size in sizes]
    assert all(size <= bucket < size + 2 * multiple for size, bucket in zip(sizes, buckets, strict=True))
    assert buckets == sorted(buckets)
    assert len(set(buckets)) == 16 + 12
    assert all(bucket % multiple == 0 for bucket in buckets)


def test_doubled_step_adds_3_percent_on_average_where_it_begins():
    """And less to larger sizes."""
    sizes = range(16 * 64 + 1, 18 * 64 + 1)
    added = [(bucket_size(size, 64) - -(-size // 64) * 64) / size for size in sizes]
    assert statistics.mean(added) == pytest.approx(0.03, abs=0.001)


def test_example_of_the_docstring_is_true():
    result = doctest.testmod(shape_buckets)
    assert (result.attempted, result.failed) == (1, 0)
