"""The CUDA face, second half: `.cuda()`, `.to("cuda")`, `device="cuda"` on a machine without a GPU.

Such tensors stay in the processor's memory and keep the device `cpu`; the ledger remembers that they are "on the device".
As with a real GPU, moving a tensor there or back makes a copy, and moving it to where it is does not: code that changes a
moved tensor in place, or keeps `parameter.cpu()` as a snapshot, means the same as with a GPU. Where it is not known on
which side a tensor is, as with the result of an operation, it is copied: a needless copy does no harm, a hidden alias does.

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
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import parameter as torch_parameter

from moreh.accelerator.job import local_job, local_job_if_started
from moreh.accelerator.memory.storages import shares_storage
from moreh.patches.cuda.caller_origin import caller_is_user_code
from moreh.patches.cuda.factories import on_device, replace_factories
from moreh.patches.cuda.queries import names_accelerator, require_device_zero


def install_moves() -> None:
    """Replace torch's functions that take a device."""
    replace_factories()
    _replace_tensor_methods()
    _replace_module_methods()
    _replace_autocast()
    _replace_load()
    # Pinned memory makes copies to a GPU faster; here there is nothing to copy to, and a DataLoader says so every time.
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator is found")


def _held(tensor: torch.Tensor) -> bool:
    job = local_job_if_started()
    return job is not None and job.ledger.holds(tensor)


def _copied(result: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """The result of a move, made a copy if it still shares memory with its source."""
    return result.clone() if shares_storage(result, source) and not torch_parameter.is_lazy(result) else result


def _replace_tensor_methods() -> None:
    original_to, original_cpu = torch.Tensor.to, torch.Tensor.cpu
    # Where a function mode is active, torch calls the replaced `to` again from inside the original one. A device object,
    # unlike the word "cpu", does not mean leaving the accelerator there.
    processor = torch.device("cpu")

    def moved(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The tensor on the device with dtype and format as asked, copied if it is not there yet."""
        if torch.compiler.is_compiling():  # a compiled function knows no ledger
            return original_to(tensor, processor, *args, **kwargs)
        result = original_to(tensor, processor, *args, **kwargs)
        return on_device(result if _held(tensor) else _copied(result, tensor))

    def leaves_accelerator(target: Any) -> bool:
        """Whether a target means the processor. A tensor on the device says `cpu` too, so a library's device object may not."""
        if local_job_if_started() is None or torch.compiler.is_compiling():
            return False
        return target == "cpu" or (target == processor and caller_is_user_code(frames_up=2))

    @functools.wraps(original_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        target = args[0] if args else kwargs.get("device", kwargs.get("other"))
        if target is None or isinstance(target, torch.dtype):
            return original_to(self, *args, **kwargs)
        if isinstance(target, torch.Tensor):
            result = original_to(self, *args, **kwargs)
            return on_device(_copied(result, self)) if _held(target) and not _held(self) else result
        if names_accelerator(target):
            return moved(self, *args[1:], **{k: v for k, v in kwargs.items() if k != "device"})
        result = original_to(self, *args, **kwargs)
        return _copied(result, self) if result is self and leaves_accelerator(target) else result

    @functools.wraps(torch.Tensor.cuda)
    def cuda(self: torch.Tensor, device: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        require_device_zero(device)
        non_blocking = args[0] if args else kwargs.pop("non_blocking", False)
        return self.to("cuda", non_blocking=non_blocking, **kwargs)

    @functools.wraps(original_cpu)
    def cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = original_cpu(self, *args, **kwargs)
        return _copied(result, self) if result is self and leaves_accelerator("cpu") else result

    @functools.wraps(torch.Tensor.pin_memory)
    def pin_memory(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    for method in (to, cuda, cpu, pin_memory):
        method.__module__, method.__qualname__ = "torch", f"Tensor.{method.__name__}"  # so that it can be pickled
        setattr(torch.Tensor, method.__name__, method)
    FunctionalTensor.cuda = cuda  # type: ignore[method-assign]  # with which the compiler stands in for tensors
    # The parameters of a lazy module, which have no data yet, let only these methods through.
    lazy: Any = torch_parameter
    lazy.UninitializedTensorMixin._allowed_methods += [to, cuda, cpu]


_moving = threading.local()


def _replace_module_methods() -> None:
    module_class = torch.nn.Module

    def watching(original: Callable[..., Any], leads_to_accelerator: Callable[..., bool | None]) -> Callable[..., Any]:
        """`leads_to_accelerator` tells from the arguments: True onto the device, False off it, None neither."""

        @functools.wraps(original)
        def move(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            onto = leads_to_accelerator(*args, **kwargs)
            if onto is None or getattr(
                _moving, "active", False
            ):  # an override, such as transformers', calls this again
                return original(self, *args, **kwargs)
            _moving.active = True
            try:
                if onto:
                    local_job().admit_module(self)
                    args = tuple("cuda" if _is_index(value) else value for value in args)
                    kwargs = {name: "cuda" if _is_index(value) else value for name, value in kwargs.items()}
                result = original(self, *args, **kwargs)
            finally:
                _moving.active = False
            job = local_job_if_started()
            if onto:
                local_job().ledger.add_module(self)
            elif job is not None:
                job.ledger.remove_module(self)
            return result

        return move

    def cuda_leads(device: Any = None) -> bool:
        require_device_zero(device)
        return True

    def to_leads(*args: Any, **kwargs: Any) -> bool | None:
        target = args[0] if args else kwargs.get("device", kwargs.get("tensor"))
        if target is None or isinstance(target, torch.dtype):
            return None
        if isinstance(target, torch.Tensor):
            return True if _held(target) else None
        return True if names_accelerator(target) else False if target == "cpu" else None

    def cpu_leads() -> bool:
        return False

    module_class.cuda = watching(module_class.cuda, cuda_leads)  # type: ignore[method-assign]
    module_class.to = watching(module_class.to, to_leads)  # type: ignore[method-assign]
    module_class.to_empty = watching(module_class.to_empty, to_leads)  # type: ignore[method-assign]
    module_class.cpu = watching(module_class.cpu, cpu_leads)  # type: ignore[method-assign]


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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

    load.__module__, load.__qualname__ = "torch", "load"
    torch.load = load
