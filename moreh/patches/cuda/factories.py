"""The part of the CUDA face that creates tensors: `device="cuda"` in the factory functions of torch."""

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch.jit import _builtins
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._device import DeviceContext, _device_constructors

from moreh.patches.cuda.device_argument import WHY_NO_FUNCTION_MODE, names_accelerator
from moreh.patches.cuda.simulated_device import SimulatedDevice
from moreh.patches.patch import Patch
from moreh.storages import shares_storage

_LIKE = ("empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like")
_NEW = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")
# They take a device, but torch leaves them out of its own set of such functions.
_OTHERS = (torch.normal, torch.nested.as_nested_tensor)
# They return the memory of their argument where they can.
_SHARING = ("as_tensor", "asarray")


def _factory_names() -> Iterator[str]:
    """The dotted names, below torch, of the functions that create a tensor on a device."""
    modules: dict[str, ModuleType] = {"": torch, "fft.": torch.fft, "nested.": torch.nested}
    # The set is built on its first use and must hold torch's own functions, which a DeviceContext receives.
    constructors = _device_constructors()
    for prefix, module in modules.items():
        for name in dir(module):
            function: Any = getattr(module, name)
            if callable(function) and (
                function in constructors or function in _OTHERS or (module is torch and name in _LIKE)
            ):
                yield prefix + name


FACTORIES = Patch(
    target="torch",
    names=(*_factory_names(), *(f"Tensor.{name}" for name in _NEW)),
    why="Functions that create a tensor take the accelerator as their device.",
    no_public_way=WHY_NO_FUNCTION_MODE,
    tested=("torch 2.11", "torch 2.13", "torch 2.15"),
)
DEVICE_CONTEXT = Patch(
    target="torch.utils._device.DeviceContext.__torch_function__",
    why='`with torch.device("cuda")` and `torch.set_default_device("cuda")` create tensors on the accelerator.',
    no_public_way="The mode calls torch's original functions, not the replaced ones.",
    tested=("torch 2.11", "torch 2.13", "torch 2.15"),
)
TORCHSCRIPT_BUILTINS = Patch(
    target="torch.jit._builtins._builtin_table",
    why="TorchScript identifies torch's functions by object identity; this entry makes it accept the replaced ones.",
    no_public_way="torch.jit has no function that declares another function to be an operator.",
    tested=("torch 2.11", "torch 2.13", "torch 2.15"),
)


def install_factories(device: SimulatedDevice) -> None:
    """Replace every function of torch that creates a tensor on a device."""
    replaced: dict[Any, Callable[..., Any]] = {}

    def replacement(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        function = _creating(original, name, device)
        if not name.startswith("Tensor."):
            replaced[original] = function
        return function

    FACTORIES.install_each(replacement)
    DEVICE_CONTEXT.install(lambda _: _torch_function_of_context(replaced))
    TORCHSCRIPT_BUILTINS.install(lambda _: _builtins_with(replaced))


def _creating(original: Callable[..., Any], dotted_name: str, device: SimulatedDevice) -> Callable[..., Any]:
    """A factory function that makes its tensor in CPU memory where its `device` argument means the accelerator."""
    submodule, _, name = dotted_name.rpartition(".")

    @functools.wraps(original)
    def create(*args: Any, **kwargs: Any) -> Any:
        # A subclass of Tensor compares the function with the one that users call, which is this one.
        if name in _LIKE and args and has_torch_function(args[:1]):
            return handle_torch_function(create, args[:1], *args, **kwargs)
        target = kwargs.get("device")
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if target is None or not names_accelerator(target):
            return original(*args, **kwargs)
        created = _allocate(original, args, {**kwargs, "device": "cpu"})
        if torch.compiler.is_compiling():
            return created
        if name in _SHARING and not (isinstance(args[0], torch.Tensor) and device.holds(args[0])):
            created = created.clone()
        elif any(shares_storage(created, value) for value in args):
            return created
        device.add_tensor(created)
        return created

    # So that it can be pickled by its name, as the original can.
    if submodule == "Tensor":
        create.__module__, create.__qualname__ = "torch", dotted_name
    else:
        create.__module__, create.__qualname__ = f"torch.{submodule}".rstrip("."), name
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


def _torch_function_of_context(replaced: dict[Any, Callable[..., Any]]) -> Callable[..., Any]:
    """`DeviceContext.__torch_function__`, which gets torch's own functions, with the replaced ones called instead."""
    constructors = _device_constructors()

    def torch_function(
        self: DeviceContext, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in constructors and kwargs.get("device") is None:
            kwargs["device"] = self.device
        return replaced.get(func, func)(*args, **kwargs)

    return torch_function


def _builtins_with(replaced: dict[Any, Callable[..., Any]]) -> dict[int, str]:
    """TorchScript's table of operators by the id of their function, with the replaced functions in it."""
    table: dict[int, str] = dict(_builtins._get_builtin_table())
    for function, replacement in replaced.items():
        if id(function) in table:
            table[id(replacement)] = table[id(function)]
    return table
