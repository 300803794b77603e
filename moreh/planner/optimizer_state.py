"""The optimizer state values per weight, by optimizer name.

This module imports no torch. `moreh.runtime.engine.optimizer_in_use` finds the optimizer that a script has made.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class OptimizerState:
    """The state of an optimizer. Counts of steps, and means of rows and columns, are too small to count."""

    name: str
    """The optimizer's name."""
    values: float
    """Numbers kept for each trained weight."""
    matrix_values: float | None = None
    """Numbers kept for each weight of the layers' matrices, where that differs (Muon)."""
    orthogonalizing_steps: int = 0
    """Steps of the Newton-Schulz iteration on each matrix of the layers, which every device computes whole (Muon)."""
    gathers_matrices: bool = False
    """True if an update needs whole matrices, so that the devices that share one gather it."""
    value_bytes: int | None = None
    """Size of one of the numbers; None: as the software has it, which is that of a weight."""
    works_on_shards: bool = True
    """True if the runtime lets it update matrices that devices share. Plans for others keep every matrix whole."""


ADAMW = OptimizerState("adamw", 2)
FLOAT32_BYTES = 4
_MUON_STEPS = 5
_KNOWN = (
    ADAMW,
    OptimizerState("adam", 2),
    OptimizerState("nadam", 2),
    OptimizerState("radam", 2),
    OptimizerState("adamax", 2),
    OptimizerState("adafactor", 0, works_on_shards=False),
    OptimizerState("muon", 2, 1, _MUON_STEPS, gathers_matrices=True),
    OptimizerState("sgd", 0),
    OptimizerState("rmsprop", 1),
    OptimizerState("adagrad", 1),
    OptimizerState("adadelta", 2),
)
# By name, with torch's default settings.
OPTIMIZER_STATES = {state.name: state for state in _KNOWN}


def optimizer_state(name: str, settings: Mapping[str, Any]) -> OptimizerState:
    """The state of an optimizer with its own settings."""
    known = OPTIMIZER_STATES[name]
    values = known.values
    if name in ("adamw", "adam"):
        values += bool(settings.get("amsgrad"))
    elif name in ("sgd", "rmsprop"):
        values += bool(settings.get("momentum")) + bool(settings.get("centered"))
    steps = settings.get("ns_steps", _MUON_STEPS) if known.orthogonalizing_steps else 0
    amsgrad = name == "muon" and bool(settings.get("adamw", {}).get("amsgrad"))
    return replace(known, values=values + amsgrad, orthogonalizing_steps=steps)


def state_bytes(values: float, optimizer: OptimizerState, moment_bytes: int, adamw_bytes: int) -> float:
    """Bytes of optimizer state for each trained weight.

    Args:
        values: numbers that the optimizer keeps for it.
        optimizer: of the training.
        moment_bytes: size of a number as the software has it.
        adamw_bytes: what AdamW's state takes there, with a master copy of the weight if there is one.
    """
    size = moment_bytes if optimizer.value_bytes is None else optimizer.value_bytes
    return adamw_bytes - ADAMW.values * moment_bytes + values * size
