"""Counts the bytes of the activations that autograd keeps between the forward and the backward pass."""

import _thread
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from moreh.storages import storage_of

SECONDS_UNTIL_INTERRUPT = 0.01


class SavedTensor:
    """A tensor that autograd saved; while it exists, its storage counts."""

    __slots__ = ("key", "owner", "tensor", "version")

    def __init__(self, owner: "SavedActivations", tensor: torch.Tensor, key: int | None) -> None:
        # Detached, since an operation may save its own output: the output would keep the operation, and that the output.
        self.owner, self.tensor, self.key = owner, tensor.detach(), key
        self.version = tensor._version

    def __del__(self) -> None:
        key = getattr(self, "key", None)  # Ctrl-C may come before there is one
        if key is not None:
            self.owner.release(key)


def _pass_on_interrupts() -> None:
    """Let Ctrl-C end a program although it arrived where Python discards exceptions.

    In a backward pass that is where it nearly always arrives: the only Python code that runs then is `__del__` above.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            # Again, a little later: at once it would arrive in this function, where it would be discarded too.
            again = threading.Timer(SECONDS_UNTIL_INTERRUPT, _thread.interrupt_main)
            again.daemon = True
            again.start()
        else:
            before(unraisable)

    sys.unraisablehook = hook


class SavedActivations:
    """The storages that saved tensors keep alive, each counted once however many tensors share it."""

    def __init__(self, is_counted_elsewhere: Callable[[int], bool]) -> None:
        """`is_counted_elsewhere` tells, by a storage's address, that it is a parameter or an input, not an activation."""
        self._is_counted_elsewhere = is_counted_elsewhere
        self._users: dict[int, int] = {}
        self._bytes: dict[int, int] = {}
        self._lock = threading.RLock()  # the autograd engine frees tensors in threads of its own
        self.total_bytes = 0
        self._highest_bytes = 0
        self._highest_in_forward = 0
        _pass_on_interrupts()

    def counting(self) -> AbstractContextManager[Any]:
        """A context in which every tensor that autograd saves is counted.

        Does nothing where gradients are off, and where somebody else's hooks on saved tensors are in force, such as those
        of activation recomputation: torch uses only the innermost ones, so these would put theirs out of force.
        """
        autograd: Any = torch._C._autograd
        if (
            not torch.is_grad_enabled()
            or not autograd._saved_tensors_hooks_is_enabled()
            or autograd._top_saved_tensors_default_hooks(True) is not None
        ):
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def highest_bytes_since_last_asked(self) -> int:
        """The highest total since this was last called: what a device's allocator still holds between two steps."""
        with self._lock:
            highest, self._highest_bytes = self._highest_bytes, self.total_bytes
        return highest

    def highest_bytes_of_forward(self) -> int:
        """The highest total since the end of the last forward pass, which may have contained backward passes of its parts."""
        with self._lock:
            highest, self._highest_in_forward = self._highest_in_forward, self.total_bytes
        return highest

    def release(self, key: int) -> None:
        """One saved tensor less on the storage with this address."""
        with self._lock:
            self._users[key] -= 1
            if self._users[key] == 0:
                del self._users[key]
                self.total_bytes -= self._bytes.pop(key)

    def _pack(self, tensor: torch.Tensor) -> SavedTensor:
        storage = storage_of(tensor)
        if storage is None:
            return SavedTensor(self, tensor, None)
        key = storage._cdata
        with self._lock:
            self._users[key] = self._users.get(key, 0) + 1
            if self._users[key] == 1:
                self._bytes[key] = 0 if self._is_counted_elsewhere(key) else storage.nbytes()
                self.total_bytes += self._bytes[key]
                self._highest_bytes = max(self._highest_bytes, self.total_bytes)
                self._highest_in_forward = max(self._highest_in_forward, self.total_bytes)
        return SavedTensor(self, tensor, key)

    @staticmethod
    def _unpack(saved: SavedTensor) -> torch.Tensor:
        # With hooks on, autograd leaves out its own check for tensors that were changed after they were saved, and the
        # gradients would be wrong without any error.
        if saved.tensor._version != saved.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a tensor of shape {list(saved.tensor.shape)} is at version {saved.tensor._version}; "
                f"expected version {saved.version} instead"
            )
        return saved.tensor
