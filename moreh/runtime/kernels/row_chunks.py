"""Loops over tensors a few rows at a time, and reusable buffers for the intermediate results: both stay in the cache.

The C library places a new tensor of a megabyte wherever it finds a hole, most likely in memory that is not in the
cache. The first pass over such a tensor takes several times as long.
"""

import math
import threading
from collections.abc import Iterator

import torch

CHUNK_ELEMENTS = 2**19
"""Elements of the first tensor that are processed at a time on a CPU."""
GPU_CHUNK_ELEMENTS = 2**26
"""The same on GPUs, where launching a kernel takes as long as a million elements: 256 MiB in float32."""
MAX_SCRATCH_BYTES = 2**22
"""The largest buffer that `scratch` keeps for a slot and dtype."""
_buffers = threading.local()


def chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors `[..., size]` as `[rows, size]`, a few rows of all of them at a time.

    A chunk of the first tensor has at most `chunk_elements` elements, or one row.
    """
    flat = [tensor.flatten(0, -2) for tensor in tensors]
    # A narrow layer may be split over more tensor-parallel ranks than it has columns: size is then 0 on some.
    rows = max(1, chunk_elements(flat[0].device.type) // max(1, flat[0].shape[1]))
    if len(flat[0]) <= rows:
        yield tuple(flat)
    else:
        yield from zip(*(tensor.split(rows) for tensor in flat), strict=True)


def chunk_elements(device_type: str) -> int:
    """Elements that are processed at a time on a type of device."""
    return CHUNK_ELEMENTS if device_type == "cpu" else GPU_CHUNK_ELEMENTS


def scratch(slot: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialized CPU tensor in reused memory, valid until this thread calls again with this slot and dtype."""
    size = math.prod(shape)
    if size * dtype.itemsize > MAX_SCRATCH_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    buffers = _buffers.__dict__
    key = f"{slot} {dtype}"
    if key not in buffers or len(buffers[key]) < size:
        # A tensor that is made in inference mode cannot be written to outside of it.
        with torch.inference_mode(False):
            buffers[key] = torch.empty(size, dtype=dtype, device="cpu")
    buffer: torch.Tensor = buffers[key]
    return buffer[:size].view(shape)
