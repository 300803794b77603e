"""The registry: existing accelerators, the current accelerator, and the job on each.

The registry is one JSON file in the user's state directory. The file is only ever replaced as a whole, so readers take
no lock; writers take one. A job is a process, identified by process id *and* start time, because process ids are used
again. Readers skip a job whose process is gone, and the next writer removes it.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import psutil

from moreh.accelerator.environment import visible_device
from moreh.accelerator.flavors import default_flavor
from moreh.accelerator.registry_content import Accelerator, Job, Registry, new_token, parse_registry
from moreh.accelerator.state_files import read_json, replace_json, state_directory, writer_lock
from moreh.accelerator.this_machine import find_model
from moreh.atomic_io import remove_temporaries
from moreh.errors import AcceleratorBusyError, AcceleratorError

MAX_ACCELERATORS = 5

Result = TypeVar("Result")


def read_registry() -> Registry:
    """The registry as it is now, with running jobs only. Nothing is written, even if there is no file yet.

    Raises:
        RegistryError: the file cannot be read, or its content is damaged.
    """
    registry = parse_registry(read_json(_registry_path()), _registry_path())
    return replace(registry, jobs=tuple(job for job in registry.jobs if job.is_running()))


def ensure_registry() -> Registry:
    """The registry. It is written to its file if there is none yet, so that the first accelerator keeps its token."""
    return _update(lambda registry: (registry, registry))


def add_accelerator(model: str) -> Accelerator:
    """Add an accelerator with the lowest free index. It does not become the current one.

    Raises:
        AcceleratorError: the model is unknown, or there are MAX_ACCELERATORS accelerators already.
    """
    added = Accelerator(index=0, model=default_flavor().name, token=new_token()).with_model(model)

    def change(registry: Registry) -> tuple[Registry, Accelerator]:
        if len(registry.accelerators) >= MAX_ACCELERATORS:
            raise AcceleratorError(
                f"there are {MAX_ACCELERATORS} accelerators already, the most one environment can have: "
                "remove one with 'moreh-smi device --rm'"
            )
        taken = {a.index for a in registry.accelerators}
        index = next(i for i in range(MAX_ACCELERATORS) if i not in taken)
        indexed = replace(added, index=index)
        accelerators = tuple(sorted((*registry.accelerators, indexed), key=lambda a: a.index))
        return replace(registry, accelerators=accelerators), indexed

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
    find_model(model)  # an unknown one is refused before the registry is locked

    def change(registry: Registry) -> tuple[Registry, Accelerator]:
        current = registry.accelerator(registry.current)
        switched = current.with_model(model)
        if switched == current:
            return registry, current
        if switched.flavor.name != current.flavor.name:
            _require_idle(registry, current.index, "switched")
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
            f"accelerator {index} is in use by {job.shown} and cannot be {verb}: wait until it ends, end it with "
            "'moreh-smi --reset', or add another accelerator with 'moreh-smi device --add' and select it with "
            "'moreh-smi device --switch'"
        )


def _update(change: Callable[[Registry], tuple[Registry, Result]]) -> Result:
    """Apply a change to the registry under the writers' lock, and delete the jobs of dead processes."""
    with writer_lock():
        remove_temporaries(_registry_path())
        before = read_registry()
        after, result = change(before)
        replace_json(_registry_path(), asdict(after), durable=True)
        running = {job.id for job in after.jobs}
        for path in job_status_path(0).parent.glob("*.json*"):
            if path.name.split(".")[0] not in {str(i) for i in running}:
                path.unlink(missing_ok=True)
    return result


def _registry_path() -> Path:
    return state_directory() / "registry.json"
