"""Counts the bytes of activations that autograd saves for the backward pass.

The memory ledger turns counting on around the outermost call of a model, through torch's hooks on saved tensors.
"""

import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from moreh.storages import storage_address, storage_of

# A count in the middle of a forward pass comes after this many new tensors, or as many as are known.
_MIN_NEW_TENSORS = 16
# The calls of models that are counted however short they are, and the share of a script's time that counting may take
# after them.
_FIRST_CALLS, _MAX_SHARE_OF_TIME = 4, 0.005
# What the hooks cost for a tensor that is saved, used and freed.
_SECONDS_PER_TENSOR = 6e-6
# What autograd keeps in place of a tensor: the tensor, detached, and its version when it was saved.
_Saved = tuple[torch.Tensor, int]


class SavedActivations:
    """The storages that saved tensors keep alive, each counted once however many tensors share it.

    The hooks run for every tensor of a step, so they only note it. Tensors are counted when someone asks: those that
    the backward pass has freed by then cost nothing more. Of many short calls, only some are counted, unless the script
    asks for its memory.
    """

    def __init__(self, is_counted_elsewhere: Callable[[int], bool]) -> None:
        """`is_counted_elsewhere` tells whether the storage at an address is a parameter or input, not an activation."""
        self._is_counted_elsewhere = is_counted_elsewhere
        self._new: list[weakref.ref[torch.Tensor]] = []
        # Each saved tensor with its storage's address, and the bytes that the storage counts.
        self._known: list[tuple[weakref.ref[torch.Tensor], int, int]] = []
        self._lock = threading.RLock()  # the autograd engine saves and frees tensors in threads of its own
        self._peak_since_report = 0
        self._peak_since_forward = 0
        self.is_watched = False
        """True once the script has asked for its memory: from then on, all calls are counted."""
        self._calls = self._tensors = 0
        self._next_call = 0.0  # when the next call is to be counted, by time.monotonic()

    def counting(self) -> AbstractContextManager[Any]:
        """A context in which every tensor that autograd saves is counted.

        The context does nothing if gradients are off, or if other hooks on saved tensors are active, such as those of
        activation recomputation. torch uses only the innermost hooks, so counting would disable the other hooks.
        """
        autograd: Any = torch._C._autograd
        if (
            not torch.is_grad_enabled()
            or not autograd._saved_tensors_hooks_is_enabled()
            or autograd._top_saved_tensors_default_hooks(True) is not None
        ):
            return nullcontext()
        now = time.monotonic()
        if not self.is_watched and self._calls >= _FIRST_CALLS and now < self._next_call:
            return nullcontext()
        # The next call is as long as the last one that was counted.
        self._next_call = now + self._tensors * _SECONDS_PER_TENSOR / _MAX_SHARE_OF_TIME
        self._calls, self._tensors = self._calls + 1, 0
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    @property
    def total_bytes(self) -> int:
        """Bytes of the storages that saved tensors keep alive now."""
        with self._lock:
            new, self._new = self._new, []
            alive = [entry for entry in self._known if entry[0]() is not None]
            sizes = {address: nbytes for _, address, nbytes in alive}
            for reference in new:
                tensor = reference()
                storage = None if tensor is None else storage_of(tensor)
                if storage is None:
                    continue
                address = storage_address(storage)
                if address not in sizes:
                    sizes[address] = 0 if self._is_counted_elsewhere(address) else storage.nbytes()
                alive.append((reference, address, sizes[address]))
            self._known = alive
            total = sum(sizes.values())
            self._peak_since_report = max(self._peak_since_report, total)
            self._peak_since_forward = max(self._peak_since_forward, total)
        return total

    def take_peak_since_report(self) -> int:
        """The highest total in bytes since the last call, which an allocator still holds between two steps."""
        with self._lock:
            total = self.total_bytes
            peak, self._peak_since_report = self._peak_since_report, total
        return peak

    def take_peak_since_forward(self) -> int:
        """The highest total in bytes since the last call, at the end of the last forward pass.

        A forward pass may contain backward passes of its parts, so the total at its end may be lower than its peak.
        """
        with self._lock:
            total = self.total_bytes
            peak, self._peak_since_forward = self._peak_since_forward, total
        return peak

    def _pack(self, tensor: torch.Tensor) -> _Saved:
        # Detached, because an operation may save its own output. The output would keep the operation alive, and the
        # operation would keep the output alive.
        saved = tensor.detach()
        with self._lock:
            self._tensors += 1
            self._new.append(weakref.ref(saved))
            if len(self._new) > max(_MIN_NEW_TENSORS, len(self._known)):
                _ = self.total_bytes
        return saved, tensor._version


def _unpack(saved: _Saved) -> torch.Tensor:
    # With hooks active, autograd skips its own check for tensors that were changed in place after they were saved, and
    # the gradients would be wrong without any error.
    tensor, version = saved
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"a tensor of shape {list(tensor.shape)} is at version {tensor._version}; expected version {version} "
            "instead"
        )
    return tensor
