"""The memory ledger: what the job's tensors would take on the simulated device, by kind.

Parameters, gradients and optimizer state are exact. Activations are the storages that autograd keeps for the backward
pass. What an operation allocates and frees again by itself is not counted, nor are the activations of a compiled model.
"""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from moreh.accelerator.saved_activations import SavedActivations

KINDS = ("parameters", "gradients", "optimizer_state", "activations", "other_tensors")
# AdamW, which the training scripts use, keeps two values of its own for every parameter.
ADAMW_VALUES_PER_PARAMETER = 2


class MemoryLedger:
    """The tensors on the simulated device, held by weak references: what the user drops, the ledger drops."""

    def __init__(self) -> None:
        self._modules: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._storages_before_sweep = 1024
        self._peak_bytes = 0
        self.activations = SavedActivations(is_counted_elsewhere=self._storages.__contains__)

    def add_module(self, module: torch.nn.Module) -> None:
        """Count a module's parameters, buffers and gradients from now on."""
        self._modules.add(module)
        for tensor in _weights(module):
            self.add_tensor(tensor)

    def remove_module(self, module: torch.nn.Module) -> None:
        """Count a module no longer: it has left the device."""
        self._modules.discard(module)

    def add_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Count an optimizer's state from now on."""
        self._optimizers.add(optimizer)

    def add_tensor(self, tensor: torch.Tensor) -> None:
        """Count a tensor that was made on the device or moved there, until its storage is freed."""
        if tensor.layout != torch.strided or tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if len(self._storages) > self._storages_before_sweep:
            self._sweep()
            self._storages_before_sweep = 2 * len(self._storages) + 1024

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor was made on the device or moved there."""
        if tensor.layout != torch.strided or tensor.is_meta:
            return False
        entry = self._storages.get(tensor.untyped_storage()._cdata)
        return entry is not None and not entry[0].expired()

    def usage_bytes(self) -> dict[str, int]:
        """Bytes on the device now, by kind (see `KINDS`), a storage that several tensors share counted once."""
        self._sweep()
        parameters = _storages(tensor for module in self._modules for tensor in _weights(module))
        gradients = _storages(p.grad for module in self._modules for p in module.parameters() if p.grad is not None)
        states = _storages(tensor for optimizer in self._optimizers for tensor in _state_tensors(optimizer))
        elsewhere = parameters.keys() | gradients.keys() | states.keys()
        other = sum(nbytes for key, (_, nbytes) in self._storages.items() if key not in elsewhere)
        amounts = (
            sum(parameters.values()),
            sum(gradients.values()),
            sum(states.values()),
            self.activations.total_bytes,
            other,
        )
        return dict(zip(KINDS, amounts, strict=True))

    def total_bytes(self) -> int:
        """Bytes on the device now, all kinds together. Also remembers the peak."""
        total = sum(self.usage_bytes().values())
        self._peak_bytes = max(self._peak_bytes, total)
        return total

    def peak_bytes(self) -> int:
        """The largest total that was seen: at the ends of forward passes, around optimizer steps and at each question."""
        return max(self._peak_bytes, self.total_bytes())

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self._peak_bytes = 0

    def _sweep(self) -> None:
        # A weak reference keeps the address of a freed storage from being used again, so a key never lies.
        for key in [key for key, (reference, _) in list(self._storages.items()) if reference.expired()]:
            del self._storages[key]


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers, tied ones counted once. Works on the meta device."""
    return sum(_storages(_weights(module)).values())


def adamw_training_bytes(module: torch.nn.Module) -> int:
    """Bytes that training a module with AdamW takes at least: weights, gradients and two optimizer values each.

    Works on the meta device. Activations are not in it.
    """
    trained = sum(_storages(p for p in module.parameters() if p.requires_grad).values())
    return weight_bytes(module) + (1 + ADAMW_VALUES_PER_PARAMETER) * trained


def _weights(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Storage address -> bytes, of strided tensors."""
    found = {}
    for tensor in tensors:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return found
