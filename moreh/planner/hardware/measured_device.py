"""This machine in the terms of the planner: measured once, in seconds, with all workers busy at the same time."""

import functools
import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from moreh.accelerator.devices import Device
from moreh.accelerator.state_files import read_json, replace_json, state_directory
from moreh.errors import PlanError, RegistryError
from moreh.log import logger
from moreh.planner.hardware.cluster import Cluster
from moreh.planner.hardware.efficiency import Efficiency
from moreh.planner.hardware.roofline import Roofline
from moreh.planner.software_profile import SoftwareProfile
from moreh.system import available_cores

NAME = "this machine"
# Of what is measured and of the file that keeps it: older files are not read.
FORMAT = 1
LOCK_TIMEOUT_S = 300.0
CONFIRMED = 0.9
# Candidates for Efficiency.matmul_depth and Efficiency.matmul_waves.
_DEPTHS = (0.0, *np.geomspace(1, 512, 28).tolist())
_WAVES = (0.0, *np.geomspace(0.01, 4, 27).tolist())


@dataclass(frozen=True)
class MeasuredMatmul:
    """Seconds of `[rows, inner] x [inner, outer]`; `compute` is "float32" or "half" (bfloat16, float16 where there is none)."""

    compute: str
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
    """Seconds of an "all-reduce" or an "all-gather" over all workers whose result has `size_bytes`."""

    operation: str
    size_bytes: int
    seconds: float


@dataclass(frozen=True)
class LocalProfile:
    """What one worker of this machine reaches while `workers` of them do the same.

    `threads_per_worker` are of the processor. `memory_mib` is what a worker may use. Rates of attention are of the fused causal
    one, forward; `memory_bytes_per_second` is of large copies and additions. An operation of a layer on tiny tensors takes
    `forward_operation_s`, and `autograd_operation_s` together with its backward pass. `collectives` is empty with one worker.
    `contention` is how much of an exchange beside a computation adds to the time of both, `skew` the share of a computation
    that workers wait for the slowest of them before an exchange (0 to 1 each). `confirmed` is the share of all figures that
    were measured twice within a quarter: lower than CONFIRMED where other programs were busy.
    """

    workers: int
    threads_per_worker: int
    memory_mib: int
    compute_units: int
    products: tuple[MeasuredMatmul, ...]
    attention_float32_flops_per_second: float
    attention_bf16_flops_per_second: float
    memory_bytes_per_second: float
    forward_operation_s: float
    autograd_operation_s: float
    collectives: tuple[MeasuredCollective, ...]
    contention: float
    skew: float
    confirmed: float

    def best_rate(self, compute: str) -> float:
        """The highest measured rate of matrix products of a type, FLOP/s."""
        return max(product.flops_per_second for product in self.products if product.compute == compute)

    @property
    def ring(self) -> tuple[float, float]:
        """Latency (s) and rate (bytes/s of a worker) of an all-gather over the workers; 0 and infinite with one worker."""
        return _fit_rings(self)


def local_profile(workers: int = 1) -> LocalProfile:
    """The profile of this machine with so many workers: measured the first time, then read from the state directory.

    It is measured again when the hardware, torch or the number of threads is another one, and where the file is damaged.

    Raises:
        PlanError: there is no such number of workers, or measuring failed.
        RegistryError: the state directory cannot be used.
    """
    from filelock import FileLock, Timeout  # as in state_files.py: slow to import

    _require_workers(workers)
    key = _key(workers)
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = state_directory() / f"this-machine-{digest}.json"
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
                replace_json(path, {"key": key, "profile": asdict(profile)}, durable=False)
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


def measure(workers: int) -> LocalProfile:
    """Measure this machine with so many workers, each a process of its own. Takes some seconds.

    Raises:
        PlanError: there is no such number of workers, or measuring failed.
    """
    from moreh.planner.hardware.microbenchmarks import run_workers  # needs torch

    _require_workers(workers)
    threads = _threads_per_worker(workers)
    figures = run_workers(workers, threads)
    return _profile_of(figures | {"workers": workers, "threads_per_worker": threads})


def device_of(profile: LocalProfile) -> Device:
    """One worker as a device of the planner; workers of a node share no network.

    Its peaks are the highest measured rates, or those that still larger products would reach.
    """
    return replace(
        _measured_device(profile),
        bf16_flops_per_second=profile.best_rate("half") * max(1.0, _fitted(profile, "half").matmul),
        float32_flops_per_second=profile.best_rate("float32") * max(1.0, _fitted(profile, "float32").matmul),
    )


def _measured_device(profile: LocalProfile) -> Device:
    rate = profile.ring[1] if profile.workers > 1 else profile.memory_bytes_per_second
    return Device(
        name=NAME,
        memory_mib=profile.memory_mib,
        bf16_flops_per_second=profile.best_rate("half"),
        float32_flops_per_second=profile.best_rate("float32"),
        float8_flops_per_second=None,
        memory_bytes_per_second=profile.memory_bytes_per_second,
        compute_units=profile.compute_units,
        devices_per_package=1,
        package_bytes_per_second=None,
        devices_per_node=profile.workers,
        node_bytes_per_second=rate,
        network_bytes_per_second=rate,
        efficiency_class=NAME,
        source="measured",
    )


def cluster_of(profile: LocalProfile) -> Cluster:
    """The workers as one node."""
    return Cluster(device_of(profile), profile.workers, profile.workers)


def efficiency_of(profile: LocalProfile, compute: str = "half") -> Efficiency:
    """The constants with which a Roofline over `device_of(profile)` gives the measured times of one type.

    `compute` is that of the SoftwareProfile; float8, for which nothing is measured, counts as half.
    """
    fitted = _fitted(profile, "float32" if compute == "float32" else "half")
    scale = max(1.0, fitted.matmul)
    return replace(fitted, matmul=fitted.matmul / scale, attention=fitted.attention / scale)


@functools.lru_cache(maxsize=8)
def _fitted(profile: LocalProfile, kind: str) -> Efficiency:
    """The constants over `_measured_device(profile)`; `matmul` is above 1 where larger products would be faster still."""
    attention = (
        profile.attention_float32_flops_per_second if kind == "float32" else profile.attention_bf16_flops_per_second
    )
    hop_s = profile.ring[0] / max(1, profile.workers - 1)
    start = Efficiency(
        matmul=1.0,
        float8=1.0,
        matmul_depth=0.0,
        matmul_waves=0.0,
        attention=attention / profile.best_rate(kind),
        memory=1.0,
        # Forward and backward pass are kernels of their own in the model of time.
        kernel_s=profile.autograd_operation_s / 2,
        node=1.0,
        network=1.0,
        node_hop_s=hop_s,
        network_hop_s=hop_s,
        contention=profile.contention,
        skew=profile.skew,
        partial_node=0.0,
    )
    return _fit_products(profile, kind, start)


def _fit_products(profile: LocalProfile, kind: str, start: Efficiency) -> Efficiency:
    """The depth, waves and fraction of the peak with the least mean factor between predicted and measured products."""
    products = [product for product in profile.products if product.compute == kind]
    rows, inner, outer = (np.array([getattr(p, name) for p in products]) for name in ("rows", "inner", "outer"))
    measured = np.array([product.seconds for product in products])
    roofline = Roofline(
        _measured_device(profile),
        start,
        SoftwareProfile(NAME, compute=kind, activation_bytes=4 if kind == "float32" else 2),
    )

    def fitted(depth: float, waves: float) -> tuple[float, Efficiency]:
        efficiency = replace(start, matmul_depth=depth, matmul_waves=waves)
        times = replace(roofline, efficiency=efficiency).matmul_s(rows, outer, inner)
        matmul = float(1 / np.median(measured / times))
        efficiency = replace(efficiency, matmul=matmul, float8=matmul)
        times = replace(roofline, efficiency=efficiency).matmul_s(rows, outer, inner)
        return float(np.mean(np.abs(np.log(measured / times)))), efficiency

    return min((fitted(depth, waves) for depth in _DEPTHS for waves in _WAVES), key=lambda found: found[0])[1]


@functools.lru_cache(maxsize=8)
def _fit_rings(profile: LocalProfile) -> tuple[float, float]:
    """Latency (s) and rate (bytes/s of a worker) of one ring, by least squares of relative errors.

    An all-reduce is two rings: T = 2 (latency + share * bytes / rate).
    """
    if profile.workers == 1:
        return 0.0, float("inf")
    share = (profile.workers - 1) / profile.workers
    rings = np.array([2 if c.operation == "all-reduce" else 1 for c in profile.collectives])
    sent = np.array([share * c.size_bytes for c in profile.collectives])
    seconds = np.array([c.seconds for c in profile.collectives]) / rings
    latency, per_byte = np.linalg.lstsq(
        np.stack([1 / seconds, sent / seconds], axis=1), np.ones(len(sent)), rcond=None
    )[0]
    if latency < 0 or per_byte <= 0:
        # Noise: the fastest one is all latency, the largest one all rate.
        latency, per_byte = seconds.min(), seconds[sent.argmax()] / sent.max()
    return float(latency), float(1 / per_byte)


def _require_workers(workers: int) -> None:
    """Raises PlanError where this machine cannot have so many workers."""
    import torch

    devices = torch.cuda.device_count()
    if workers < 1 or 0 < devices < workers:
        allowed = f"1 to {devices}, a GPU each" if devices else "1 or more"
        raise PlanError(f"workers={workers}: this machine can have {allowed}")


def _threads_per_worker(workers: int) -> int:
    """Processor threads of one worker: its share of the cores, or what OMP_NUM_THREADS allows it."""
    share = max(1, min(available_cores(), psutil.cpu_count(logical=False) or available_cores()) // workers)
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(limit)) if limit.isdecimal() and int(limit) > 0 else share


def _key(workers: int) -> dict[str, Any]:
    """What a profile depends on."""
    import torch

    return {
        "format": FORMAT,
        "processor": _processor_name(),
        "cores": available_cores(),
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "torch": torch.__version__,
        "threads": _threads_per_worker(workers),
        "workers": workers,
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _read_profile(path: Path, key: dict[str, Any]) -> LocalProfile | None:
    """The profile in a file of the cache; None where there is none, or one for something else, or a damaged one."""
    try:
        content: Any = read_json(path)
        return _profile_of(content["profile"]) if content["key"] == key else None
    except (RegistryError, KeyError, TypeError, ValueError):
        return None


def _profile_of(figures: dict[str, Any]) -> LocalProfile:
    """A profile from JSON. KeyError, TypeError or ValueError where it is none."""
    products = tuple(MeasuredMatmul(**row) for row in figures["products"])
    collectives = tuple(MeasuredCollective(**row) for row in figures["collectives"])
    profile = LocalProfile(**figures | {"products": products, "collectives": collectives})
    rates = [profile.best_rate("half"), profile.best_rate("float32"), profile.memory_bytes_per_second]
    if min(rates + [row.seconds for row in products + collectives]) <= 0 or (profile.workers > 1 and not collectives):
        raise ValueError("no figures of a measurement")
    return profile
