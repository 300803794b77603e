"""The measured rates of this machine, with all workers busy, kept in the state directory.

measured_device.py turns a profile into a device, its efficiency and a cluster of the planner.
"""

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from moreh.accelerator.gpus import shares_gpus
from moreh.accelerator.state_files import read_json, replace_json, state_directory
from moreh.errors import PlanError, RegistryError
from moreh.log import logger
from moreh.system import available_cores, refused_processes

# Of the measurements and of the file that keeps them. Files of another format are not read.
FORMAT = 4
LOCK_TIMEOUT_S = 300.0
# With a smaller share of confirmed figures, the log says that the measurement was disturbed.
CONFIRMED = 0.9


@dataclass(frozen=True)
class MeasuredMatmul:
    """A matmul `[rows, inner] x [inner, outer]`."""

    compute: str
    """The precision: "float32" or "half" (bfloat16, or float16 if there is no bfloat16)."""
    rows: int
    inner: int
    outer: int
    seconds: float

    @property
    def flops_per_second(self) -> float:
        """The rate that was reached."""
        return 2 * self.rows * self.inner * self.outer / self.seconds


@dataclass(frozen=True)
class MeasuredCollective:
    """A collective over all workers."""

    operation: str
    """The kind: "all-reduce" or "all-gather"."""
    size_bytes: int
    """Bytes of the result."""
    seconds: float


@dataclass(frozen=True)
class LocalProfile:
    """Rates and times that one worker of this machine reaches while all `workers` do the same.

    Where workers share cores, all seconds are CPU seconds: what a worker needs of a core, however long it waits for it.
    """

    workers: int
    threads_per_worker: int
    """CPU threads of each worker."""
    concurrent_workers: float | None
    """Workers that can compute at the same time, where they share CPU cores; None where all can."""
    memory_mib: int
    """MiB that each worker may use."""
    compute_units: int
    """Units that each work on a tile of a matmul: a GPU's multiprocessors; 1 on CPU, whose cores share every matmul."""
    matmuls: tuple[MeasuredMatmul, ...]
    attention_float32_flops_per_second: float
    """Rate of fused causal attention, forward, in float32."""
    attention_bf16_flops_per_second: float
    """Rate of fused causal attention, forward, in half precision."""
    memory_bytes_per_second: float
    """Rate of large copies and additions."""
    forward_operation_s: float
    """Seconds of an operation of a layer on tiny tensors."""
    autograd_operation_s: float
    """Seconds of the same operation together with its backward pass."""
    collectives: tuple[MeasuredCollective, ...]
    """Empty with one worker."""
    contention: float
    """Share of the shorter of a computation and an overlapping exchange that adds to the time of both (0 to 1)."""
    skew: float
    """The share of a computation that workers wait for the slowest of them before an exchange (0 to 1)."""
    confirmed: float
    """The share of figures that were measured twice within 25 %. Lower than CONFIRMED if other programs were busy."""

    def best_rate(self, compute: str) -> float:
        """The highest measured rate of matmuls of a precision, FLOP/s."""
        return max(matmul.flops_per_second for matmul in self.matmuls if matmul.compute == compute)


def local_profile(workers: int = 1) -> LocalProfile:
    """The profile of this machine with `workers` workers: measured the first time, then read from the state directory.

    It is measured again if the hardware, torch or the number of threads changes, and if the file is damaged.

    Raises:
        PlanError: this machine cannot have that number of workers, or the measurement failed.
        RegistryError: the state directory cannot be used.
    """
    from filelock import FileLock, Timeout  # as in state_files.py: slow to import

    _require_workers(workers)
    key = _cache_key(workers)
    path = _path_of(key)
    profile = _read_profile(path, key)
    if profile is not None:
        return profile
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # One lock for all numbers of workers: two measurements at once would disturb each other.
        with FileLock(path.parent / "this-machine.lock", timeout=LOCK_TIMEOUT_S):
            profile = _read_profile(path, key)
            if profile is None:
                profile = measure(workers)
                keep_profile(profile)
                if profile.confirmed < CONFIRMED:
                    logger.warning(
                        "other programs disturbed the measurement of this machine: to repeat it, delete %s", path
                    )
            return profile
    except Timeout:
        raise RegistryError(
            f"{path.parent} has been locked by another measurement for too long: end that process"
        ) from None
    except OSError as error:
        raise RegistryError(
            f"{path.parent} cannot be used: {error.strerror}. Set MOREH_STATE_DIR to another one"
        ) from None


def keep_profile(profile: LocalProfile) -> None:
    """Write a profile of this machine to the state directory, where `local_profile` finds it."""
    key = _cache_key(profile.workers)
    replace_json(_path_of(key), {"key": key, "profile": asdict(profile)}, durable=False)


def measure(workers: int) -> LocalProfile:
    """Measure this machine with `workers` workers, each in a process of its own. Takes some seconds.

    Raises:
        PlanError: this machine cannot have that number of workers, or the measurement failed.
    """
    from moreh.planner.hardware.worker_processes import run_workers

    _require_workers(workers)
    refusal = refused_processes(workers)
    if refusal is not None:
        raise PlanError(f"workers={workers}: each is measured as a process; {refusal}")
    threads = _threads_per_worker(workers)
    figures = run_workers(workers, threads)
    shared = {"concurrent_workers": concurrent_workers(workers, threads)}
    return _profile_from_json(figures | shared | {"workers": workers, "threads_per_worker": threads})


def concurrent_workers(workers: int, threads: int) -> float | None:
    """Workers of `threads` CPU threads that the cores suffice for; None if they suffice for all, and on GPUs."""
    import torch

    cores = available_cores()
    return None if torch.cuda.is_available() or workers * threads <= cores else cores / threads


def _require_workers(workers: int) -> None:
    """Raise PlanError if this machine cannot have that number of workers."""
    import torch

    devices = torch.cuda.device_count()
    if workers < 1 or (0 < devices < workers and not shares_gpus()):
        allowed = f"1 to {devices}, a GPU each" if devices else "1 or more"
        raise PlanError(f"workers={workers}: this machine can have {allowed}")


def _threads_per_worker(workers: int) -> int:
    """CPU threads of one worker: its share of the cores, at most OMP_NUM_THREADS."""
    share = max(1, min(available_cores(), psutil.cpu_count(logical=False) or available_cores()) // workers)
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(limit)) if limit.isdecimal() and int(limit) > 0 else share


def _cache_key(workers: int) -> dict[str, Any]:
    """The facts that a profile depends on."""
    import torch

    return {
        "format": FORMAT,
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "torch": torch.__version__,
        "threads": _threads_per_worker(workers),
        "workers": workers,
    }


def _path_of(key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return state_directory() / f"this-machine-{digest}.json"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _read_profile(path: Path, key: dict[str, Any]) -> LocalProfile | None:
    """The cached profile in a file. None if there is no file, if it is for another key, or if it is damaged."""
    try:
        content: Any = read_json(path)
        return _profile_from_json(content["profile"]) if content["key"] == key else None
    except (RegistryError, KeyError, TypeError, ValueError):
        return None


def _profile_from_json(figures: dict[str, Any]) -> LocalProfile:
    """A profile from JSON.

    Raises:
        KeyError, TypeError, ValueError: the content is not that of a profile.
    """
    matmuls = tuple(MeasuredMatmul(**row) for row in figures["matmuls"])
    collectives = tuple(MeasuredCollective(**row) for row in figures["collectives"])
    profile = LocalProfile(**figures | {"matmuls": matmuls, "collectives": collectives})
    rates = [profile.best_rate("half"), profile.best_rate("float32"), profile.memory_bytes_per_second]
    if min(rates + [row.seconds for row in matmuls + collectives]) <= 0 or (profile.workers > 1 and not collectives):
        raise ValueError("no figures of a measurement")
    return profile
