"""The device that the CUDA face shows: the accelerator, through the job of this process and its memory ledger.

The process becomes a job when it first puts something on the device, not when it asks about the device.
"""

import torch

from moreh.accelerator.environment import visible_device
from moreh.accelerator.flavors import ACCELERATOR_NAME
from moreh.accelerator.job import LocalJob, local_job, local_job_if_started
from moreh.accelerator.registry import read_registry
from moreh.storages import storage_of


class JobDevice:
    """Implements `moreh.patches.cuda.simulated_device.SimulatedDevice`."""

    name = ACCELERATOR_NAME
    """The name that `torch.cuda.get_device_name` returns."""
    capability = (9, 0)
    """The compute capability that torch for ROCm reports for an MI250."""

    def __init__(self) -> None:
        self._is_in_use = False

    def is_in_use(self) -> bool:
        """True if the script has put anything on the device. A model that is merely trained was not put there."""
        return self._is_in_use

    def capacity_bytes(self) -> int:
        """Memory that the job may use, or may use once it is one, in bytes."""
        job = local_job_if_started()
        if job is not None:
            return job.capacity_bytes
        registry = read_registry()
        return registry.accelerator(visible_device(registry.current)).flavor.device.memory_bytes

    def allocated_bytes(self) -> int:
        """Memory that the job uses now, in bytes."""
        job = _watched_job()
        return 0 if job is None else job.ledger.total_bytes()

    def peak_bytes(self) -> int:
        """The most memory that the job has used, in bytes."""
        job = _watched_job()
        return 0 if job is None else job.peak_bytes()

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        job = _watched_job()
        if job is not None:
            job.ledger.reset_peak()

    def holds(self, tensor: torch.Tensor) -> bool:
        """True if a tensor was made on the device or moved there. The results of operations are not tracked."""
        job = local_job_if_started()
        return job is not None and job.ledger.holds(tensor)

    def may_hold(self, tensor: torch.Tensor) -> bool:
        """True if a tensor is on the device or, as the result of an operation, could be.

        A leaf with a gradient is not a result. If its module was moved and cast afterwards, its memory is new.
        """
        if self.holds(tensor):
            return True
        if isinstance(tensor, torch.nn.Parameter) or (tensor.is_leaf and tensor.requires_grad):
            job = local_job_if_started()
            return job is not None and job.ledger.has_parameter(tensor)
        return True

    def add_tensor(self, tensor: torch.Tensor) -> None:
        """Put a tensor on the device, unless it is there already.

        Raises:
            SimulatedOutOfMemoryError: the tensor does not fit.
            AcceleratorError: another process is using the accelerator.
        """
        job = local_job()
        self._is_in_use = True
        if not job.ledger.holds(tensor):
            storage = storage_of(tensor)
            job.require("a tensor", 0 if storage is None else storage.nbytes())
            job.ledger.add_tensor(tensor)
            job.report()

    def admit_module(self, module: torch.nn.Module) -> None:
        """Check that a module fits before it is moved.

        Raises:
            SimulatedOutOfMemoryError: the module does not fit.
            AcceleratorError: another process is using the accelerator.
        """
        local_job().admit_module(module)

    def add_module(self, module: torch.nn.Module) -> None:
        """Count a module that was moved to the device."""
        local_job().ledger.add_module(module)
        self._is_in_use = True

    def remove_module(self, module: torch.nn.Module) -> None:
        """Stop counting a module, which has left the device."""
        job = local_job_if_started()
        if job is not None:
            job.ledger.remove_module(module)


def _watched_job() -> LocalJob | None:
    """The job, whose activations are counted in all calls from now on; None before it has started."""
    job = local_job_if_started()
    if job is not None:
        job.ledger.activations.is_watched = True
    return job
