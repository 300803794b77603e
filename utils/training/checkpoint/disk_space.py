"""Checks the disk space for the files of a run."""

import shutil
from pathlib import Path
from typing import Any

from moreh.planner.optimizer_state import optimizer_state
from moreh.planner.units import gib
from utils.config.schema import Config
from utils.errors import UserError
from utils.training.checkpoint.files import checkpoints_in

# A save is tried unless the disk clearly lacks room: the bytes of a checkpoint are an estimate.
_CLEARLY = 0.9
# In GiB, less would be shown with one figure.
_LEAST_IN_GIB = 2**30 // 10


def bytes_of_checkpoint(model: Any, config: Config) -> int:
    """The bytes of a checkpoint of a run, with the optimizer's state."""
    state = optimizer_state(config.train.optimizer, config.train.optimizer_settings)
    one = bytes_of_run(model, 1, state.values, has_frozen=config.model.lora is None)
    return one - bytes_of_run(model, 0, state.values)


def lack_of_space(directory: Path, needed: int) -> str | None:
    """The reason why a checkpoint of so many bytes does not fit the disk of a directory; None if it may fit."""
    free = free_bytes(directory)
    if free >= _CLEARLY * needed:
        return None
    return f"a checkpoint takes {_text(needed)}, and the disk has {_text(free)} free"


def free_bytes(directory: Path) -> int:
    """The bytes that are free on the disk of a directory, which need not exist yet."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
    return shutil.disk_usage(existing).free


def bytes_of_run(model: Any, checkpoints: int, state_values: float, *, has_frozen: bool = True) -> int:
    """The bytes that a run writes: the model in the end, and checkpoints with the optimizer's state.

    The optimizer keeps `state_values` numbers for each trained parameter, in the parameter's type. Checkpoints have the
    frozen parameters as well if `has_frozen` says so.
    """
    parameters = list(model.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    trained = sum(parameter.numel() * parameter.element_size() for parameter in parameters if parameter.requires_grad)
    return int(weights + checkpoints * ((weights if has_frozen else trained) + state_values * trained))


def require_disk_space(directory: Path, model: Any, config: Config) -> None:
    """Check that there is room for the model, for the checkpoints that are kept, and for the one being written.

    Raises:
        UserError: there is less.
    """
    settings = config.checkpoint
    state = optimizer_state(config.train.optimizer, config.train.optimizer_settings)
    present = len(checkpoints_in(directory))
    is_regular = settings.every_steps is not None or settings.every_minutes is not None
    kept = settings.keep_last + settings.keep_best if is_regular else 0
    has_frozen = config.model.lora is None
    needed = bytes_of_run(model, max(0, kept + 1 - present), state.values, has_frozen=has_frozen)
    free = free_bytes(directory)
    if needed > free:
        raise UserError(
            f"run.directory: the run writes up to {_text(needed)} to {directory.parent}, whose disk has {_text(free)} "
            f"free: choose another directory, or lower checkpoint.keep_last={settings.keep_last}"
        )


def _text(size: int) -> str:
    """So many bytes."""
    return gib(size) if size >= _LEAST_IN_GIB else f"{size / 2**20:.1f} MiB"
