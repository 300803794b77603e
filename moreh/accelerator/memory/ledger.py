"""The memory ledger: bytes of the job's tensors on the simulated device, by kind.

Parameters, gradients and optimizer state are exact. Activations are the storages that autograd keeps for the backward
pass. Temporary tensors inside an operation and the activations of a compiled model are not counted.

The ledger keeps weak references, so a tensor counts for as long as it is alive, as on a real device. That includes
garbage in reference cycles, which Python frees some time later.
"""

import threading
import time
import weakref
from collections.abc import Iterator

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from moreh.accelerator.memory.saved_activations import SavedActivations
from moreh.patches.module_call import first_parameter
from moreh.storages import storage_address, storage_bytes, storage_of

KINDS = ("parameters", "gradients", "optimizer_state", "activations", "other_tensors")
# AdamW, which the training scripts use, keeps two values for every element of a parameter.
ADAMW_VALUES_PER_PARAMETER = 2
# Counting may take this share of a script's time. Between counts, the last count is used.
MAX_SHARE_OF_TIME = 0.005


class MemoryLedger:
    """The tensors on the simulated device, by weak references: a tensor that the script drops is no longer counted."""

    def __init__(self) -> None:
        self._modules: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        # By a storage's address: a weak reference to it and its size in bytes.
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._lock = threading.RLock()  # a thread may move the next batch while the model computes
        self.activations = SavedActivations(is_counted_elsewhere=self._storages.__contains__)
        self._peak_bytes = 0
        self._static_bytes = 0  # everything but activations, at the last count
        self._static_bytes_after_forward: int | None = None  # the same, at the last count after a forward pass
        self._added_bytes = 0  # tensors added since the last count
        self._next_count = 0.0  # when the next count may be, by time.monotonic()

    def add_module(self, module: torch.nn.Module) -> None:
        """Count a module's parameters, buffers and gradients from now on."""
        with self._lock:
            self._modules.add(module)
            for tensor in _parameters_and_buffers(module):
                self.add_tensor(tensor)

    def refresh_module(self, module: torch.nn.Module) -> None:
        """Count new tensors of a module that is counted: its weights may be of another dtype by now.

        To look at every parameter before every call would slow small models down. The first one tells of a cast, and
        the others are looked at before a count.
        """
        if module not in self._modules:
            return
        first = first_parameter(module)
        if time.monotonic() >= self._next_count or (first is not None and not self.holds(first)):
            self.add_module(module)

    def remove_module(self, module: torch.nn.Module) -> None:
        """Stop counting a module, which has left the device."""
        with self._lock:
            self._modules.discard(module)

    def has_parameter(self, tensor: torch.Tensor) -> bool:
        """True if a tensor is a parameter of a counted module, even if it has other memory now."""
        return any(parameter is tensor for module in list(self._modules) for parameter in module.parameters())

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
            self._storages[storage_address(storage)] = (StorageWeakRef(storage), storage.nbytes())
            self._added_bytes += storage.nbytes()

    def holds(self, tensor: torch.Tensor) -> bool:
        """True if a tensor was made on the device or moved there. The results of operations are not tracked."""
        storage = storage_of(tensor)
        entry = None if storage is None else self._storages.get(storage_address(storage))
        return entry is not None and not entry[0].expired()

    def usage_bytes(self) -> dict[str, int]:
        """Bytes on the device now, by kind (see `KINDS`). A storage that several tensors share counts once."""
        with self._lock:
            start = time.monotonic()
            # A weak reference keeps the address of a freed storage from being used again. So an entry never refers to
            # another storage.
            for address in [address for address, (reference, _) in self._storages.items() if reference.expired()]:
                del self._storages[address]
            modules = list(self._modules)
            weights = storage_bytes(tensor for module in modules for tensor in _parameters_and_buffers(module))
            parameters = {address: nbytes for address, nbytes in weights.items() if address in self._storages}
            gradients = storage_bytes(p.grad for module in modules for p in module.parameters() if p.grad is not None)
            states = storage_bytes(
                tensor for optimizer in list(self._optimizers) for tensor in _state_tensors(optimizer)
            )
            of_a_kind = parameters.keys() | gradients.keys() | states.keys()
            other = sum(nbytes for address, (_, nbytes) in self._storages.items() if address not in of_a_kind)
            static = (sum(parameters.values()), sum(gradients.values()), sum(states.values()))
            self._static_bytes = sum(static) + other
            self._added_bytes = 0
            now = time.monotonic()
            self._next_count = now + (now - start) / MAX_SHARE_OF_TIME
            return dict(zip(KINDS, (*static, self.activations.total_bytes, other), strict=True))

    def total_bytes(self) -> int:
        """Bytes on the device now, all kinds together."""
        total = sum(self.usage_bytes().values())
        self._peak_bytes = max(self._peak_bytes, total)
        return total

    def estimated_bytes(self) -> int:
        """An estimate of the total without a count: the last count, tensors added since, and the activations."""
        return self._static_bytes + self._added_bytes + self.activations.total_bytes

    def observe(self, *, after_forward: bool) -> int:
        """Update the peak; returns the total in bytes. The total is an estimate if the last count was a moment ago.

        The activations are always exact. With `after_forward`, at the end of a forward pass, their peak in it counts.
        """
        activations = self.activations.take_peak_since_forward() if after_forward else self.activations.total_bytes
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
        """The largest total seen at the ends of forward passes, around optimizer steps and in calls of this method."""
        return max(self._peak_bytes, self.total_bytes())

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self._peak_bytes = 0
        self.activations.take_peak_since_forward()


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers, tied ones counted once. Works on the meta device."""
    return _nominal_bytes(list(_parameters_and_buffers(module)))


def adamw_training_bytes(module: torch.nn.Module) -> int:
    """The least bytes for training a module with AdamW: weights, gradients and two optimizer values per element.

    Works on the meta device. Activations are not included.
    """
    trained = _nominal_bytes([p for p in module.parameters() if p.requires_grad])
    return weight_bytes(module) + (1 + ADAMW_VALUES_PER_PARAMETER) * trained


def _nominal_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of distinct tensors by shape and dtype, with or without data. Lazy tensors have no shape and count 0."""
    return sum(tensor.nbytes for tensor in {id(t): t for t in tensors if not torch.nn.parameter.is_lazy(t)}.values())


def _parameters_and_buffers(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for state in list(optimizer.state.values()):
        yield from (value for value in list(state.values()) if isinstance(value, torch.Tensor))
