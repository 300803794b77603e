"""The part of the CUDA face that creates tensors: `device="cuda"` in the factory functions of torch."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._device import DeviceContext, _device_constructors

from moreh.accelerator.job import local_job
from moreh.accelerator.memory.storages import shares_storage, storage_of
from moreh.patches.cuda.queries import names_accelerator

_LIKE = ("empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like")
_NEW = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")
# They take a device, but torch leaves them out of its own list of such functions.
_OTHERS = (torch.normal, torch.nested.as_nested_tensor)
# They give the memory that they were given, if they can.
_SHARING = ("as_tensor", "asarray")


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    """Enter a tensor into the ledger as being on the device.

    Raises:
        SimulatedOutOfMemoryError: it does not fit.
        AcceleratorError: another process is using the accelerator.
    """
    job = local_job()
    if not job.ledger.holds(tensor):
        storage = storage_of(tensor)
        job.require("a tensor", 0 if storage is None else storage.nbytes())
        job.ledger.add_tensor(tensor)
        job.report()
    return tensor


def replace_factories() -> None:
    """Replace every function of torch that creates a tensor on a device."""
    # The set is built on its first use and must hold torch's own functions: they are what reaches a DeviceContext.
    constructors = _device_constructors()
    replaced: dict[Any, Callable[..., Any]] = {}
    modules: tuple[ModuleType, ...] = (torch, torch.fft, torch.nested)
    for module in modules:
        for name in dir(module):
            function: Any = getattr(module, name)
            if not callable(function):
                continue
            if function in constructors or function in _OTHERS or (module is torch and name in _LIKE):
                replaced[function] = _creates(function, module.__name__, name)
                setattr(module, name, replaced[function])
    for name in _NEW:
        setattr(torch.Tensor, name, _creates(getattr(torch.Tensor, name), "torch", f"Tensor.{name}"))
    _replace_device_context(replaced)
    _tell_torchscript(replaced)


def _creates(original: Callable[..., Any], module_name: str, qualified_name: str) -> Callable[..., Any]:
    """A factory function that makes its tensor in the processor's memory where `device` means the accelerator."""
    name = qualified_name.split(".")[-1]

    @functools.wraps(original)
    def create(*args: Any, **kwargs: Any) -> Any:
        # A tensor of a class of its own looks the function up by what the user calls, which is this one.
        if name in _LIKE and args and has_torch_function(args[:1]):
            return handle_torch_function(create, args[:1], *args, **kwargs)
        device = kwargs.get("device")
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if device is None or not names_accelerator(device):
            return original(*args, **kwargs)
        created = _allocate(original, args, {**kwargs, "device": "cpu"})
        if torch.compiler.is_compiling():
            return created
        if name in _SHARING and not (isinstance(args[0], torch.Tensor) and local_job().ledger.holds(args[0])):
            created = created.clone()
        elif any(shares_storage(created, value) for value in args):
            return created
        return on_device(created)

    # So that it can be pickled by its name, as the original can.
    create.__module__, create.__qualname__ = module_name, qualified_name
    return create


def _allocate(original: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    try:
        return original(*args, **kwargs)
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise torch.OutOfMemoryError(
            f"This machine is out of memory, whatever the simulated accelerator has: {str(error).splitlines()[0]}"
        ) from error


def _replace_device_context(replaced: dict[Any, Callable[..., Any]]) -> None:
    """Teach `with torch.device("cuda")` and `set_default_device`, which call torch's own functions, the replaced ones."""
    constructors = _device_constructors()

    def torch_function(
        self: DeviceContext, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in constructors and kwargs.get("device") is None:
            kwargs["device"] = self.device
        return replaced.get(func, func)(*args, **kwargs)

    DeviceContext.__torch_function__ = torch_function  # type: ignore[method-assign]


def _tell_torchscript(replaced: dict[Any, Callable[..., Any]]) -> None:
    """Let TorchScript, which knows torch's functions by their identity, take the replaced ones for the same."""
    from torch.jit import _builtins

    original: Any = _builtins._get_builtin_table

    @functools.wraps(original)
    def table() -> dict[int, str]:
        known: dict[int, str] = original()
        _builtins._get_builtin_table = original  # the table is built once
        for function, replacement in replaced.items():
            if id(function) in known:
                known[id(replacement)] = known[id(function)]
        return known

    _builtins._get_builtin_table = table
