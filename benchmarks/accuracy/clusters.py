"""The devices of a published run, and the network between its nodes as far as that is known."""

import csv
import math
import re
from pathlib import Path

from published_programs import RunRow, Unusable, cell

from moreh.accelerator.devices import Device, all_devices, find_device

_NETWORKS = Path(__file__).parent.parent / "data" / "networks.csv"
# What a row says itself, such as "400 Gbit/s a node" or "4x200 Gb/s HDR per node". GB/s would be bytes.
_STATED = re.compile(
    r"(?:(\d+) ?[x\u00d7*] ?)?(\d+(?:\.\d+)?) ?([GgTt])(?:bits?/s|bps|b/s|bE|be)\b,?(?: (?:HDR|NDR|EDR|EFA|IB"
    r"|InfiniBand|RoCE|Ethernet|NICs?|ports?|network))* ?(?:per|a|each|/) ?(node|server|host|gpu|GPU|device)"
)
# Patterns in the order in which they are tried.
_DEVICES = (
    (r"mi250x", "MI250X GCD"),
    (r"mi250", "MI250 GCD"),
    (r"mi210", "MI210"),
    (r"mi300x", "MI300X"),
    (r"mi325x", "MI325X"),
    (r"mi350x", "MI350X"),
    (r"mi355x", "MI355X"),
    (r"a800", "A800 80GB"),
    (r"h800", "H800"),
    (r"h20-?3e|h20(?!0).*141", "H20 141GB"),
    (r"h20(?!0)", "H20"),
    (r"gh200.*144", "GH200 144GB"),
    (r"gh200", "GH200 96GB"),
    (r"gb300", "GB300"),
    (r"gb200", "GB200"),
    (r"b300", "B300"),
    (r"a100.*40", "A100 40GB"),
    (r"a100", "A100 80GB"),
    (r"h100.*96", "H100 96GB"),
    (r"h100", "H100 80GB"),
    (r"h200", "H200"),
    (r"b200", "B200"),
    (r"v100.*32", "V100 32GB"),
    (r"v100", "V100 16GB"),
)


def device_of(row: RunRow) -> tuple[Device, int]:
    """The kind of device, and how many devices a unit of the row holds."""
    name = cell(row, "gpu").lower()
    for pattern, device in _DEVICES:
        if re.search(pattern, name):
            return find_device(device), 2 if "package" in name else 1
    # Other devices that are known: the longest name that the cell contains.
    names = [known for known in all_devices() if re.search(rf"\b{re.escape(known.lower())}\b", name)]
    if names:
        return find_device(max(names, key=len)), 1
    raise Unusable(f"no data of device {cell(row, 'gpu')!r}")


def network_bytes_per_second(row: RunRow, device: Device) -> float | None:
    """Bytes/s of a device to other nodes, for the system that was measured; None if that is unknown.

    A network that the row states for a node is shared by the node's devices.
    """
    with _NETWORKS.open(encoding="utf-8", newline="") as file:
        for entry in csv.DictReader(file):
            if entry["group"] == cell(row, "group") and entry["gpu"] in ("", cell(row, "gpu")):
                return float(entry["network_gbit_per_s_per_device"]) * 1e9 / 8
    stated = _STATED.search(" ".join(cell(row, column) for column in ("gpu", "notes", "network")))
    rate = float(stated[2]) * int(stated[1] or 1) if stated else 0.0
    if stated is None or not 0 < rate < math.inf:
        return None
    sharers = 1 if stated[4].lower() in ("gpu", "device") else device.devices_per_node
    return rate * (1e12 if stated[3] in "Tt" else 1e9) / 8 / sharers
