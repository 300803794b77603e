"""The settings sections `checkpoint`, `stop` and `launch`."""

import re
from typing import Annotated

from pydantic import Field, StringConstraints

from utils.config.section import NonEmpty, NotNegative, PathText, Positive, Section

_UNITS = {"h": 3600, "m": 60, "s": 1}
# Such as 23h50m, 90m or 45s.
Duration = Annotated[str, StringConstraints(pattern=r"^(\d+h)?(\d+m)?(\d+s)?$", min_length=2)]


def seconds_of(duration: str) -> int:
    """The seconds of a duration.

    >>> seconds_of("23h50m"), seconds_of("45s")
    (85800, 45)
    """
    return sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+)([hms])", duration))


class CheckpointSection(Section):
    """Checkpoints, from which `--resume` continues a run."""

    every_steps: Positive | None = None
    """Steps between two checkpoints; null: no checkpoints by step."""
    every_minutes: Annotated[float, Field(gt=0)] | None = 20.0
    """Minutes between two checkpoints; null: no checkpoints by time. A run stopped by a signal always saves one."""
    keep_last: Positive = 2
    """The number of checkpoints to keep; older ones are deleted."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest held-out loss, among those saved at an evaluated step."""
    resume: PathText | None = None
    """The checkpoint to resume, as with `--resume`: `auto` (the run's last checkpoint, if any), or the directory of a
    checkpoint or of a run. A run's `config.yaml` omits this key, so that running the file again starts a new run."""
    resume_with: list[NonEmpty] | None = None
    """The settings that may differ from those of the checkpoint, such as `[train.lr]`; null: none.
    `--resume-with train.lr=1e-5` changes a setting and adds it to this list."""
    resume_force: bool = False
    """Resume even if the data, the tokenizer, the model or another setting differs from the checkpoint
    (`--resume-force`)."""


class StopSection(Section):
    """The time limits at which a run saves and ends before its last step."""

    grace_seconds: Annotated[float, Field(gt=0)] | None = None
    """Seconds that a run has for saving after a signal or `moreh-smi --reset`, and before a time limit; null: twice
    the duration of a step and a save, and at least 60."""
    before: Duration | None = None
    """The time limit of the run, such as `23h50m`: the run saves and ends before it, with exit code 75; null: no limit.
    In a Slurm job, the end time of the job is a limit too."""


class LaunchSection(Section):
    """Restarts of workers that die or hang."""

    max_restarts: NotNegative = 0
    """Number of times that the workers are restarted from the last intact checkpoint after one of them died or hung.
    A step that fails twice, or an error that the user has to fix, ends the run at once. The variable
    MOREH_MAX_RESTARTS overrides this key."""
    hang_seconds: Annotated[float, Field(gt=0)] | None = 600.0
    """Seconds without progress of any worker in a step after which the workers are ended; null: never. Planning,
    compiling, loading and saving may take six times as long. The variable MOREH_HANG_SECONDS overrides this key."""
