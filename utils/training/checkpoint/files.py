"""Finds, renames and deletes the checkpoints of a run."""

import contextlib
import math
import re
import shutil
from pathlib import Path

from moreh.errors import CheckpointError
from moreh.runtime.checkpoint.manifest import MANIFEST, read_manifest
from utils.errors import UserError

# Names of checkpoints: step-<number of steps done>. Others, such as step-20.abandoned-1, are never resumed or removed.
_NAME = re.compile(r"step-(\d+)")
# What a process that was killed while it saved has left.
_UNFINISHED = ".step-*-unfinished"


def step_of(checkpoint: Path) -> int:
    """The steps that a checkpoint has done, by its name; -1 where the name does not say.

    >>> step_of(Path("runs/gpt/checkpoints/step-120")), step_of(Path("runs/gpt"))
    (120, -1)
    """
    match = _NAME.fullmatch(checkpoint.name)
    return -1 if match is None else int(match[1])


def checkpoints_in(directory: Path) -> list[Path]:
    """The checkpoints in a directory that belong to its line of training, the earliest first."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if step_of(path) >= 0), key=step_of)


def checkpoints_to_resume(resume: str | None, run_directory: Path, restarted_since: float | None) -> list[Path]:
    """The checkpoints that `--resume` means, the first choice first: none, those of the run ("auto"), or a directory's.

    A restarted run continues from its own checkpoints, once it has written one. `restarted_since` is when it
    was started first, in seconds since the epoch; None where it is started for the first time.

    Raises:
        UserError: there is no such checkpoint.
    """
    own = checkpoints_in(run_directory / "checkpoints")
    if restarted_since is not None and any(_written(checkpoint) >= restarted_since for checkpoint in own):
        resume = "auto"
    if resume is None:
        return []
    if resume == "auto":
        return own[::-1]
    directory = Path(resume)
    checkpoints = checkpoints_in(directory / "checkpoints") or checkpoints_in(directory)
    if checkpoints:
        return checkpoints[::-1]
    if directory.is_dir() and directory.name.startswith("step-"):  # also one that was set aside
        return [directory]
    raise UserError(
        f"--resume {resume} (checkpoint.resume): there is no checkpoint; give auto, the directory of a run, or one "
        "of its checkpoints/step-<number>"
    )


def _written(checkpoint: Path) -> float:
    """The time at which a checkpoint was complete, in seconds since the epoch; 0 if it is not."""
    with contextlib.suppress(OSError):
        return (checkpoint / MANIFEST).stat().st_mtime
    return 0.0


def set_aside(checkpoint: Path, reason: str) -> Path:
    """Rename a checkpoint so that it is neither resumed by "auto" nor removed; returns its new path."""
    number = 1
    while (aside := checkpoint.with_name(f"{checkpoint.name}.{reason}-{number}")).exists():
        number += 1
    return checkpoint.rename(aside)


def prune(directory: Path, keep_last: int, *, keep_best: bool) -> None:
    """Remove the checkpoints of a line of training but the last ones and, if asked for, the best one."""
    checkpoints = checkpoints_in(directory)
    older = checkpoints[:-keep_last]
    if older and keep_best:
        losses = {checkpoint: _eval_loss(checkpoint) for checkpoint in checkpoints}
        best = min(checkpoints, key=lambda checkpoint: losses[checkpoint])
        older = [checkpoint for checkpoint in older if checkpoint != best or losses[best] == math.inf]
    for checkpoint in older:
        shutil.rmtree(checkpoint, ignore_errors=True)


def remove_unfinished(directory: Path) -> None:
    """Remove the files of processes that were killed while they saved."""
    for leftover in directory.glob(_UNFINISHED):
        shutil.rmtree(leftover, ignore_errors=True)


def _eval_loss(checkpoint: Path) -> float:
    """The held-out loss after the step of a checkpoint; infinite where there was no evaluation."""
    with contextlib.suppress(CheckpointError, TypeError, ValueError):
        loss = read_manifest(checkpoint).about.get("script", {}).get("eval_loss")
        return math.inf if loss is None else float(loss)
    return math.inf
