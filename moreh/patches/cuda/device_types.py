"""The part of the CUDA face in functions that take the name of a device: `torch.autocast` and `torch.load`."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from moreh.patches.cuda.device_argument import names_accelerator
from moreh.patches.patch import Patch

AUTOCAST = Patch(
    target="torch.autocast.__init__",
    why='`torch.autocast("cuda")` is the CPU\'s autocast, since the accelerator computes on the CPU.',
    no_public_way="torch has no aliases for device types.",
    tested=("torch 2.11", "torch 2.13", "torch 2.15"),
)
LOAD = Patch(
    target="torch.load",
    why='`torch.load(map_location="cuda")` loads into CPU memory, where the accelerator\'s tensors are.',
    no_public_way="`map_location` is an argument of the script, and torch has no hook that changes it.",
    tested=("torch 2.11", "torch 2.13", "torch 2.15"),
)


def install_device_types() -> None:
    """Replace torch's functions that take the name of a device and no tensor."""
    AUTOCAST.install(_autocast_init)
    LOAD.install(_load)


def _autocast_init(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        original(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    return init


def _load(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        if map_location is not None and names_accelerator(map_location):
            map_location = "cpu"
        return original(f, map_location, *args, **kwargs)

    load.__module__, load.__qualname__ = "torch", "load"  # so that it can be pickled
    return load
