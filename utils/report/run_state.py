"""run.json, the data of the report besides metrics and settings."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from moreh.accelerator.job_status import ChosenPlan
from moreh.atomic_io import replacing_file

FILE = "run.json"
RUNNING, FINISHED, STOPPED, FAILED, KILLED = "running", "finished", "stopped", "failed", "killed"
MAX_NUMBER = 2**63
"""Numbers of a run are smaller: seconds, steps, bytes."""


@dataclass(frozen=True)
class Sample:
    """The model's sample in an evaluation."""

    step: int
    """The steps that were done."""
    text: str
    """The prompt and the model's text, as in the log."""


@dataclass(frozen=True)
class RunState:
    """Metadata of a run."""

    started: float
    """The time at which its process started or resumed the run, in seconds since the epoch."""
    ended: float | None = None
    """The end of the run, in seconds since the epoch; None while it is running."""
    status: str = RUNNING
    """One of running, finished, stopped, failed and killed."""
    detail: str = ""
    """The reason of the end: a signal, or the first line of an error."""
    command: str = ""
    """The command line."""
    first_step: int = 0
    """The steps that were done when its process started."""
    total_steps: int | None = None
    """The steps of the whole run; None before they are known."""
    batches_per_step: int = 1
    """Forward passes of a step."""
    is_simulated: bool = False
    """True if `memory_bytes` of the metrics is of devices that the machine does not have."""
    plans: list[dict[str, Any]] = field(default_factory=list)
    """The chosen plans, with the fields of `moreh.accelerator.job_status.ChosenPlan`."""
    samples: list[Sample] = field(default_factory=list)
    """The first sample and the last one."""
    environment: dict[str, str] = field(default_factory=dict)
    """The hardware and software of the run, by name."""
    tracker_runs: dict[str, str] = field(default_factory=dict)
    """The id of the run in each tracker, with which a resumed run continues there."""

    def with_sample(self, sample: Sample) -> "RunState":
        """The state with a further sample; the first and the last one are kept."""
        return replace(self, samples=[*self.samples[:1], sample])


# The file is checked, since a person or another program may have changed it.
_STATE, _SAMPLES = TypeAdapter(RunState), TypeAdapter(list[Sample])


def read_state(directory: Path) -> RunState | None:
    """The state of the run in a directory; None if it has left none, or one that cannot be read."""
    try:
        content = json.loads((directory / FILE).read_text(encoding="utf-8"))
        if not _has_figures_of_a_run(content):
            return None
        samples = _SAMPLES.validate_python(content.pop("samples"))
        for plan in content.get("plans", []):
            TypeAdapter(ChosenPlan).validate_python(plan)
        return replace(_STATE.validate_python({**content, "samples": []}), samples=samples)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _has_figures_of_a_run(content: Any) -> bool:
    """False if JSON has a number that no run writes: an infinite one, NaN, or one that overflows a sum of times."""
    if isinstance(content, (dict, list)):
        return all(map(_has_figures_of_a_run, content.values() if isinstance(content, dict) else content))
    return not isinstance(content, (int, float)) or abs(content) < MAX_NUMBER


def write_state(directory: Path, state: RunState) -> None:
    """Write the state of a run.

    Raises:
        OSError: the file cannot be written.
    """
    write_text(directory / FILE, json.dumps(asdict(state), indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file of a run, so that a reader sees the old content or the new one.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing_file(path, durable=False) as file:
        file.write(text)


def is_being_written(directory: Path) -> bool:
    """True if a run is writing to a directory: a run holds a lock beside it until it ends, however it ends."""
    lock = directory.with_name(f".{directory.name}.lock")
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except (Timeout, OSError):
        return True
