"""Kinds of physical devices, from data sheets (`data/devices.json`)."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from moreh.errors import AcceleratorError

_DATA = Path(__file__).parent / "data" / "devices.json"


@dataclass(frozen=True)
class Device:
    """One physical device, as the driver counts them, and how it is linked to others.

    `memory_mib` is what a job can use, in MiB. Rates are peaks, dense, of the data sheets that `source` names, written down
    from memory: compare one with its sheet before you rely on it. `half` is bfloat16, or float16 where there is none.
    `compute_units` run a tile of a matrix product each (streaming multiprocessors).
    Link rates are of one device, in one direction: to the other device of its package, to others of its node, and to
    other nodes. `efficiency` names the class of devices whose measured efficiency applies.
    """

    name: str
    memory_mib: int
    bf16_flops_per_second: float
    float32_flops_per_second: float
    float8_flops_per_second: float | None
    memory_bytes_per_second: float
    compute_units: int
    devices_per_package: int
    package_bytes_per_second: float | None
    devices_per_node: int
    node_bytes_per_second: float
    network_bytes_per_second: float
    efficiency: str
    source: str

    @property
    def memory_bytes(self) -> int:
        """Usable memory in bytes."""
        return self.memory_mib * 2**20


@cache
def all_devices() -> dict[str, Device]:
    """Every kind of device, by name."""
    table = json.loads(_DATA.read_text(encoding="utf-8"))
    return {name: Device(name=name, **row) for name, row in table.items()}


def find_device(name: str) -> Device:
    """The device with this name, in any case.

    Raises:
        AcceleratorError: there is no such device.
    """
    for known, device in all_devices().items():
        if known.lower() == name.strip().lower():
            return device
    raise AcceleratorError(f"no device {name!r}: the ones that are known are {', '.join(all_devices())}")
