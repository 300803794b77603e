"""Finds the optimizer that a script has made for a model: the planner counts its state."""

from dataclasses import replace

import torch
from torch import nn

from moreh.patches.optimizer_creation import existing_optimizers
from moreh.planner.optimizer_state import ADAMW, OptimizerState, optimizer_state

# By torch's class, with the settings in its groups. A subclass counts as the class.
_NAMES = {
    getattr(torch.optim, class_name): class_name.lower()
    for class_name in (
        "AdamW",
        "Adam",
        "NAdam",
        "RAdam",
        "Adamax",
        "Adafactor",
        "Muon",
        "SGD",
        "RMSprop",
        "Adagrad",
        "Adadelta",
    )
}


def optimizer_in_use(model: nn.Module) -> OptimizerState:
    """The state of the optimizer of a model's parameters; AdamW's if there is none yet, or one of another class.

    Where several share the parameters, it is Muon's if Muon is one of them, else that of the one with the most values.
    """
    own = {id(parameter) for parameter in model.parameters()}
    found: list[OptimizerState] = []
    for optimizer in existing_optimizers():
        group = next((group for group in optimizer.param_groups if own & set(map(id, group["params"]))), None)
        name = next((_NAMES[kind] for kind in type(optimizer).__mro__ if kind in _NAMES), None)
        if group is not None and name is not None:
            dtype: torch.dtype | None = getattr(optimizer, "state_dtype", None)  # if it is not that of the weights
            state = optimizer_state(name, group)
            found.append(state if dtype is None else replace(state, value_bytes=dtype.itemsize))
        elif group is not None and not _is_wrapper(optimizer):
            found.append(ADAMW)
    muon = next((state for state in found if state.name == "muon"), None)
    return muon or max(found, key=lambda state: state.values, default=ADAMW)


def _is_wrapper(optimizer: torch.optim.Optimizer) -> bool:
    """True if an optimizer's groups are those of others, which count themselves."""
    groups = {id(group) for group in optimizer.param_groups}
    others = (other for other in existing_optimizers() if other is not optimizer)
    return any(id(group) in groups for other in others for group in other.param_groups)
