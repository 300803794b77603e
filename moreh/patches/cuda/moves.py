"""The part of the CUDA face that moves tensors and modules: `.cuda()`, `.to("cuda")`, `.cpu()`.

Tensors on the device stay in CPU memory and keep the device `cpu`; the simulated device remembers which they are. As
with a real GPU, moving a tensor there or back makes a copy, and moving it to where it is does not: code that changes
a moved tensor in place, or keeps `parameter.cpu()` as a snapshot, means the same as with a GPU.

Leaving the device copies what the device may hold. A parameter, or another leaf with a gradient, is known to be there
or not: one that is not is returned itself, since a copy would be no leaf, and under no_grad would have no gradient. The
result of an operation may be on either side, and is copied: a needless copy of it does no harm, a hidden alias does.
Before the script has put anything on the device, nothing is copied.

The functions that take a device are replaced by ones that look at it. A mode that sees every call of torch could do
the same, but costs about two microseconds for each call, holds for one thread only, and would have to be taken off
while a model computes.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import parameter as torch_parameter

from moreh.patches.cuda.caller_origin import caller_is_user_code
from moreh.patches.cuda.device_argument import (
    WHY_NO_FUNCTION_MODE,
    is_device_index,
    names_accelerator,
    require_device_zero,
)
from moreh.patches.cuda.simulated_device import SimulatedDevice
from moreh.patches.patch import Patch
from moreh.storages import shares_storage

TENSOR_MOVES = Patch(
    target="torch.Tensor",
    names=("to", "cuda", "cpu", "pin_memory"),
    why="Tensors move to the accelerator and back, as copies.",
    no_public_way=WHY_NO_FUNCTION_MODE,
    tested=("torch 2.11", "torch 2.13", "torch 2.15"),
)
COMPILED_TENSOR_CUDA = Patch(
    target="torch._subclasses.functional_tensor.FunctionalTensor.cuda",
    why="`.cuda()` works in compiled functions, where this class stands in for tensors.",
    no_public_way="The class has its own `cuda`, which would start CUDA.",
    tested=("torch 2.11", "torch 2.13", "torch 2.15"),
)
LAZY_PARAMETER_METHODS = Patch(
    target="torch.nn.parameter.UninitializedTensorMixin._allowed_methods",
    why="Parameters of lazy modules, which have no data yet, accept the replaced methods.",
    no_public_way="The list is compared by identity and has no function that adds to it.",
    tested=("torch 2.11", "torch 2.13", "torch 2.15"),
)
MODULE_MOVES = Patch(
    target="torch.nn.Module",
    names=("cuda", "to", "to_empty", "cpu"),
    why="The accelerator counts the memory of modules that are moved to it, and refuses what does not fit.",
    no_public_way="torch has no hook for moving a module.",
    tested=("torch 2.11", "torch 2.13", "torch 2.15"),
)


def install_moves(device: SimulatedDevice) -> None:
    """Replace the methods of tensors and modules that take a device."""
    methods = _tensor_methods(device)
    TENSOR_MOVES.install_each(lambda name, _: methods[name])
    COMPILED_TENSOR_CUDA.install(lambda _: methods["cuda"])
    LAZY_PARAMETER_METHODS.install(lambda allowed: [*allowed, methods["to"], methods["cuda"], methods["cpu"]])
    directions: dict[str, Callable[..., bool | None]] = {
        "cuda": _direction_of_cuda,
        "to": functools.partial(_direction_of_to, device),
        "to_empty": functools.partial(_direction_of_to, device),
        "cpu": _direction_of_cpu,
    }
    MODULE_MOVES.install_each(lambda name, original: _counted(original, directions[name], device))


def _copied(result: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """The result of a move, as a copy if it shares memory with its source."""
    return result.clone() if shares_storage(result, source) and not torch_parameter.is_lazy(result) else result


def _tensor_methods(device: SimulatedDevice) -> dict[str, Callable[..., Any]]:
    """The replacements of `torch.Tensor`'s methods, by name."""
    original_to, original_cpu = torch.Tensor.to, torch.Tensor.cpu
    # Where a function mode is active, torch calls the replaced `to` again from inside the original one. A device
    # object, unlike the string "cpu", does not mean leaving the accelerator there.
    cpu_device = torch.device("cpu")

    def on_device(tensor: torch.Tensor) -> torch.Tensor:
        device.add_tensor(tensor)
        return tensor

    def moved(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The tensor on the device with dtype and format as asked, copied if it is not there yet."""
        result = original_to(tensor, cpu_device, *args, **kwargs)
        if torch.compiler.is_compiling():  # a compiled function knows no ledger
            return result
        return on_device(result if device.holds(tensor) else _copied(result, tensor))

    def leaves_accelerator(tensor: torch.Tensor, target: Any) -> bool:
        """True if a move takes a tensor off the device.

        A library's device object may not mean that: a tensor on the device says `cpu` too.
        """
        if not device.is_in_use() or torch.compiler.is_compiling():
            return False
        means_cpu = target == "cpu" or (target == cpu_device and caller_is_user_code(frames_up=2))
        return means_cpu and device.may_hold(tensor)

    @functools.wraps(original_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        target = args[0] if args else kwargs.get("device", kwargs.get("other"))
        if target is None or isinstance(target, torch.dtype):
            return original_to(self, *args, **kwargs)
        if isinstance(target, torch.Tensor):
            result = original_to(self, *args, **kwargs)
            return on_device(_copied(result, self)) if device.holds(target) and not device.holds(self) else result
        if names_accelerator(target):
            return moved(self, *args[1:], **{k: v for k, v in kwargs.items() if k != "device"})
        result = original_to(self, *args, **kwargs)
        return _copied(result, self) if result is self and leaves_accelerator(self, target) else result

    @functools.wraps(torch.Tensor.cuda)
    def cuda(self: torch.Tensor, device: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        require_device_zero(device)
        non_blocking = args[0] if args else kwargs.pop("non_blocking", False)
        return self.to("cuda", non_blocking=non_blocking, **kwargs)

    @functools.wraps(original_cpu)
    def cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = original_cpu(self, *args, **kwargs)
        return _copied(result, self) if result is self and leaves_accelerator(self, "cpu") else result

    @functools.wraps(torch.Tensor.pin_memory)
    def pin_memory(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    methods: dict[str, Any] = {"to": to, "cuda": cuda, "cpu": cpu, "pin_memory": pin_memory}
    for name, method in methods.items():
        method.__module__, method.__qualname__ = "torch", f"Tensor.{name}"  # so that it can be pickled
    return methods


_moving = threading.local()


def _counted(
    original: Callable[..., Any], direction: Callable[..., bool | None], device: SimulatedDevice
) -> Callable[..., Any]:
    """A method that moves a module and lets the device count it.

    `direction` tells from the arguments: True onto the device, False off it, None neither.
    """

    @functools.wraps(original)
    def move(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        onto = direction(*args, **kwargs)
        # An override, such as transformers', calls this again.
        if onto is None or getattr(_moving, "active", False):
            return original(self, *args, **kwargs)
        _moving.active = True
        try:
            if onto:
                device.admit_module(self)
                args = tuple("cuda" if is_device_index(value) else value for value in args)
                kwargs = {name: "cuda" if is_device_index(value) else value for name, value in kwargs.items()}
            result = original(self, *args, **kwargs)
        finally:
            _moving.active = False
        if onto:
            device.add_module(self)
        else:
            device.remove_module(self)
        return result

    return move


def _direction_of_cuda(device: Any = None) -> bool:
    require_device_zero(device)
    return True


def _direction_of_to(simulated_device: SimulatedDevice, /, *args: Any, **kwargs: Any) -> bool | None:
    target = args[0] if args else kwargs.get("device", kwargs.get("tensor"))
    if target is None or isinstance(target, torch.dtype):
        return None
    if isinstance(target, torch.Tensor):
        return True if simulated_device.holds(target) else None
    return True if names_accelerator(target) else False if target == "cpu" else None


def _direction_of_cpu() -> bool:
    return False
