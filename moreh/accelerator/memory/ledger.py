"""The memory ledger: what the job's tensors would take on the simulated device, by kind.

Parameters, gradients and optimizer state are exact. Activations are the storages that autograd keeps for the backward
pass. What an operation allocates and frees again by itself is not counted, nor are the activations of a compiled model.
"""

import threading
import time
import weakref
from collections.abc import Iterator

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from moreh.accelerator.memory.saved_activations import SavedActivations
from moreh.storages import storage_bytes, storage_of

KINDS = ("parameters", "gradients", "optimizer_state", "activations", "other_tensors")
# AdamW, which the training scripts use, keeps two values of its own for every parameter.
ADAMW_VALUES_PER_PARAMETER = 2
# Counting may take this part of a script's time at most; in between, the last count is used.
SHARE_OF_TIME_FOR_COUNTING = 0.005


class MemoryLedger:
    """The tensors on the simulated device, held by weak references: what the user drops, the ledger drops."""

    def __init__(self) -> None:
        self._modules: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._lock = threading.RLock()  # a thread that fetches batches moves them while the model computes
        self.activations = SavedActivations(is_counted_elsewhere=self._storages.__contains__)
        self._peak_bytes = 0
        # At the last count: the total without activations, then and at the last end of a forward pass; and what has been
        # added since.
        self._static_bytes = 0
        self._static_bytes_after_forward: int | None = None
        self._added_bytes = 0
        self._next_count = 0.0

    def add_module(self, module: torch.nn.Module) -> None:
        """Count a module's parameters, buffers and gradients from now on."""
        with self._lock:
            self._modules.add(module)
            for tensor in _weights(module):
                self.add_tensor(tensor)

    def remove_module(self, module: torch.nn.Module) -> None:
        """Count a module no longer: it has left the device."""
        with self._lock:
            self._modules.discard(module)

    def has_module(self, module: torch.nn.Module) -> bool:
        """Whether a module is counted."""
        return module in self._modules

    def add_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Count an optimizer's state from now on."""
        with self._lock:
            self._optimizers.add(optimizer)

    def add_tensor(self, tensor: torch.Tensor) -> None:
        """Count a tensor that was made on the device or moved there, until its storage is freed."""
        storage = storage_of(tensor)
        if storage is None or self.holds(tensor):
            return
        with self._lock:
            self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self._added_bytes += storage.nbytes()

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor was made on the device or moved there. The results of operations are not known to be."""
        storage = storage_of(tensor)
        entry = None if storage is None else self._storages.get(storage._cdata)
        return entry is not None and not entry[0].expired()

    def usage_bytes(self) -> dict[str, int]:
        """Bytes on the device now, by kind (see `KINDS`), a storage that several tensors share counted once."""
        with self._lock:
            start = time.monotonic()
            # A weak reference keeps the address of a freed storage from being used again, so a key never lies.
            for key in [key for key, (reference, _) in self._storages.items() if reference.expired()]:
                del self._storages[key]
            modules = list(self._modules)
            weights = storage_bytes(tensor for module in modules for tensor in _weights(module))
            parameters = {key: nbytes for key, nbytes in weights.items() if key in self._storages}
            gradients = storage_bytes(p.grad for module in modules for p in module.parameters() if p.grad is not None)
            states = storage_bytes(
                tensor for optimizer in list(self._optimizers) for tensor in _state_tensors(optimizer)
            )
            elsewhere = parameters.keys() | gradients.keys() | states.keys()
            other = sum(nbytes for key, (_, nbytes) in self._storages.items() if key not in elsewhere)
            static = (sum(parameters.values()), sum(gradients.values()), sum(states.values()))
            self._static_bytes = sum(static) + other
            self._added_bytes = 0
            now = time.monotonic()
            self._next_count = now + (now - start) / SHARE_OF_TIME_FOR_COUNTING
            return dict(zip(KINDS, (*static, self.activations.total_bytes, other), strict=True))

    def total_bytes(self) -> int:
        """Bytes on the device now, all kinds together."""
        total = sum(self.usage_bytes().values())
        self._peak_bytes = max(self._peak_bytes, total)
        return total

    def estimated_bytes(self) -> int:
        """Nearly the total, at no cost: the last count, what was added since, and the activations."""
        return self._static_bytes + self._added_bytes + self.activations.total_bytes

    def observe(self, *, after_forward: bool) -> int:
        """Count, unless that was done a moment ago, and remember the peak; returns the total, then maybe estimated.

        The activations are always known exactly; what counts of them is their highest number in a forward pass.
        """
        activations = self.activations.highest_bytes_of_forward() if after_forward else self.activations.total_bytes
        if time.monotonic() >= self._next_count:
            self.total_bytes()
            total = self._static_bytes + activations
            if after_forward:
                self._static_bytes_after_forward = self._static_bytes
        elif after_forward and self._static_bytes_after_forward is not None:
            total = self._static_bytes_after_forward + activations
        else:
            total = self.estimated_bytes()
        self._peak_bytes = max(self._peak_bytes, total)
        return total

    def peak_bytes(self) -> int:
        """The largest total that was seen: at the ends of forward passes, around optimizer steps and at each question."""
        return max(self._peak_bytes, self.total_bytes())

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self._peak_bytes = 0
        self.activations.highest_bytes_of_forward()


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers, tied ones counted once. Works on the meta device."""
    return _described_bytes(list(_weights(module)))


def adamw_training_bytes(module: torch.nn.Module) -> int:
    """Bytes that training a module with AdamW takes at least: weights, gradients and two optimizer values each.

    Works on the meta device. Activations are not in it.
    """
    trained = _described_bytes([p for p in module.parameters() if p.requires_grad])
    return weight_bytes(module) + (1 + ADAMW_VALUES_PER_PARAMETER) * trained


def _described_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of tensors that may be without data; tied parameters are given once by torch already."""
    return sum(tensor.nbytes for tensor in {id(t): t for t in tensors if not torch.nn.parameter.is_lazy(t)}.values())


def _weights(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for state in list(optimizer.state.values()):
        yield from (value for value in list(state.values()) if isinstance(value, torch.Tensor))
