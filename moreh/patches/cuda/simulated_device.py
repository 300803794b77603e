"""The interface between the CUDA face and the accelerator, so that patches need not import it."""

from typing import Protocol

import torch


class SimulatedDevice(Protocol):
    """The device that `torch.cuda` shows. Implemented by `moreh.accelerator.job_device`.

    Methods that put something on the device raise SimulatedOutOfMemoryError if it does not fit, and AcceleratorError if
    another process is using the accelerator.
    """

    name: str
    """The name that `torch.cuda.get_device_name` returns."""
    capability: tuple[int, int]
    """The capability that `torch.cuda.get_device_capability` returns: major and minor."""

    def is_in_use(self) -> bool:
        """True if the script has put anything on the device."""

    def capacity_bytes(self) -> int:
        """Memory that this process may use, in bytes."""

    def allocated_bytes(self) -> int:
        """Memory that this process uses now, in bytes."""

    def peak_bytes(self) -> int:
        """The most memory that this process has used, in bytes."""

    def reset_peak(self) -> None:
        """Forget the peak so far."""

    def holds(self, tensor: torch.Tensor) -> bool:
        """True if a tensor was made on the device or moved there. The results of operations are not known to be."""

    def may_hold(self, tensor: torch.Tensor) -> bool:
        """True if a tensor is on the device or, as the result of an operation, could be."""

    def add_tensor(self, tensor: torch.Tensor) -> None:
        """Put a tensor on the device, unless it is there."""

    def admit_module(self, module: torch.nn.Module) -> None:
        """Check that a module fits before it is moved."""

    def add_module(self, module: torch.nn.Module) -> None:
        """Count a module that was moved to the device."""

    def remove_module(self, module: torch.nn.Module) -> None:
        """Count a module no longer: it has left the device."""
