"""Kinds of physical devices, from data sheets (`data/devices.json`).

A new kind of device is one more entry of that file; the planner and the tools find it there.
"""

import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from moreh.accelerator.catalog import check_entry, declared_fields, read_catalog
from moreh.errors import AcceleratorError

_DATA = Path(__file__).parent / "data" / "devices.json"
# What drivers put before the name of a device, in any combination.
_BRANDS = re.compile(r"^((nvidia|amd|tesla|instinct|geforce) )+")


@dataclass(frozen=True)
class Device:
    """One physical device, as the driver counts them, and its links to other devices.

    Rates are peaks: dense, of the data sheets that `source` names, written down from memory. Compare a rate with its
    data sheet before you rely on it. Link rates are of one device, in one direction.
    """

    name: str
    """The name in `data/devices.json`, such as "MI250 GCD"."""
    memory_mib: int
    """Memory that a job can use, in MiB."""
    bf16_flops_per_second: float
    """Peak rate of matmuls in bfloat16, or in float16 where there is no bfloat16."""
    float32_flops_per_second: float
    """Peak rate of matmuls in float32."""
    float8_flops_per_second: float | None
    """Peak rate of matmuls in float8; None if the device has none."""
    memory_bytes_per_second: float
    """Peak rate of the device's own memory."""
    compute_units: int
    """Units that each compute a tile of a matmul: streaming multiprocessors of NVIDIA, compute units of AMD."""
    devices_per_package: int
    """Devices of one package, such as the two GCDs of an MI250."""
    package_bytes_per_second: float | None
    """Link to the other devices of the package; None if there are none."""
    devices_per_node: int
    """Devices of one node."""
    node_bytes_per_second: float
    """Link to the other devices of the node."""
    network_bytes_per_second: float
    """Link to other nodes."""
    efficiency_class: str
    """The class of devices whose measured efficiency applies: a key of `planner/hardware/data/efficiency.json`."""
    source: str
    """The sources of the figures, and which of them are assumed."""
    efficiency_assumed: bool = False
    """True if the class has published runs of other devices only."""
    driver_names: tuple[str, ...] = ()
    """Names that drivers give the device besides `name`, without brands such as "NVIDIA" and "AMD Instinct"."""

    @property
    def memory_bytes(self) -> int:
        """Usable memory in bytes."""
        return self.memory_mib * 2**20

    @property
    def has_rates(self) -> bool:
        """True if the rates are known. Those of a GPU that no entry describes are NaN until they are measured."""
        return not math.isnan(self.bf16_flops_per_second)


@cache
def all_devices() -> dict[str, Device]:
    """Every kind of device, by name.

    Raises:
        AcceleratorError: an entry of `data/devices.json` cannot be right.
    """
    devices = {}
    for name, entry in read_catalog(_DATA).items():
        check_entry(_DATA, name, entry, declared_fields(Device, "name"))
        devices[name] = Device(**{**entry, "name": name, "driver_names": tuple(entry.get("driver_names", ()))})
        _check_packages(devices[name])
    return devices


def _check_packages(device: Device) -> None:
    where = f"{_DATA.name}, entry {device.name!r}"
    if (device.devices_per_package > 1) != (device.package_bytes_per_second is not None):
        raise AcceleratorError(
            f"{where}: package_bytes_per_second is {device.package_bytes_per_second} with devices_per_package "
            f"{device.devices_per_package}; expected a rate where a package has several devices, else null"
        )
    if device.devices_per_node % device.devices_per_package:
        raise AcceleratorError(
            f"{where}: devices_per_node is {device.devices_per_node}; expected a multiple of devices_per_package, "
            f"{device.devices_per_package}"
        )


def find_device(name: str) -> Device:
    """The device with this name, in upper or lower case.

    Raises:
        AcceleratorError: there is no such device.
    """
    for known, device in all_devices().items():
        if known.lower() == name.strip().lower():
            return device
    raise AcceleratorError(f"no device {name!r}: known devices are {', '.join(all_devices())}")


def device_of_driver(name: str, compute_units: int) -> Device | None:
    """The device that a driver calls `name`; None if no entry says so.

    A name must be known as a whole: "A100-SXM4-40GB MIG 1g.5gb" is a seventh of an A100. Where a driver calls several
    devices by one name, the number of compute units decides.
    """
    wanted = _without_brands(name)
    candidates = [
        device
        for device in all_devices().values()
        if wanted in {_without_brands(known) for known in (device.name, *device.driver_names)}
    ]
    return min(candidates, key=lambda device: abs(device.compute_units - compute_units), default=None)


def _without_brands(name: str) -> str:
    return _BRANDS.sub("", " ".join(name.lower().split()))
