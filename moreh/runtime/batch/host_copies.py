"""Copies of a batch between GPU and CPU, with a single synchronization per step.

A batch is cut on the CPU, since how it is cut depends on its lengths and labels. Each question that Python asks a
tensor on a GPU waits until the GPU has done everything before it.
"""

from typing import Any

import torch


def on_host(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with whole numbers (ids, masks, labels) in the CPU's memory. Waits for the GPU once."""
    values = [*args, *kwargs.values()]
    on_gpu = [value for value in values if isinstance(value, torch.Tensor) and _is_of_numbers_on_gpu(value)]
    if not on_gpu:
        return args, kwargs
    copies = {id(value): copy_to_pinned(value) for value in on_gpu}
    for device in {value.device for value in on_gpu}:
        torch.cuda.current_stream(device).synchronize()
    copied = [copies.get(id(value), value) for value in values]
    return tuple(copied[: len(args)]), dict(zip(kwargs, copied[len(args) :], strict=True))


def copy_to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, which is complete once the GPU's stream has reached it."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return copy.copy_(tensor.detach(), non_blocking=True)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device. The copy from the CPU to a GPU is asynchronous."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        # torch keeps the pinned memory until the copy is done.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _is_of_numbers_on_gpu(tensor: torch.Tensor) -> bool:
    # A tensor of a simulated device, and those of subclasses, lie somewhere else.
    return tensor.is_cuda and not tensor.is_floating_point() and type(tensor) is torch.Tensor
