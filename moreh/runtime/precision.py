"""Whether computing in bfloat16 pays on a device. A processor without bfloat16 units is slower with it."""

import statistics
import time

import torch

# A smaller gain is lost again to the casts between the two types.
LEAST_SPEEDUP = 1.2
_MATRIX_SIZE = 512
_TIMED_PRODUCTS = 5


def bfloat16_speedup(device: torch.device) -> float:
    """How many times as fast as float32 this machine multiplies bfloat16 matrices: the ratio of two median times.

    Takes some hundredths of a second.
    """
    return _product_seconds(torch.float32, device) / _product_seconds(torch.bfloat16, device)


def _product_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Median time of the product of two square matrices, in seconds. The first one, which sets things up, is not timed."""
    left = torch.ones(_MATRIX_SIZE, _MATRIX_SIZE, dtype=dtype, device=device)
    seconds = []
    for _ in range(_TIMED_PRODUCTS + 1):
        start = time.perf_counter()
        # Reading one element waits for the device.
        torch.mm(left, left)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
