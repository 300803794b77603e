"""Accelerator flavors: how many devices of which kind (`data/flavors.json`).

The platform calls a flavor the accelerator's "model". A new flavor is one more entry of that file.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moreh.accelerator.devices import Device, find_device
from moreh.errors import AcceleratorError

# What torch.cuda calls the accelerator.
ACCELERATOR_NAME = "MoAI Accelerator"
_DATA = Path(__file__).parent / "data" / "flavors.json"


@dataclass(frozen=True)
class Flavor:
    """A size of accelerator."""

    name: str
    """The name that the tools show, such as "xLarge.512GB"."""
    device: Device
    """The kind of its physical devices."""
    devices: int
    """How many physical devices there are."""
    nodes: int
    """Nodes that the devices are on, equally many on each."""

    @property
    def memory_mib(self) -> int:
        """Usable memory of all devices together, in MiB."""
        return self.devices * self.device.memory_mib


def _load() -> Any:
    return json.loads(_DATA.read_text(encoding="utf-8"))


@cache
def all_flavors() -> tuple[Flavor, ...]:
    """Every flavor, in the order of the numbered list that the tools show (the first one is number 1).

    Raises:
        AcceleratorError: a flavor's device is not in `data/devices.json`.
    """
    return tuple(Flavor(**{**row, "device": find_device(row["device"])}) for row in _load()["flavors"])


@cache
def default_flavor() -> Flavor:
    """The flavor of the accelerator that exists before the user has chosen any."""
    return find_flavor(_load()["default"])


def find_flavor(selection: str) -> Flavor:
    """The flavor with this name (in upper or lower case) or this number of the list, counted from 1.

    Raises:
        AcceleratorError: there is no such flavor.
    """
    flavors = all_flavors()
    text = selection.strip()
    if text.isdecimal() and 1 <= int(text) <= len(flavors):
        return flavors[int(text) - 1]
    for flavor in flavors:
        if flavor.name.lower() == text.lower():
            return flavor
    names = ", ".join(f.name for f in flavors)
    raise AcceleratorError(f"no model {selection!r}: give a number from 1 to {len(flavors)} or one of {names}")
