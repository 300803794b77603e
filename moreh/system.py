"""Cores and memory of this machine."""

import contextlib
import os
from pathlib import Path

# Processes that import torch, for each core. More of them only wait for each other.
PROCESSES_PER_CORE = 4
# On any machine, so that plans for this number of workers can be tried.
LEAST_PROCESSES = 8
# What a process takes that imports torch, before it has a model.
PROCESS_BYTES = 300 * 2**20


def available_cores() -> int:
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def refused_processes(count: int) -> str | None:
    """The reason, the end of a sentence, why this machine cannot run so many computing processes; None if it can."""
    cores = available_cores()
    by_cores = max(LEAST_PROCESSES, PROCESSES_PER_CORE * cores)
    free = available_memory_bytes()
    by_memory = max(1, free // PROCESS_BYTES)
    if count > by_cores:
        return f"expected at most {by_cores} on this machine, which has {cores} CPU core(s)"
    if count > by_memory:
        gib = f"{free / 2**30:.1f} GiB"
        return f"expected at most {by_memory} now: {gib} of memory are free, and each takes 0.3 GiB before its model"
    return None


def available_memory_bytes() -> int:
    """Memory that new processes can have, in bytes: of the machine, or of the container if that has less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # "max", or no control group of version 2
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="utf-8"))
        free = min(free, max(0, limit - int((group / "memory.current").read_text(encoding="utf-8"))))
    return free
