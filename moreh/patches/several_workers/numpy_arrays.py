"""Knows the NumPy arrays that a script makes of tensors, with which they share memory.

Neither torch nor NumPy lists them, and Python's garbage collector does not know arrays.
"""

import functools
import weakref
from collections.abc import Iterator
from typing import Any

from moreh.patches.patch import Patch

TENSOR_NUMPY = Patch(
    target="torch.Tensor.numpy",
    why="On several workers, finds arrays that share memory with a model that is to be sharded.",
    no_public_way="Nothing lists the arrays that share a tensor's memory.",
    tested=("torch 2.11", "torch 2.13", "torch 2.15"),
)

# Weak references to the arrays that exist, by the id of each.
_arrays: dict[int, weakref.ref[Any]] = {}


def note_arrays() -> None:
    """From now on, know the arrays that `Tensor.numpy()` returns, once in a process."""
    if not TENSOR_NUMPY.is_active:
        TENSOR_NUMPY.install(_noting)


def forget_arrays() -> None:
    """Put the original back."""
    if TENSOR_NUMPY.is_active:
        TENSOR_NUMPY.uninstall()
    _arrays.clear()


def known_arrays() -> Iterator[Any]:
    """The arrays that a script still has."""
    for reference in list(_arrays.values()):
        array = reference()
        if array is not None:
            yield array


def _noting(original: Any) -> Any:
    @functools.wraps(original)
    def numpy(self: Any, *args: Any, **kwargs: Any) -> Any:
        array = original(self, *args, **kwargs)
        if hasattr(array, "__array_interface__"):
            key = id(array)
            _arrays[key] = weakref.ref(array, lambda _: _arrays.pop(key, None))
        return array

    return numpy
