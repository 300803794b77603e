"""The kind of memory of a published figure: that of live tensors, of the allocator, or of the driver."""

import re
from typing import Literal

from published_programs import RunRow, cell

from moreh.planner.cost.memory.driver_memory import driver_memory
from moreh.planner.cost.memory.memory_parts import PeakMemory
from moreh.planner.plan.plan import Plan

# "states" are weights, gradients and optimizer state: what is allocated between two steps.
MemoryKind = Literal["allocated", "reserved", "driver", "states"]
_KINDS: tuple[tuple[str, MemoryKind], ...] = (
    (r"-smi\b|nvml|driver", "driver"),
    (r"reserved", "reserved"),
    (r"\bmem(ory)?[-_ ]allocated", "states"),
    (r"allocated", "allocated"),
)


def memory_kind(row: RunRow) -> MemoryKind:
    """The kind of memory of a row, by the words beside it. torchtitan logs reserved memory."""
    text = cell(row, "mem_as_published").lower()
    kind = next((kind for pattern, kind in _KINDS if re.search(pattern, text)), None)
    return kind or ("reserved" if "torchtitan" in cell(row, "framework") else "allocated")


def memory_of_kind(kind: MemoryKind, plan: Plan, needed: PeakMemory) -> float:
    """Predicted bytes of the fullest device of a plan, of which `needed` is the memory."""
    if kind == "states":
        return float((needed.parameters + needed.gradients + needed.optimizer).max())
    figures = driver_memory(plan, float(needed.total.max()))
    return {"allocated": figures.allocated, "reserved": figures.reserved, "driver": figures.in_use}[kind]
