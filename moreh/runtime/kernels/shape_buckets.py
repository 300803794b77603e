"""Sizes that come again: for each new shape of a product in bfloat16 oneDNN compiles a kernel, which takes longer than the
product, and keeps 0.6 MB with each of the last thousand.
"""

# Beyond so many multiples, one twice as large adds 3 % more at most in the mean.
_FEW = 16


def bucket_size(size: int, multiple: int) -> int:
    """The next multiple of `multiple`, and of twice as much where there are more than a few.

    >>> bucket_size(130, 64), bucket_size(1025, 64)
    (192, 1152)
    """
    step = multiple if size <= _FEW * multiple else 2 * multiple
    return -(-size // step) * step
