"""Takes `device_map` from the arguments of `from_pretrained` on several workers, where the plan places the weights.

A map that means one device is what a script for one device writes, and is taken as `.to(device)` of the loaded model.
A strategy such as `"auto"` leaves the choice to the library, and so to the plan.
"""

from collections.abc import Mapping
from typing import Any

import torch

from moreh.errors import OptionError
from moreh.patches.cuda.device_argument import is_device_index, require_device_zero

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def take_device_map(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], torch.device | None]:
    """The arguments of `from_pretrained` without `device_map`, and the one device that it means.

    The device is None if there is no map, or if it leaves the choice to the library.

    Raises:
        OptionError: the map means several devices, a disk or no device, or `max_memory` limits the library's choice.
        AcceleratorError: it means a second device of a simulated accelerator.
    """
    device_map = arguments.get("device_map")
    if device_map is None:
        return dict(arguments), None
    others = {name: value for name, value in arguments.items() if name != "device_map"}
    if isinstance(device_map, str) and device_map in _STRATEGIES:
        if arguments.get("max_memory") is not None:
            raise _refused("max_memory", arguments["max_memory"])
        return others, torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    devices = {_device(value) for value in (device_map.values() if isinstance(device_map, Mapping) else [device_map])}
    device = devices.pop() if len(devices) == 1 else None
    if device is None:
        raise _refused("device_map", device_map)
    return others, device


def _device(value: Any) -> torch.device | None:
    """The device of this worker that an entry of a map means; None if it means another one, or none."""
    try:
        device = torch.device("cuda", value) if is_device_index(value) else torch.device(value)
    except (RuntimeError, TypeError):  # "disk", and what is no device
        return None
    if device.type != "cuda":
        return device if device.type == "cpu" else None
    if not torch.cuda.is_available():
        require_device_zero(device)
        return torch.device("cuda")
    own = torch.device("cuda", torch.cuda.current_device())
    # A script for one GPU calls its GPU 0, whichever is this worker's.
    return own if device.index in (None, 0, own.index) else None


def _refused(name: str, value: Any) -> OptionError:
    return OptionError(
        f"from_pretrained was given {name}={value!r}, but with several workers the plan decides where the weights go. "
        f"Leave {name} out, or give one device, such as device_map='cpu'."
    )
