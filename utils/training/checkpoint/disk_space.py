"""Whether the disk has room for the files of a run, asked before the first step."""

import shutil
from pathlib import Path
from typing import Any

from moreh.planner.units import gib
from utils.config.schema import CheckpointSection
from utils.errors import UserError
from utils.training.checkpoint.files import checkpoints_in

# AdamW keeps two numbers for each parameter that it trains, in the parameter's type.
_STATES_PER_PARAMETER = 2


def bytes_of_run(model: Any, checkpoints: int) -> int:
    """The bytes that a run writes: the model in the end, and checkpoints with the optimizer's state."""
    parameters = list(model.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    trained = sum(parameter.numel() * parameter.element_size() for parameter in parameters if parameter.requires_grad)
    return int(weights + checkpoints * (weights + _STATES_PER_PARAMETER * trained))


def require_disk_space(directory: Path, model: Any, settings: CheckpointSection) -> None:
    """Check that there is room for the model, for the checkpoints that are kept, and for the one being written.

    Raises:
        UserError: there is less.
    """
    present = len(checkpoints_in(directory))
    is_regular = settings.every_steps is not None or settings.every_minutes is not None
    needed = bytes_of_run(model, max(0, (settings.keep_last + settings.keep_best if is_regular else 0) + 1 - present))
    existing = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"run.directory: the run writes up to {gib(needed)} to {directory.parent}, whose disk has {gib(free)} "
            f"free: choose another directory, or lower checkpoint.keep_last={settings.keep_last}"
        )
