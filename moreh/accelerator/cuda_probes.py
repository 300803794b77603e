"""The CUDA face, first half: what a script asks torch.cuda on a machine without a GPU.

A script gets the accelerator's answers. A library gets torch's own, so that none is led into CUDA code that this build
of torch lacks: transformers, accelerate and torch itself keep choosing their CPU paths.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moreh.accelerator.callers import caller_is_user_code
from moreh.accelerator.flavors import Device
from moreh.accelerator.local_job import local_job_if_started
from moreh.accelerator.registry import read_registry
from moreh.errors import AcceleratorError

NAME = "MoAI Accelerator"


@dataclass(frozen=True)
class DeviceProperties:
    """What `torch.cuda.get_device_properties` tells of the accelerator; memory in bytes."""

    name: str
    total_memory: int


def install_probes() -> None:
    """Replace the functions of torch.cuda that scripts call."""
    for probe in (
        is_available,
        is_bf16_supported,
        device_count,
        current_device,
        set_device,
        get_device_name,
        get_device_properties,
        memory_allocated,
        max_memory_allocated,
        memory_reserved,
        max_memory_reserved,
        reset_peak_memory_stats,
        mem_get_info,
        synchronize,
    ):
        setattr(torch.cuda, probe.__name__, _for_user_code(probe, getattr(torch.cuda, probe.__name__)))
    # `with torch.cuda.device(0):` uses these two, which the compiler expects to be two different functions.
    for name in ("_exchange_device", "_maybe_exchange_device"):
        setattr(torch.cuda, name, functools.partial(_exchange_device))
    # empty_cache, manual_seed and manual_seed_all already do nothing, or the right thing, without a GPU.


def require_device_zero(device: Any) -> None:
    """Check that a device, if it has an index, is the accelerator.

    Raises:
        AcceleratorError: the index is not 0.
    """
    index = device if isinstance(device, int) else None if device is None else torch.device(device).index
    if index not in (None, 0):
        raise AcceleratorError(
            f"no device cuda:{index}: a script sees one device, cuda:0, the whole MoAI Accelerator; "
            "'moreh-switch-model' makes it larger"
        )


def is_available() -> bool:
    return True


def is_bf16_supported(including_emulation: bool = True) -> bool:
    return True


def device_count() -> int:
    return 1


def current_device() -> int:
    return 0


def set_device(device: Any) -> None:
    require_device_zero(device)


def _exchange_device(index: int) -> int:
    require_device_zero(index if index >= 0 else None)
    return 0


def get_device_name(device: Any = None) -> str:
    require_device_zero(device)
    return NAME


def get_device_properties(device: Any = None) -> DeviceProperties:
    require_device_zero(device)
    return DeviceProperties(name=NAME, total_memory=_capacity_bytes())


def memory_allocated(device: Any = None) -> int:
    require_device_zero(device)
    job = local_job_if_started()
    return 0 if job is None else job.ledger.total_bytes()


def max_memory_allocated(device: Any = None) -> int:
    require_device_zero(device)
    job = local_job_if_started()
    return 0 if job is None else job.ledger.peak_bytes()


def memory_reserved(device: Any = None) -> int:
    return memory_allocated(device)


def max_memory_reserved(device: Any = None) -> int:
    return max_memory_allocated(device)


def reset_peak_memory_stats(device: Any = None) -> None:
    require_device_zero(device)
    job = local_job_if_started()
    if job is not None:
        job.ledger.reset_peak()


def mem_get_info(device: Any = None) -> tuple[int, int]:
    total = _capacity_bytes()
    return max(total - memory_allocated(device), 0), total


def synchronize(device: Any = None) -> None:
    require_device_zero(device)


def _capacity_bytes() -> int:
    job = local_job_if_started()
    if job is not None:
        return job.capacity_bytes
    registry = read_registry()
    device: Device = registry.accelerator(registry.current).flavor.device
    return device.memory_bytes


def _for_user_code(simulated: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def probe(*args: Any, **kwargs: Any) -> Any:
        if caller_is_user_code(frames_up=1):
            return simulated(*args, **kwargs)
        return original(*args, **kwargs)

    return probe
