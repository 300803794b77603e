"""How much of a device's peak is reached: the constants of the time model, one set for each class of devices."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moreh.errors import PlanError

_DATA = Path(__file__).parent / "data" / "efficiency.json"
# With fewer published runs than this, the worst one counts.
MIN_RUNS_FOR_QUANTILE = 10


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
    """The published runs that the constants were fitted to, by what they say (`row_digest` in benchmarks/published_runs.py)."""
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


@dataclass(frozen=True)
class Uncertainty:
    """How far predicted step times were off for a class of devices, in published runs that were not used to fit its constants.

    `runs` is their number, `error` a relative error (a fraction): the one that 4 of 5 runs stay below, or the worst one where
    there are few runs. `lowest` and `highest` are the extreme errors, below 0 where the prediction was too fast. A class
    without runs has those of all runs together, predicted with the constants that such a class is given.
    """

    runs: int
    error: float
    lowest: float
    highest: float

    @property
    def text(self) -> str:
        """Continues "Step times came out ..."."""
        extremes = f"from {abs(self.lowest):.0%} too fast to {max(0.0, self.highest):.0%} too slow"
        if self.runs == 0:
            return f"within {self.error:.0%} for 4 of 5 published runs on other devices; there is none on these"
        if self.runs < MIN_RUNS_FOR_QUANTILE:
            return f"{extremes} in {self.runs} published run{'s' if self.runs > 1 else ''} on such devices"
        return f"within {self.error:.0%} for 4 of 5 of {self.runs} published runs on such devices ({extremes})"


def uncertainty(class_name: str) -> Uncertainty:
    """How far predictions for a class of devices can be trusted.

    Raises:
        PlanError: there is no such class.
    """
    find_efficiency(class_name)
    return Uncertainty(**_table()["errors"][class_name])
