"""The constants of the cost model, one set for each class of devices.

benchmarks/fit_planner.py fits them to published measurements and writes data/efficiency.json.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from moreh.accelerator.devices import Device
from moreh.errors import PlanError
from moreh.planner.plan.arrays import FloatArray

_DATA = Path(__file__).parent / "data" / "efficiency.json"
# With fewer published runs than this, a quantile says nothing: the worst run counts.
MIN_RUNS_FOR_QUANTILE = 10


@dataclass(frozen=True)
class Efficiency:
    """The constants of one class of devices. Fractions are from 0 to 1."""

    matmul: float
    """Fraction of the FLOP/s peak that large matmuls reach."""
    float8: float
    """Fraction of the float8 peak that large matmuls in float8 reach."""
    matmul_depth: float
    """The inner dimension at which a matmul reaches half of its rate."""
    matmul_waves: float
    """Rounds of tiles that a matmul loses to its last, incomplete round."""
    attention: float
    """Fraction of the FLOP/s peak that fused attention kernels reach."""
    memory: float
    """Fraction of the peak memory bandwidth."""
    kernel_s: float
    """Seconds from one kernel to the next."""
    node: float
    """Fraction of the peak rate of links inside a node."""
    network: float
    """Fraction of the peak rate of links between nodes."""
    node_hop_s: float
    """Seconds of latency for each step of a ring inside a node."""
    network_hop_s: float
    """Seconds of latency for each step of a ring over several nodes."""
    contention: float
    """Share of the shorter of two overlapping activities that adds to the longer one (0 to 1)."""
    skew: float
    """The share of computation that tensor-parallel ranks lose by waiting for the slowest of them at every exchange."""
    partial_node: float
    """The rate inside a node falls with this power of the share of the node's devices that are in a group: 1 where each
    pair of devices has a link of its own, 0 where all links lead to a switch and any group can fill them. A fraction:
    no group has less than the links to its own members."""
    elementwise: float = 1.0
    """Memory traffic of norms, activations and residuals, as a multiple of the software profile's."""
    layer_host_s: float = 0.0
    """Seconds in which the host launches one layer's forward pass, or its backward pass. Small layers take as long."""
    step_host_s: float = 0.0
    """Seconds of a step outside of all micro-batches: data, the optimizer's launches, logging."""
    slowdown: float = 1.0
    """Seconds of a step for each second that the other constants account for."""


@cache
def _table() -> Any:
    return json.loads(_DATA.read_text(encoding="utf-8"))


def all_efficiencies() -> dict[str, Efficiency]:
    """The constants of every class of devices, by name."""
    return {name: Efficiency(**constants) for name, constants in _table()["constants"].items()}


def fitted_rows() -> frozenset[str]:
    """Digests of the published runs that were used for fitting (`row_digest` in benchmarks/published_runs.py)."""
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


def class_covariance(name: str) -> FloatArray:
    """Covariance of the unconstrained constants of a class, for a program without measured steps.

    [constants, constants], in the order of the fields of `Efficiency`; for unconstrained constants see
    `efficiency_distribution.to_unconstrained`.

    Raises:
        PlanError: there is no such class.
    """
    find_efficiency(name)
    return np.array(_table()["covariances"][name], dtype=np.float64)


def residual_std() -> float:
    """Standard deviation of the logarithm of a measured step time, if all constants are known."""
    return float(_table()["noise"])


@dataclass(frozen=True)
class MemorySpread:
    """The logarithm of measured over predicted memory, in published runs."""

    mean: float
    programs: float
    """Standard deviation between programs."""
    rows: float
    """Standard deviation between the runs of a program."""


def memory_spread() -> MemorySpread:
    """The spread of measured over predicted memory, for a program without measured steps."""
    return MemorySpread(**_table()["memory"])


@dataclass(frozen=True)
class Uncertainty:
    """Errors of predicted step times for a class of devices, in published runs of programs that were left out.

    Errors are relative (fractions). A class without runs has the errors of all runs together.
    """

    runs: int
    """Number of published runs."""
    error: float
    """The absolute error that 4 of 5 runs stay below, or the worst one of fewer than MIN_RUNS_FOR_QUANTILE runs."""
    lowest: float
    """The lowest error, below 0 if a prediction was too fast."""
    highest: float
    """The highest error, above 0 if a prediction was too slow."""

    @property
    def text(self) -> str:
        """The end of a sentence that begins with "Predicted step times are"."""
        return self.text_for("such devices")

    def text_for(self, devices: str) -> str:
        """`text` with a name for the devices that the runs were on."""
        extremes = f"{abs(self.lowest):.0%} too fast to {max(0.0, self.highest):.0%} too slow"
        if self.runs == 0:
            return f"within {self.error:.0%} for 80% of the published runs on other devices; there is none on these"
        if self.runs < MIN_RUNS_FOR_QUANTILE:
            return f"{extremes} for {self.runs} published run{'s' if self.runs > 1 else ''} on {devices}"
        return f"within {self.error:.0%} for 80% of {self.runs} published runs on {devices} ({extremes})"


def uncertainty(class_name: str) -> Uncertainty:
    """The errors of predictions for a class of devices.

    Raises:
        PlanError: there is no such class.
    """
    find_efficiency(class_name)
    return Uncertainty(**_table()["errors"][class_name])


def errors_text(device: Device) -> str:
    """Errors of predicted step times on a device: the end of a sentence that begins "Predicted step times are"."""
    known = uncertainty(device.efficiency_class)
    if not device.efficiency_assumed or known.runs == 0:
        return known.text
    return f"{known.text_for(device.efficiency_class)}; there is none on {device.name}"
