"""Free memory, and a way to let glibc keep what a training step frees on the CPU for the next step.

By default glibc returns the free top of the heap to the kernel, and every freed block of more than 32 MiB, such as the
gradient of a large vocabulary's embedding. The kernel clears each page again when the next step asks for it.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from moreh.system import available_memory_bytes

# Parameters of mallopt. Source: https://man7.org/linux/man-pages/man3/mallopt.3.html; numbers as in glibc's <malloc.h>.
_M_TRIM_THRESHOLD = -1
"""Bytes of the free top of the heap from which glibc returns it to the kernel."""
_M_MMAP_THRESHOLD = -3
"""Blocks of at least this size in bytes are mapped (mmap) outside the heap. Freeing one returns it to the kernel."""
_M_MMAP_MAX = -4
"""Number of blocks that may be mapped by themselves at a time."""

_INT_MAX = 2**31 - 1
# The values that glibc starts with, and the largest threshold that it takes by itself as blocks are freed.
_MMAP_MAX_DEFAULT, _MMAP_THRESHOLD_DEFAULT_BYTES = 2**16, 2**17
_MMAP_THRESHOLD_MAX_BYTES = 2**25
# A user who sets one of these variables has tuned glibc already.
_VARIABLES = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TOP_PAD_",
    "GLIBC_TUNABLES",
)

# The last change to glibc's settings in this process.
_state: Literal["unchanged", "kept", "after first step", "own forward"] = "unchanged"


def free_bytes(device: torch.device) -> int:
    """Memory that new tensors on a device can have, in bytes."""
    if device.type != "cuda":
        return available_memory_bytes()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


class FreedMemory:
    """The memory that the training steps of a model free."""

    def __init__(self, *, keep: bool) -> None:
        self._keep, self._steps_done = keep, 0

    @contextmanager
    def of_step(self) -> Iterator[None]:
        """Keep the memory for the next step, for the time of forward and backward passes."""
        if self._keep:
            before_training_step(self._steps_done)
        yield
        if self._keep:
            after_training_step(self._steps_done)
        self._steps_done += 1


def before_training_step(steps_done: int) -> None:
    """From the first step on, keep freed memory: allocate every block on the heap, and never trim the heap.

    The one exception is a trim between the first and the second step, when little of the free memory lies where the
    second step can use it. Does nothing without glibc.
    """
    global _state
    glibc = _glibc() if steps_done < 2 else None
    if glibc is not None:
        _state = "kept"
        glibc.mallopt(_M_MMAP_MAX, 0)
        glibc.mallopt(_M_TRIM_THRESHOLD, _INT_MAX)
        if steps_done == 1:
            glibc.malloc_trim(0)


def after_training_step(steps_done: int) -> None:
    """Between the first and the second step, map large blocks by themselves, as glibc does by default.

    In between, the optimizer creates its state, which is never freed. On the heap the state would lie between blocks
    that the first step has freed, and leave holes that no block fits.
    """
    global _state
    glibc = _glibc() if steps_done == 0 else None
    if glibc is not None:
        _state = "after first step"
        glibc.mallopt(_M_MMAP_MAX, _MMAP_MAX_DEFAULT)
        glibc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_DEFAULT_BYTES)


def before_own_forward(*, with_grad: bool) -> None:
    """Before a model's own forward pass, keep what lies on the heap, and map larger blocks as glibc does by default.

    Whether glibc returns the top of the heap after each step depends on what happens to lie there, with steps that take
    up to twice as long. Without gradients this only ends the state between the first and the second training step, of
    which the second may never come.
    """
    global _state
    if _state == "after first step" or (_state == "unchanged" and with_grad):
        glibc = _glibc()
        if glibc is not None:
            glibc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_MAX_BYTES)
            glibc.mallopt(_M_TRIM_THRESHOLD, _INT_MAX)
            if _state == "after first step":
                glibc.malloc_trim(0)
        _state = "own forward"


def _glibc() -> ctypes.CDLL | None:
    """The C library; None if it is not glibc, or if environment variables of the user tune it."""
    if not sys.platform.startswith("linux") or any(variable in os.environ for variable in _VARIABLES):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
