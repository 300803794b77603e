"""The content of the registry file: accelerators and jobs, and its JSON parser.

`registry.py` reads the file, and changes it.
"""

import secrets
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from moreh.accelerator.flavors import Flavor, default_flavor, find_flavor
from moreh.accelerator.this_machine import find_model, this_machine
from moreh.console.printable import in_one_line
from moreh.errors import AcceleratorError, RegistryError

# A process's start time is derived from the boot time, which moves by fractions of a second when the clock is set.
START_TIME_TOLERANCE_SECONDS = 1.0


@dataclass(frozen=True)
class Accelerator:
    """One accelerator of this environment."""

    index: int
    """The accelerator's number in the tools, from 0."""
    model: str
    """The name of its flavor; the default one where none was chosen."""
    token: str
    """A random id, as on the platform."""
    chosen: bool = False
    """True if the user chose the flavor. Otherwise the GPUs of this machine take its place, if torch sees any."""

    @cached_property
    def flavor(self) -> Flavor:
        """The devices: the GPUs of this machine, or those of the flavor that `model` names."""
        machine = None if self.chosen else this_machine()
        return find_flavor(self.model) if machine is None else machine

    def with_model(self, selection: str) -> "Accelerator":
        """The same accelerator with the model of that name or number. Without a choice, it is this machine.

        Raises:
            AcceleratorError: there is no such model.
        """
        flavor = find_model(selection)
        if flavor.simulated:
            return replace(self, model=flavor.name, chosen=True)
        return replace(self, model=default_flavor().name, chosen=False)


@dataclass(frozen=True)
class Job:
    """A process that uses an accelerator."""

    id: int
    """Counts up from 1 in this environment."""
    accelerator: int
    """The index of the accelerator."""
    pid: int
    """The process id."""
    process_start_time: float
    """The start of the process, in seconds since the epoch."""
    command: str
    """The command line."""
    run: str = ""
    """The id of all processes that torchrun starts together, of which the first is the job; empty otherwise."""

    @property
    def shown(self) -> str:
        """The job for messages, without control characters, its command shortened."""
        return f"job {self.id} (process {self.pid}: {in_one_line(self.command)})"

    def is_running(self) -> bool:
        """True if the process that registered this job is still running (a zombie is not)."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.process_start_time) < START_TIME_TOLERANCE_SECONDS
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


@dataclass(frozen=True)
class Registry:
    """The whole content of the registry file."""

    current: int
    """The index of the current accelerator: the one that the next process will use."""
    next_job_id: int
    """The id of the next job."""
    accelerators: tuple[Accelerator, ...]
    """The accelerators, by index."""
    jobs: tuple[Job, ...] = field(default=())
    """The jobs in the order of their start; `read_registry` leaves out those that have ended."""

    def accelerator(self, index: int) -> Accelerator:
        """The accelerator with this index.

        Raises:
            AcceleratorError: there is no accelerator with this index.
        """
        for accelerator in self.accelerators:
            if accelerator.index == index:
                return accelerator
        known = ", ".join(str(a.index) for a in self.accelerators)
        raise AcceleratorError(f"no accelerator {index}: there are {known}. 'moreh-smi device --list' shows them")

    def job_on(self, index: int) -> Job | None:
        """The running job of an accelerator, if there is one."""
        return next((job for job in self.jobs if job.accelerator == index), None)


def parse_registry(content: Any, path: Path) -> Registry:
    """The registry in the JSON of a file; None means no file, which is a registry of one accelerator.

    Raises:
        RegistryError: the content is damaged.
    """
    if content is None:
        first = Accelerator(index=0, model=default_flavor().name, token=new_token())
        return Registry(current=0, next_job_id=1, accelerators=(first,))
    try:
        registry = Registry(
            current=content["current"],
            next_job_id=content["next_job_id"],
            accelerators=tuple(_parse_accelerator(row) for row in content["accelerators"]),
            jobs=tuple(Job(**row) for row in content["jobs"]),
        )
        _check_types(registry)
        registry.accelerator(registry.current)
    except (KeyError, TypeError, AcceleratorError) as error:
        raise RegistryError(f"{path} is damaged ({error}): delete it to start with one new accelerator") from None
    return registry


def new_token() -> str:
    """The token of a new accelerator."""
    return secrets.token_hex(16)


def _parse_accelerator(row: Any) -> Accelerator:
    """An accelerator from its row. A row of an earlier release has no `chosen`: its default flavor was no choice."""
    return Accelerator(**{"chosen": row["model"] != default_flavor().name, **row})


def _check_types(registry: Registry) -> None:
    """Check for mistakes in a file that was edited by hand.

    Raises:
        TypeError: a value has another type than the tools write, or a process id is below 1.
        AcceleratorError: an accelerator's model is unknown.
    """
    for row in (registry, *registry.accelerators, *registry.jobs):
        for name, kind in row.__annotations__.items():
            value = getattr(row, name)
            allowed = {int: int, float: (int, float), str: str, bool: bool}.get(kind)
            if allowed is None:
                continue
            if not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool):  # type: ignore[arg-type]
                raise TypeError(f"{name} is {value!r}")
    for job in registry.jobs:
        if job.pid < 1:
            raise TypeError(f"pid is {job.pid}")
    indices = [accelerator.index for accelerator in registry.accelerators]
    if len(set(indices)) < len(indices) or min(indices, default=0) < 0:
        raise TypeError(f"the accelerators have the indices {indices}")
    for accelerator in registry.accelerators:
        find_flavor(accelerator.model)
