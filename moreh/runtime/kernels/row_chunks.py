"""Rows of tensors a few at a time, and memory for what a kernel makes of them and drops: both stay in the cache.

A new tensor of a megabyte lies wherever the C library finds a hole for it, most likely in none of the cache's lines: the first
pass over it takes several times as long.
"""

import math
import threading
from collections.abc import Iterator

import torch

# Elements that are worked on at a time.
CHUNK = 2**19
# The most that is kept of what `scratch` gives for one number and type.
KEPT_BYTES = 2**22
_kept = threading.local()


def chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors `[..., size]` as `[rows, size]`, so many rows at a time that the first one's have `CHUNK` elements at most."""
    flat = [tensor.flatten(0, -2) for tensor in tensors]
    # A tensor-parallel rank may have no part of a narrow layer.
    rows = max(1, CHUNK // max(1, flat[0].shape[1]))
    if len(flat[0]) <= rows:
        yield tuple(flat)
    else:
        yield from zip(*(one.split(rows) for one in flat), strict=True)


def scratch(number: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Memory of a processor with any content, the same for each call with this number: valid until the next one."""
    size = math.prod(shape)
    if size * dtype.itemsize > KEPT_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    buffers = _kept.__dict__
    key = f"{number} {dtype}"
    if key not in buffers or len(buffers[key]) < size:
        # Made in inference mode, it could not be written to outside of it.
        with torch.inference_mode(False):
            buffers[key] = torch.empty(size, dtype=dtype, device="cpu")
    found: torch.Tensor = buffers[key][:size].view(shape)
    return found
