"""The registry: which accelerators there are, which one is current, and which job runs on which.

The registry is one JSON file in the user's state directory. The file is only ever replaced as a whole, so readers take
no lock; writers take one. A job is a process, identified by process id *and* start time, because process ids are used
again. Readers skip a job whose process is gone, and the next writer removes it.
"""

import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import psutil

from moreh.accelerator.environment import visible_device
from moreh.accelerator.flavors import Flavor, default_flavor, find_flavor
from moreh.accelerator.state_files import read_json, replace_json, state_directory, writer_lock
from moreh.errors import AcceleratorBusyError, AcceleratorError, RegistryError

MAX_ACCELERATORS = 5
# A process's start time is derived from the boot time, which moves by fractions of a second when the clock is set.
START_TIME_TOLERANCE_SECONDS = 1.0

Result = TypeVar("Result")


@dataclass(frozen=True)
class Accelerator:
    """One accelerator of this environment."""

    index: int
    """Its number in the tools, from 0."""
    model: str
    """The name of its flavor."""
    token: str
    """A random id, as on the platform."""

    @cached_property
    def flavor(self) -> Flavor:
        """The size that `model` names."""
        return find_flavor(self.model)


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
    """When the process was started, in seconds since the epoch."""
    command: str
    """The command line."""
    run: str = ""
    """The id of all processes that torchrun starts together, of which the first is the job; empty otherwise."""

    def is_running(self) -> bool:
        """Whether the process that registered this job is still running (a zombie is not)."""
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


def read_registry() -> Registry:
    """The registry as it is now, with running jobs only. Nothing is written, even if there is no file yet.

    Raises:
        RegistryError: the file cannot be read, or its content is damaged.
    """
    registry = _parse(read_json(_registry_path()))
    return replace(registry, jobs=tuple(job for job in registry.jobs if job.is_running()))


def ensure_registry() -> Registry:
    """The registry. It is written to its file if there is none yet, so that the first accelerator keeps its token."""
    return _update(lambda registry: (registry, registry))


def add_accelerator(model: str) -> Accelerator:
    """Add an accelerator with the lowest free index. It does not become the current one.

    Raises:
        AcceleratorError: the model is unknown, or there are MAX_ACCELERATORS accelerators already.
    """
    flavor = find_flavor(model)

    def change(registry: Registry) -> tuple[Registry, Accelerator]:
        if len(registry.accelerators) >= MAX_ACCELERATORS:
            raise AcceleratorError(
                f"there are {MAX_ACCELERATORS} accelerators already, the most one environment can have: "
                "remove one with 'moreh-smi device --rm'"
            )
        taken = {a.index for a in registry.accelerators}
        index = next(i for i in range(MAX_ACCELERATORS) if i not in taken)
        added = Accelerator(index=index, model=flavor.name, token=_new_token())
        accelerators = tuple(sorted((*registry.accelerators, added), key=lambda a: a.index))
        return replace(registry, accelerators=accelerators), added

    return _update(change)


def remove_accelerator(index: int) -> Accelerator:
    """Remove an accelerator that runs no job; if it was the current one, the lowest remaining index becomes current.

    Raises:
        AcceleratorError: the index is unknown, a job is running on the accelerator, or it is the only one.
    """

    def change(registry: Registry) -> tuple[Registry, Accelerator]:
        removed = registry.accelerator(index)
        _require_idle(registry, index, "removed")
        remaining = tuple(a for a in registry.accelerators if a.index != index)
        if not remaining:
            raise AcceleratorError(
                f"accelerator {index} is the only one and cannot be removed: 'moreh-switch-model' changes its model"
            )
        current = remaining[0].index if registry.current == index else registry.current
        return replace(registry, accelerators=remaining, current=current), removed

    return _update(change)


def select_accelerator(index: int) -> Accelerator:
    """Make an accelerator the current one, which the next process will use.

    Raises:
        AcceleratorError: the index is unknown.
    """
    return _update(lambda registry: (replace(registry, current=index), registry.accelerator(index)))


def switch_model(model: str) -> Accelerator:
    """Give the current accelerator another model.

    Raises:
        AcceleratorError: the model is unknown, or a job is running on the accelerator.
    """
    flavor = find_flavor(model)

    def change(registry: Registry) -> tuple[Registry, Accelerator]:
        current = registry.accelerator(registry.current)
        if current.model == flavor.name:
            return registry, current
        _require_idle(registry, current.index, "switched")
        switched = replace(current, model=flavor.name)
        accelerators = tuple(switched if a.index == current.index else a for a in registry.accelerators)
        return replace(registry, accelerators=accelerators), switched

    return _update(change)


def start_job(process: psutil.Process, command: str, run: str = "") -> tuple[Job, Accelerator]:
    """Register a process as the job of the current accelerator, or of that of MOREH_VISIBLE_DEVICE.

    If the process, or another process of the same `run`, is the job already, that job is returned.

    Raises:
        AcceleratorBusyError: another process is using the accelerator.
    """

    def change(registry: Registry) -> tuple[Registry, tuple[Job, Accelerator]]:
        accelerator = registry.accelerator(visible_device(registry.current))
        holder = registry.job_on(accelerator.index)
        if holder is not None and (holder.pid == process.pid or (run != "" and holder.run == run)):
            return registry, (holder, accelerator)
        _require_idle(registry, accelerator.index, "shared")
        job = Job(registry.next_job_id, accelerator.index, process.pid, process.create_time(), command, run)
        changed = replace(registry, jobs=(*registry.jobs, job), next_job_id=job.id + 1)
        return changed, (job, accelerator)

    return _update(change)


def end_job(job_id: int) -> None:
    """Remove a job from the registry, with its status file. Does nothing if the job is not there."""
    _update(lambda registry: (replace(registry, jobs=tuple(j for j in registry.jobs if j.id != job_id)), None))


def job_status_path(job_id: int) -> Path:
    """The file in which a running job reports its memory and CPU time."""
    return state_directory() / "jobs" / f"{job_id}.json"


def _require_idle(registry: Registry, index: int, verb: str) -> None:
    job = registry.job_on(index)
    if job is not None:
        raise AcceleratorBusyError(
            f"accelerator {index} is in use by job {job.id} (process {job.pid}: {job.command}) and cannot be {verb}: "
            "wait until it ends, end it with 'moreh-smi --reset', or add another accelerator with "
            "'moreh-smi device --add' and select it with 'moreh-smi device --switch'"
        )


def _update(change: Callable[[Registry], tuple[Registry, Result]]) -> Result:
    """Apply a change to the registry under the writers' lock, and delete what dead processes left."""
    with writer_lock():
        _delete_temporary_files(_registry_path())
        before = read_registry()
        after, result = change(before)
        replace_json(_registry_path(), asdict(after), durable=True)
        running = {job.id for job in after.jobs}
        for path in job_status_path(0).parent.glob("*.json*"):
            if path.name.split(".")[0] not in {str(i) for i in running}:
                path.unlink(missing_ok=True)
    return result


def _delete_temporary_files(path: Path) -> None:
    """Delete temporary files of writers that were killed. Call it only while holding the lock."""
    for leftover in path.parent.glob(path.name + ".*.tmp"):
        leftover.unlink(missing_ok=True)


def _registry_path() -> Path:
    return state_directory() / "registry.json"


def _new_token() -> str:
    return secrets.token_hex(16)


def _parse(content: Any) -> Registry:
    if content is None:
        first = Accelerator(index=0, model=default_flavor().name, token=_new_token())
        return Registry(current=0, next_job_id=1, accelerators=(first,))
    try:
        registry = Registry(
            current=content["current"],
            next_job_id=content["next_job_id"],
            accelerators=tuple(Accelerator(**row) for row in content["accelerators"]),
            jobs=tuple(Job(**row) for row in content["jobs"]),
        )
        _check_types(registry)
        registry.accelerator(registry.current)
    except (KeyError, TypeError, AcceleratorError) as error:
        raise RegistryError(
            f"{_registry_path()} is damaged ({error}): delete it, and one accelerator is set up anew"
        ) from None
    return registry


def _check_types(registry: Registry) -> None:
    """Check for mistakes in a file that was edited by hand.

    Raises:
        TypeError: a value has another type than the tools write, or a process id is below 1.
        AcceleratorError: an accelerator's model is unknown.
    """
    for row in (registry, *registry.accelerators, *registry.jobs):
        for name, kind in row.__annotations__.items():
            value = getattr(row, name)
            allowed = {int: int, float: (int, float), str: str}.get(kind)
            if allowed is not None and (not isinstance(value, allowed) or isinstance(value, bool)):  # type: ignore[arg-type]
                raise TypeError(f"{name} is {value!r}")
    for job in registry.jobs:
        if job.pid < 1:
            raise TypeError(f"pid is {job.pid}")
    for accelerator in registry.accelerators:
        find_flavor(accelerator.model)
