"""The values of a `device` argument that mean the accelerator."""

from typing import Any

import torch

from moreh.errors import AcceleratorError

WHY_NO_FUNCTION_MODE = (
    "A TorchFunctionMode costs two microseconds for each call of torch, holds for one thread only, and would have to "
    "be removed while a model computes."
)
"""The reason why device arguments are replaced in each function, and not by a mode."""


def names_accelerator(device: Any) -> bool:
    """True if a device argument means the accelerator: `"cuda"`, `"cuda:0"`, `torch.device("cuda")` or an index.

    Raises:
        AcceleratorError: it means a second one, such as `"cuda:1"`.
    """
    if isinstance(device, torch.device):
        is_cuda = device.type == "cuda"
    elif isinstance(device, str):
        is_cuda = device == "cuda" or device.startswith("cuda:")
    else:
        is_cuda = is_device_index(device)
    if is_cuda:
        require_device_zero(device)
    return is_cuda


def is_device_index(value: Any) -> bool:
    """True if a value is an index of a device rather than another argument, such as a flag."""
    return isinstance(value, int) and not isinstance(value, bool)


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
