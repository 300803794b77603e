"""The part of the CUDA face for queries of torch.cuda, such as `device_count()` and `memory_allocated()`.

A script gets the accelerator's answers. A library gets torch's own, so that none is led into CUDA code that this build
of torch lacks: transformers, accelerate and torch itself keep choosing their CPU paths.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moreh.patches.cuda.caller_origin import (
    caller_asks_for_bfloat16,
    caller_is_torch_or_moreh,
    caller_is_user_code,
)
from moreh.patches.cuda.device_argument import require_device_zero
from moreh.patches.cuda.simulated_device import SimulatedDevice
from moreh.patches.patch import Patch

_WITH_ALIAS = (
    "memory_allocated",
    "max_memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
    "reset_peak_memory_stats",
    "mem_get_info",
)
QUERIES = Patch(
    target="torch.cuda",
    names=(
        "is_available",
        "is_bf16_supported",
        "device_count",
        "current_device",
        "set_device",
        "get_device_capability",
        "get_device_name",
        "get_device_properties",
        *_WITH_ALIAS,
        *(f"memory.{name}" for name in _WITH_ALIAS),
        "synchronize",
        "manual_seed",
        "manual_seed_all",
        "init",
        "ipc_collect",
    ),
    why="Scripts get the accelerator's answers, and libraries get torch's.",
    no_public_way="Only torch's CUDA device can have the name cuda; a device made with PrivateUse1 has another name.",
    tested=("torch 2.11", "torch 2.13", "torch 2.15"),
)
# empty_cache already does nothing without a GPU.

RNG_STATE = Patch(
    target="torch.cuda",
    names=("get_rng_state", "set_rng_state", "get_rng_state_all", "set_rng_state_all"),
    why="The accelerator's random numbers come from the CPU's generator; torch.random.fork_rng asks for its state.",
    no_public_way="The originals start CUDA.",
    tested=("torch 2.11", "torch 2.13", "torch 2.15"),
)
DEVICE_GUARD = Patch(
    target="torch.cuda",
    names=("_exchange_device", "_maybe_exchange_device"),
    why="`with torch.cuda.device(0):` makes the accelerator the current device, which it is.",
    no_public_way="The context manager calls these two; the originals start CUDA.",
    tested=("torch 2.11", "torch 2.13", "torch 2.15"),
)


@dataclass(frozen=True)
class DeviceProperties:
    """The accelerator's properties, for `torch.cuda.get_device_properties`."""

    name: str
    """The name of the device."""
    total_memory: int
    """Memory in bytes."""
    major: int
    """The first number of the compute capability."""
    minor: int
    """The second number of the compute capability."""


def install_queries(device: SimulatedDevice, *, for_all_callers: bool) -> None:
    """Replace the functions of torch.cuda that scripts call.

    `for_all_callers` gives the accelerator's answers to libraries too, except torch and this package.
    """
    answers = CudaAnswers(device)
    is_answered = _everybody_but_torch_and_moreh if for_all_callers else _user_code
    replacements: dict[str, Callable[..., Any]] = {}

    def replacement(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        function = name.removeprefix("memory.")  # an alias stays one
        if function not in replacements:
            replacements[function] = _answering(getattr(answers, function), original, is_answered)
        return replacements[function]

    QUERIES.install_each(replacement)
    RNG_STATE.install_each(lambda name, _: _RNG_FUNCTIONS[name])
    # The compiler expects two different functions.
    DEVICE_GUARD.install_each(lambda name, _: functools.partial(_exchange_device))


class CudaAnswers:
    """Functions of torch.cuda, answered for a simulated device; named and documented as there."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device

    def is_available(self) -> bool:
        return True

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        require_device_zero(device)

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        require_device_zero(device)
        return self._device.capability

    def get_device_name(self, device: Any = None) -> str:
        require_device_zero(device)
        return self._device.name

    def get_device_properties(self, device: Any = None) -> DeviceProperties:
        require_device_zero(device)
        return DeviceProperties(self._device.name, self._device.capacity_bytes(), *self._device.capability)

    def memory_allocated(self, device: Any = None) -> int:
        require_device_zero(device)
        return self._device.allocated_bytes()

    def max_memory_allocated(self, device: Any = None) -> int:
        require_device_zero(device)
        return self._device.peak_bytes()

    def memory_reserved(self, device: Any = None) -> int:
        return self.memory_allocated(device)

    def max_memory_reserved(self, device: Any = None) -> int:
        return self.max_memory_allocated(device)

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        require_device_zero(device)
        self._device.reset_peak()

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        total = self._device.capacity_bytes()
        return max(total - self.memory_allocated(device), 0), total

    def synchronize(self, device: Any = None) -> None:
        require_device_zero(device)

    def manual_seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)  # the device's random numbers come from the CPU's generator

    def manual_seed_all(self, seed: int) -> None:
        self.manual_seed(seed)

    def init(self) -> None:
        pass

    def ipc_collect(self) -> None:
        pass


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(new_state)


def _get_rng_state_all() -> list[torch.Tensor]:
    return [torch.get_rng_state()]


def _set_rng_state_all(new_states: list[torch.Tensor]) -> None:
    for state in new_states:
        torch.set_rng_state(state)


_RNG_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "get_rng_state": _get_rng_state,
    "set_rng_state": _set_rng_state,
    "get_rng_state_all": _get_rng_state_all,
    "set_rng_state_all": _set_rng_state_all,
}


def _exchange_device(index: int | None) -> int:
    # Without an index, as in torch.device("cuda"), or with -1 it means the current device.
    require_device_zero(None if index in (None, -1) else index)
    return 0


def _user_code() -> bool:
    return caller_is_user_code(frames_up=2) or caller_asks_for_bfloat16(frames_up=2)


def _everybody_but_torch_and_moreh() -> bool:
    return not caller_is_torch_or_moreh(frames_up=2)


def _answering(
    answer: Callable[..., Any], original: Callable[..., Any], is_answered: Callable[[], bool]
) -> Callable[..., Any]:
    """A function that gives the accelerator's answer to some callers, and torch's own to the others.

    `is_answered` tells by the caller two frames up.
    """

    @functools.wraps(original)
    def query(*args: Any, **kwargs: Any) -> Any:
        return answer(*args, **kwargs) if is_answered() else original(*args, **kwargs)

    return query
