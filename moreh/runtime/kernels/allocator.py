"""Memory that a training step has freed, on processors: the C library keeps it for the next step.

By default glibc gives the upper end of what is free back to the system, and every piece of more than 32 MiB, such as the
gradient of a large vocabulary. The system clears every page of it when it is wanted again.
Source of the settings: https://man7.org/linux/man-pages/man3/mallopt.3.html.
"""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_NEVER = 2**31 - 1
# glibc's own: so many pieces at most, each of so many bytes at least, lie by themselves and are given back when freed.
_MMAP_MAX_DEFAULT, _MMAP_THRESHOLD_DEFAULT_BYTES = 2**16, 2**17
# By which somebody has chosen settings of their own.
_VARIABLES = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TOP_PAD_",
    "GLIBC_TUNABLES",
)


def before_training_step(steps: int) -> None:
    """Keep what is freed from the first step on. `steps` are those before; nothing happens without glibc.

    What is free between the first two steps is given back, once: little of it lies where the second one wants it.
    """
    library = _library() if steps < 2 else None
    if library is not None:
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, _NEVER)
        if steps == 1:
            library.malloc_trim(0)


def after_training_step(steps: int) -> None:
    """Let what is made before the second step lie by itself: the optimizer's state, which stays.

    It would lie between pieces that the first step has freed, and leave holes that nothing fits.
    """
    library = _library() if steps == 0 else None
    if library is not None:
        library.mallopt(_MMAP_MAX, _MMAP_MAX_DEFAULT)
        library.mallopt(_MMAP_THRESHOLD, _MMAP_THRESHOLD_DEFAULT_BYTES)


def _library() -> ctypes.CDLL | None:
    """The C library, if it is glibc and nobody else has settled how it keeps memory."""
    if not sys.platform.startswith("linux") or any(variable in os.environ for variable in _VARIABLES):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
