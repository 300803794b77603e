"""The sections of the settings that keep what a run has done: `checkpoint`, `stop` and `launch`."""

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
    """Checkpoints of the training, from which `--resume` continues."""

    every_steps: Positive | None = None
    """Save a checkpoint every so many steps; null: not by steps."""
    every_minutes: Annotated[float, Field(gt=0)] | None = 20.0
    """Save a checkpoint once so many minutes have passed since the last one; null: not by time. A run that is stopped
    by a signal saves one in any case."""
    keep_last: Positive = 2
    """The number of checkpoints to keep; older ones are removed."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest held-out loss as well, of those after whose step there was an evaluation."""
    resume: PathText | None = None
    """What `--resume` resumes: `auto` (the last checkpoint of the run, if any), or the directory of one or of a run.
    The `config.yaml` of a run does not have it, so running that file again starts anew."""
    resume_with: list[NonEmpty] | None = None
    """The settings that may differ from the checkpoint's, such as `[train.lr]`; null: none of them.
    `--resume-with train.lr=1e-5` sets one, and names it here."""
    resume_force: bool = False
    """Go on although the data, the tokenizer, the model or another setting is not that of the checkpoint
    (`--resume-force`)."""


class StopSection(Section):
    """When a run saves and ends before its last step."""

    grace_seconds: Annotated[float, Field(gt=0)] | None = None
    """The time that a run gets to save after a signal, from `moreh-smi --reset`, and before a time limit; null: twice
    the time of a step and a save, and at least 60."""
    before: Duration | None = None
    """Save and end before the run has taken so long, such as `23h50m`, with exit code 75; null: no limit.
    A job of Slurm has the end time of the job as a limit as well."""


class LaunchSection(Section):
    """What is done about workers that die or hang."""

    max_restarts: NotNegative = 0
    """How often the workers are started again, from the last good checkpoint, after one of them has died or hung.
    A step that fails twice, and an error that the user has to correct, end the run at once. The variable
    MOREH_MAX_RESTARTS overrides it."""
    hang_seconds: Annotated[float, Field(gt=0)] | None = 600.0
    """End the workers when none of them has made progress for so long in a step, and six times as long while they
    plan, compile, load or save; null: never. The variable MOREH_HANG_SECONDS overrides it."""
