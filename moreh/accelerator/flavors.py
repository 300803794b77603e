"""Accelerator flavors: how many devices of which kind (`data/flavors.json`).

The platform calls a flavor the accelerator's "model". A new flavor is one more entry of that file.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from moreh.accelerator.catalog import check_entry, declared_fields, read_catalog
from moreh.accelerator.devices import Device, all_devices, find_device
from moreh.errors import AcceleratorError

# What torch.cuda calls the accelerator.
ACCELERATOR_NAME = "MoAI Accelerator"
_DATA = Path(__file__).parent / "data" / "flavors.json"


@dataclass(frozen=True)
class _Entry:
    """An entry of the file: a flavor with its device by name."""

    name: str
    device: str
    devices: int
    nodes: int


@dataclass(frozen=True)
class Flavor:
    """A size of accelerator."""

    name: str
    """The name that the tools show, such as "xLarge.512GB"."""
    device: Device
    """The kind of its physical devices."""
    devices: int
    """Number of physical devices."""
    nodes: int
    """Nodes that the devices are on, equally many on each."""
    simulated: bool = True
    """True if the flavor is one of the list, so its devices are simulated; False for the GPUs of this machine."""

    @property
    def memory_mib(self) -> int:
        """Usable memory of all devices together, in MiB."""
        return self.devices * self.device.memory_mib

    def with_devices(self, devices: int, devices_per_node: int) -> "Flavor":
        """The same kind of devices in another number."""
        return replace(self, devices=devices, nodes=-(-devices // devices_per_node))


@cache
def all_flavors() -> tuple[Flavor, ...]:
    """Every flavor, in the order of the numbered list that the tools show (the first one is number 1).

    Raises:
        AcceleratorError: an entry of `data/flavors.json` cannot be right, or its device is not in `data/devices.json`.
    """
    return tuple(_make_flavor(entry) for entry in read_catalog(_DATA)["flavors"])


def _make_flavor(entry: Any) -> Flavor:
    name = entry.get("name", "without a name") if isinstance(entry, dict) else repr(entry)
    check_entry(_DATA, name, entry, declared_fields(_Entry))
    where = f"{_DATA.name}, entry {name!r}"
    try:
        device = find_device(entry["device"])
    except AcceleratorError as error:
        raise AcceleratorError(f"{where}: {error}") from None
    devices, nodes = entry["devices"], entry["nodes"]
    if devices % nodes or devices // nodes > device.devices_per_node:
        raise AcceleratorError(
            f"{where}: {devices} devices on {nodes} nodes; expected equally many on each node, at most "
            f"{device.devices_per_node} of {device.name}"
        )
    return Flavor(name, device, devices, nodes)


@cache
def default_flavor() -> Flavor:
    """The flavor of the accelerator that exists before the user has chosen any."""
    return find_flavor(read_catalog(_DATA)["default"])


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
    hint = ""
    if any(text.lower() == name.lower() for name in all_devices()):
        hint = f"; {text} is a device, for which moreh-plan has --device and --devices"
    raise AcceleratorError(f"no model {selection!r}: give a number from 1 to {len(flavors)} or one of {names}{hint}")
