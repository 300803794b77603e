"""Rounds sizes up to a few recurring values.

oneDNN compiles a kernel for each new shape of a bfloat16 matmul. This takes longer than the matmul, and each of the
last thousand kernels keeps 0.6 MB.
"""

# Beyond this many multiples the step doubles, which adds at most 3 % to a size on average.
_FINE_STEPS = 16


def bucket_size(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple of `multiple`, or of twice that where `size` is more than 16 multiples.

    >>> bucket_size(130, 64), bucket_size(1025, 64)
    (192, 1152)
    """
    step = multiple if size <= _FINE_STEPS * multiple else 2 * multiple
    return -(-size // step) * step
