"""The CUDA face, second half: `.cuda()`, `.to("cuda")`, `device="cuda"` on a machine without a GPU.

Such tensors stay in the processor's memory and keep the device `cpu`; the ledger remembers that they are "on the device".
As with a real GPU, moving a tensor there or back makes a copy, and moving it to where it is does not: code that
changes a moved tensor in place, or keeps `parameter.cpu()` as a snapshot, means the same as with a GPU.

The functions that take a device are replaced by ones that look at it. A mode that sees every call of torch could do
the same, but costs about two microseconds for each call, holds for one thread only, and would have to be taken off while
a model computes.
"""

import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import DeviceContext, _device_constructors

from moreh.accelerator.cuda_probes import require_device_zero
from moreh.accelerator.local_job import local_job, local_job_if_started

_LIKE = ("empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like")
_NEW = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")


def install_moves() -> None:
    """Replace torch's functions that take a device."""
    _replace_factories()
    _replace_tensor_methods()
    _replace_module_methods()
    _replace_autocast()
    _replace_load()
    # Pinned memory makes copies to a GPU faster; here there is nothing to copy to, and a DataLoader says so every time.
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator is found")


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


def _on_device(tensor: torch.Tensor) -> torch.Tensor:
    """Enter a new tensor into the ledger."""
    job = local_job()
    if not job.ledger.holds(tensor):
        job.require("a tensor", tensor.nbytes if tensor.layout == torch.strided else 0)
        job.ledger.add_tensor(tensor)
        job.report()
    return tensor


def _held(tensor: torch.Tensor) -> bool:
    job = local_job_if_started()
    return job is not None and job.ledger.holds(tensor)


def _creates(original: Callable[..., Any]) -> Callable[..., Any]:
    """A factory function that makes its tensor in the processor's memory where `device` means the accelerator."""

    @functools.wraps(original)
    def create(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is None or not names_accelerator(device):
            return original(*args, **kwargs)
        kwargs["device"] = "cpu"
        created = original(*args, **kwargs)
        if created.layout == torch.strided and any(_shares_storage(created, a) for a in (*args, *kwargs.values())):
            created = created.clone()  # as_tensor and asarray give the very tensor they were given
        return _on_device(created)

    return create


def _shares_storage(tensor: torch.Tensor, other: Any) -> bool:
    return (
        isinstance(other, torch.Tensor)
        and other.layout == torch.strided
        and tensor.untyped_storage()._cdata == other.untyped_storage()._cdata
        and not _held(other)
    )


def _replace_factories() -> None:
    # The set is built on its first use and must hold torch's own functions: they are what reaches a DeviceContext.
    constructors = _device_constructors()
    replaced = {}
    modules = (torch, torch.fft, torch.nested)
    for module in modules:
        for name in dir(module):
            function: Any = getattr(module, name)
            if callable(function) and (function in constructors or (module is torch and name in _LIKE)):
                replaced[function] = _creates(function)
                setattr(module, name, replaced[function])
    for name in _NEW:
        setattr(torch.Tensor, name, _creates(getattr(torch.Tensor, name)))

    def torch_function(self: DeviceContext, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """What `with torch.device("cuda")` and `set_default_device` do to each call."""
        kwargs = kwargs or {}
        if func in constructors and kwargs.get("device") is None:
            kwargs["device"] = self.device
        return replaced.get(func, func)(*args, **kwargs)

    DeviceContext.__torch_function__ = torch_function  # type: ignore[method-assign]


def _replace_tensor_methods() -> None:
    original_to, original_cpu = torch.Tensor.to, torch.Tensor.cpu

    # Where a function mode is active, torch calls the replaced `to` again from inside the original one. A device object,
    # unlike the word "cpu", does not mean leaving the accelerator there.
    processor = torch.device("cpu")

    def moved(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The tensor with dtype and format as asked, copied if it is not on the device yet."""
        result = original_to(tensor, processor, *args, **kwargs)
        if not _held(tensor) and result.layout == torch.strided and _shares_storage(result, tensor):
            result = result.clone()
        return _on_device(result)

    @functools.wraps(original_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        target = args[0] if args else kwargs.get("device")
        if target is None or isinstance(target, (torch.dtype, torch.Tensor)):
            return original_to(self, *args, **kwargs)
        if names_accelerator(target):
            return moved(self, *args[1:], **{k: v for k, v in kwargs.items() if k != "device"})
        result = original_to(self, *args, **kwargs)
        # Only the words "cpu" mean leaving the device: tensors on it also say that their device is cpu.
        return result.clone() if target == "cpu" and result is self and _held(self) else result

    @functools.wraps(torch.Tensor.cuda)
    def cuda(self: torch.Tensor, device: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        require_device_zero(device)
        non_blocking = args[0] if args else kwargs.pop("non_blocking", False)
        return moved(self, non_blocking=non_blocking, **kwargs)

    @functools.wraps(original_cpu)
    def cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = original_cpu(self, *args, **kwargs)
        return result.clone() if result is self and _held(self) else result

    @functools.wraps(torch.Tensor.pin_memory)
    def pin_memory(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    for method in (to, cuda, cpu, pin_memory):
        setattr(torch.Tensor, method.__name__, method)


_moving = threading.local()


def _replace_module_methods() -> None:
    module_class = torch.nn.Module

    def watching(original: Callable[..., Any], leads_to_accelerator: Callable[..., bool | None]) -> Callable[..., Any]:
        """`leads_to_accelerator` tells from the arguments: True onto the device, False off it, None neither."""

        @functools.wraps(original)
        def move(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            onto = leads_to_accelerator(*args, **kwargs)
            if onto is None or getattr(_moving, "active", False):  # an override, such as transformers', calls this again
                return original(self, *args, **kwargs)
            _moving.active = True
            try:
                if onto:
                    local_job().admit_module(self)
                    args = tuple("cuda" if isinstance(a, int) and not isinstance(a, bool) else a for a in args)
                result = original(self, *args, **kwargs)
            finally:
                _moving.active = False
            if onto:
                local_job().watch_module(self)
            else:
                job = local_job_if_started()
                if job is not None:
                    job.ledger.remove_module(self)
            return result

        return move

    def cuda_leads(device: Any = None) -> bool:
        require_device_zero(device)
        return True

    def to_leads(*args: Any, **kwargs: Any) -> bool | None:
        target = args[0] if args else kwargs.get("device")
        if target is None or isinstance(target, (torch.dtype, torch.Tensor)):
            return None
        return True if names_accelerator(target) else False if target == "cpu" else None

    def cpu_leads() -> bool:
        return False

    module_class.cuda = watching(module_class.cuda, cuda_leads)  # type: ignore[method-assign]
    module_class.to = watching(module_class.to, to_leads)  # type: ignore[method-assign]
    module_class.to_empty = watching(module_class.to_empty, to_leads)  # type: ignore[method-assign]
    module_class.cpu = watching(module_class.cpu, cpu_leads)  # type: ignore[method-assign]


def _replace_autocast() -> None:
    original = torch.autocast.__init__

    @functools.wraps(original)
    def init(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        original(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    torch.autocast.__init__ = init  # type: ignore[method-assign]


def _replace_load() -> None:
    original = torch.load

    @functools.wraps(original)
    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        if map_location is not None and names_accelerator(map_location):
            map_location = "cpu"
        return original(f, map_location, *args, **kwargs)

    torch.load = load
