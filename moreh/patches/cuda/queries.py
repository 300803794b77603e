"""The CUDA face, first half: what a script asks torch.cuda on a machine without a GPU.

A script gets the accelerator's answers. A library gets torch's own, so that none is led into CUDA code that this build
of torch lacks: transformers, accelerate and torch itself keep choosing their CPU paths.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moreh.accelerator.devices import Device
from moreh.accelerator.job import local_job_if_started
from moreh.accelerator.registry import read_registry
from moreh.errors import AcceleratorError
from moreh.patches.cuda.caller_origin import caller_is_user_code

NAME = "MoAI Accelerator"
CAPABILITY = (9, 0)  # what torch for ROCm reports of an MI250


@dataclass(frozen=True)
class DeviceProperties:
    """What `torch.cuda.get_device_properties` tells of the accelerator; memory in bytes."""

    name: str
    total_memory: int
    major: int = CAPABILITY[0]
    minor: int = CAPABILITY[1]


def install_probes() -> None:
    """Replace the functions of torch.cuda that scripts call."""
    for probe in (
        is_available,
        is_bf16_supported,
        device_count,
        current_device,
        set_device,
        get_device_capability,
        get_device_name,
        get_device_properties,
        memory_allocated,
        max_memory_allocated,
        memory_reserved,
        max_memory_reserved,
        reset_peak_memory_stats,
        mem_get_info,
        synchronize,
        manual_seed,
        manual_seed_all,
        init,
        ipc_collect,
    ):
        name = probe.__name__
        replacement = _for_user_code(probe, getattr(torch.cuda, name))
        setattr(torch.cuda, name, replacement)
        if hasattr(torch.cuda.memory, name):
            setattr(torch.cuda.memory, name, replacement)
    # torch.random.fork_rng, a library's function, calls these for the devices that the script gives it.
    for state in (get_rng_state, set_rng_state, get_rng_state_all, set_rng_state_all):
        setattr(torch.cuda, state.__name__, state)
    # `with torch.cuda.device(0):` uses these two, which the compiler expects to be two different functions.
    for name in ("_exchange_device", "_maybe_exchange_device"):
        setattr(torch.cuda, name, functools.partial(_exchange_device))
    # empty_cache already does nothing without a GPU.


def names_accelerator(device: Any) -> bool:
    """Whether a device argument means the accelerator: `"cuda"`, `"cuda:0"`, `torch.device("cuda")` or an index.

    Raises:
        AcceleratorError: it means a second one, such as `"cuda:1"`.
    """
    if isinstance(device, torch.device):
        named = device.type == "cuda"
    elif isinstance(device, str):
        named = device == "cuda" or device.startswith("cuda:")
    else:
        named = isinstance(device, int) and not isinstance(device, bool)
    if named:
        require_device_zero(device)
    return named


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


def _exchange_device(index: int | None) -> int:
    # Without an index, as in torch.device("cuda"), or with -1 it means the current device.
    require_device_zero(None if index in (None, -1) else index)
    return 0


def get_device_capability(device: Any = None) -> tuple[int, int]:
    require_device_zero(device)
    return CAPABILITY


def init() -> None:
    pass


def ipc_collect() -> None:
    pass


def manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # random numbers on the device come from the processor's generator


def manual_seed_all(seed: int) -> None:
    manual_seed(seed)


def get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(new_state)


def get_rng_state_all() -> list[torch.Tensor]:
    return [get_rng_state()]


def set_rng_state_all(new_states: list[torch.Tensor]) -> None:
    for state in new_states:
        set_rng_state(state)


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
    return 0 if job is None else job.peak_bytes()


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
