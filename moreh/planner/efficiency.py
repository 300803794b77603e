"""How much of a device's peak is reached: the constants of the time model, one set for each class of devices."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moreh.errors import PlanError

_DATA = Path(__file__).parent / "data" / "efficiency.json"


@dataclass(frozen=True)
class Efficiency:
    """The constants of one class of devices.

    Fractions of a peak (0 to 1): `matmul` of large matrix products, `float8` the same in float8, `attention` of fused
    attention kernels, `memory` of memory bandwidth, `node` and `network` of the links inside a node and between nodes.
    `matmul_depth` is the inner dimension at which a matrix product reaches half its rate; `matmul_waves` the number of
    rounds of tiles that a product loses to its last, incomplete one.
    Seconds: `kernel_s` from one kernel to the next, `node_hop_s` and `network_hop_s` for each step of a ring.
    `skew` is the share of computation that tensor-parallel ranks lose by waiting for the slowest of them at every exchange.
    `partial_node`: the rate inside a node falls with this power of the share of the node's devices that a group has: 1 where
    each pair of devices has a link of its own, 0 where all links lead to a switch and are filled by any group.
    `contention` is how much of the shorter one of two overlapping activities adds to the longer one (0 to 1).
    """

    matmul: float
    float8: float
    matmul_depth: float
    matmul_waves: float
    attention: float
    memory: float
    kernel_s: float
    node: float
    network: float
    node_hop_s: float
    network_hop_s: float
    contention: float
    skew: float
    partial_node: float


@cache
def _table() -> Any:
    return json.loads(_DATA.read_text(encoding="utf-8"))


def all_efficiencies() -> dict[str, Efficiency]:
    """The constants of every class of devices, by name."""
    return {name: Efficiency(**row) for name, row in _table()["constants"].items()}


def fitted_rows() -> frozenset[str]:
    """The ids of the published runs that the constants were fitted to."""
    return frozenset(_table()["fitted_rows"])


def find_efficiency(name: str) -> Efficiency:
    """The constants of a class of devices.

    Raises:
        PlanError: there is no such class.
    """
    table = all_efficiencies()
    if name not in table:
        raise PlanError(f"no efficiency constants for {name!r}: there are some for {', '.join(table)}")
    return table[name]


def uncertainty(class_name: str) -> tuple[float, int]:
    """How far step times are off for a class of devices, and on how many published runs that is known.

    The first is the relative error (a fraction) that 4 of 5 runs stay below, of those that were not used to fit the constants.
    For a class without any run, it is that of all runs when they are predicted with the constants of such a class.

    Raises:
        PlanError: there is no such class.
    """
    find_efficiency(class_name)
    row = _table()["errors"][class_name]
    return float(row["error"]), int(row["runs"])
