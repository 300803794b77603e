"""Counts the bytes of activations that autograd saves for the backward pass.

The memory ledger turns counting on around the outermost call of a model, through torch's hooks on saved tensors.
"""

import _thread
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from moreh.storages import storage_address, storage_of

SECONDS_UNTIL_INTERRUPT = 0.01


class SavedTensor:
    """A tensor that autograd saved. While this object exists, the tensor's storage counts."""

    __slots__ = ("address", "owner", "tensor", "version")

    def __init__(self, owner: "SavedActivations", tensor: torch.Tensor, address: int | None) -> None:
        """`address` is the address of the tensor's storage; None for a tensor without a storage, which counts 0."""
        # Detached, because an operation may save its own output. The output would keep the operation alive, and the
        # operation would keep the output alive.
        self.owner, self.tensor, self.address = owner, tensor.detach(), address
        self.version = tensor._version

    def __del__(self) -> None:
        address = getattr(self, "address", None)  # Ctrl-C may come before the attribute is set
        if address is not None:
            self.owner.release(address)


def _pass_on_interrupts() -> None:
    """Let Ctrl-C end a program even if it arrives where Python discards exceptions.

    In a backward pass it nearly always arrives there: the only Python code that runs is `SavedTensor.__del__`.
    """
    previous_hook = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            # Sent again a little later: an interrupt now would arrive in this function, where it is discarded too.
            timer = threading.Timer(SECONDS_UNTIL_INTERRUPT, _thread.interrupt_main)
            timer.daemon = True
            timer.start()
        else:
            previous_hook(unraisable)

    sys.unraisablehook = hook


class SavedActivations:
    """The storages that saved tensors keep alive, each counted once however many tensors share it."""

    def __init__(self, is_counted_elsewhere: Callable[[int], bool]) -> None:
        """`is_counted_elsewhere` tells whether the storage at an address is a parameter or input, not an activation."""
        self._is_counted_elsewhere = is_counted_elsewhere
        # By a storage's address: the number of saved tensors that share the storage, and the bytes that it counts.
        self._num_users: dict[int, int] = {}
        self._bytes: dict[int, int] = {}
        self._lock = threading.RLock()  # the autograd engine frees tensors in threads of its own
        self.total_bytes = 0
        self._peak_since_report = 0
        self._peak_since_forward = 0
        _pass_on_interrupts()

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
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def take_peak_since_report(self) -> int:
        """The highest total in bytes since the last call, which an allocator still holds between two steps."""
        with self._lock:
            peak, self._peak_since_report = self._peak_since_report, self.total_bytes
        return peak

    def take_peak_since_forward(self) -> int:
        """The highest total in bytes since the last call, at the end of the last forward pass.

        A forward pass may contain backward passes of its parts, so the total at its end may be lower than its peak.
        """
        with self._lock:
            peak, self._peak_since_forward = self._peak_since_forward, self.total_bytes
        return peak

    def release(self, address: int) -> None:
        """Count one saved tensor less for the storage at an address."""
        with self._lock:
            self._num_users[address] -= 1
            if self._num_users[address] == 0:
                del self._num_users[address]
                self.total_bytes -= self._bytes.pop(address)

    def _pack(self, tensor: torch.Tensor) -> SavedTensor:
        storage = storage_of(tensor)
        if storage is None:
            return SavedTensor(self, tensor, None)
        address = storage_address(storage)
        with self._lock:
            self._num_users[address] = self._num_users.get(address, 0) + 1
            if self._num_users[address] == 1:
                self._bytes[address] = 0 if self._is_counted_elsewhere(address) else storage.nbytes()
                self.total_bytes += self._bytes[address]
                self._peak_since_report = max(self._peak_since_report, self.total_bytes)
                self._peak_since_forward = max(self._peak_since_forward, self.total_bytes)
        return SavedTensor(self, tensor, address)

    @staticmethod
    def _unpack(saved: SavedTensor) -> torch.Tensor:
        # With hooks active, autograd skips its own check for tensors that were changed in place after they were
        # saved, and the gradients would be wrong without any error.
        if saved.tensor._version != saved.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a tensor of shape {list(saved.tensor.shape)} is at version {saved.tensor._version}; "
                f"expected version {saved.version} instead"
            )
        return saved.tensor
