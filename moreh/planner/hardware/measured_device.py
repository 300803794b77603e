"""This machine as a device and a cluster of the planner, from a measured `LocalProfile`."""

import functools
from dataclasses import replace
from math import isnan

import numpy as np

from moreh.accelerator.devices import Device
from moreh.accelerator.this_machine import THIS_MACHINE
from moreh.planner.hardware.cluster import Cluster
from moreh.planner.hardware.efficiency import Efficiency
from moreh.planner.hardware.local_profile import LocalProfile
from moreh.planner.hardware.roofline import Roofline
from moreh.planner.software_profile import SoftwareProfile

# 100 Gb/s for each device, the slower of the usual networks of GPU nodes.
ASSUMED_NETWORK_BYTES_PER_SECOND = 12.5e9
# Candidates for Efficiency.matmul_depth and Efficiency.matmul_waves.
_DEPTHS = (0.0, *np.geomspace(1, 512, 28).tolist())
_WAVES = (0.0, *np.geomspace(0.01, 4, 27).tolist())


def measured_device(profile: LocalProfile) -> Device:
    """One worker as a device. Workers of a node share no network.

    Its peaks are the highest measured rates, or those that still larger matmuls would reach.
    """
    return replace(
        _device_with_measured_peaks(profile),
        bf16_flops_per_second=profile.best_rate("half") * max(1.0, _fit_efficiency(profile, "half").matmul),
        float32_flops_per_second=profile.best_rate("float32") * max(1.0, _fit_efficiency(profile, "float32").matmul),
    )


def with_measured_rates(device: Device, profile: LocalProfile) -> Device:
    """A GPU of this machine whose rates are NaN, with those of a profile of this machine.

    Links that the user stated stay. A network cannot be measured on one machine, so it is assumed.
    """
    measured = measured_device(profile)
    node_rate, network_rate = device.node_bytes_per_second, device.network_bytes_per_second
    return replace(
        measured,
        name=device.name,
        memory_mib=device.memory_mib,
        devices_per_node=device.devices_per_node,
        node_bytes_per_second=measured.node_bytes_per_second if isnan(node_rate) else node_rate,
        network_bytes_per_second=ASSUMED_NETWORK_BYTES_PER_SECOND if isnan(network_rate) else network_rate,
        source=f"rates and links measured with {profile.workers} GPU(s), memory of the driver, network "
        + ("assumed" if isnan(network_rate) else "as stated"),
    )


def measured_cluster(profile: LocalProfile) -> Cluster:
    """The workers as one node."""
    device = measured_device(profile)
    return Cluster(
        device,
        profile.workers,
        profile.workers,
        all_reduce_rings=all_reduce_rings(profile),
        concurrent_devices=profile.concurrent_workers,
    )


def measured_efficiency(profile: LocalProfile, compute: str = "half") -> Efficiency:
    """The constants with which a Roofline over `measured_device(profile)` gives the measured times.

    Args:
        compute: The precision of arithmetic, as in SoftwareProfile. "float8", for which nothing is measured, counts as
            "half".
    """
    fitted = _fit_efficiency(profile, "float32" if compute == "float32" else "half")
    scale = max(1.0, fitted.matmul)
    return replace(fitted, matmul=fitted.matmul / scale, attention=fitted.attention / scale)


def all_reduce_rings(profile: LocalProfile) -> float:
    """Rings of an all-gather that an all-reduce takes as long as: the median of all sizes; 2 without measurements.

    gloo's all-reduce and all-gather of as many bytes take almost equally long.
    """
    seconds = {(c.operation, c.size_bytes): c.seconds for c in profile.collectives}
    factors = [
        s / seconds["all-gather", size]
        for (operation, size), s in seconds.items()
        if operation == "all-reduce" and ("all-gather", size) in seconds
    ]
    return float(np.median(factors)) if factors else 2.0


@functools.lru_cache(maxsize=8)
def ring_latency_and_rate(profile: LocalProfile) -> tuple[float, float]:
    """Latency (s) and rate (bytes/s of a worker) of an all-gather over the workers; 0 and infinite with one worker.

    They are the least squares fit of relative errors to all collectives, where an all-reduce is `all_reduce_rings`
    rings: T = rings (latency + share * bytes / rate).
    """
    if profile.workers == 1:
        return 0.0, float("inf")
    share = (profile.workers - 1) / profile.workers
    all_reduce = all_reduce_rings(profile)
    rings = np.array([all_reduce if c.operation == "all-reduce" else 1 for c in profile.collectives])
    sent_bytes = np.array([share * c.size_bytes for c in profile.collectives])
    ring_s = np.array([c.seconds for c in profile.collectives]) / rings
    latency, per_byte = np.linalg.lstsq(
        np.stack([1 / ring_s, sent_bytes / ring_s], axis=1), np.ones(len(sent_bytes)), rcond=None
    )[0]
    if latency < 0 or per_byte <= 0:
        # Noise: take the fastest collective as all latency, and the largest one as all rate.
        latency, per_byte = ring_s.min(), ring_s[sent_bytes.argmax()] / sent_bytes.max()
    return float(latency), float(1 / per_byte)


def _device_with_measured_peaks(profile: LocalProfile) -> Device:
    link_rate = ring_latency_and_rate(profile)[1] if profile.workers > 1 else profile.memory_bytes_per_second
    return Device(
        name=THIS_MACHINE,
        memory_mib=profile.memory_mib,
        bf16_flops_per_second=profile.best_rate("half"),
        float32_flops_per_second=profile.best_rate("float32"),
        float8_flops_per_second=None,
        memory_bytes_per_second=profile.memory_bytes_per_second,
        compute_units=profile.compute_units,
        devices_per_package=1,
        package_bytes_per_second=None,
        devices_per_node=profile.workers,
        node_bytes_per_second=link_rate,
        network_bytes_per_second=link_rate,
        efficiency_class=THIS_MACHINE,
        source="measured",
    )


@functools.lru_cache(maxsize=8)
def _fit_efficiency(profile: LocalProfile, compute: str) -> Efficiency:
    """The constants for the device with measured peaks. `matmul` is above 1 if larger matmuls would be faster still."""
    attention_rate = (
        profile.attention_float32_flops_per_second if compute == "float32" else profile.attention_bf16_flops_per_second
    )
    hop_s = ring_latency_and_rate(profile)[0] / max(1, profile.workers - 1)
    start = Efficiency(
        matmul=1.0,
        float8=1.0,
        matmul_depth=0.0,
        matmul_waves=0.0,
        attention=attention_rate / profile.best_rate(compute),
        memory=1.0,
        # The time model counts the kernels of forward and backward pass separately.
        kernel_s=profile.autograd_operation_s / 2,
        node=1.0,
        network=1.0,
        node_hop_s=hop_s,
        network_hop_s=hop_s,
        contention=profile.contention,
        skew=profile.skew,
        partial_node=0.0,
    )
    return _fit_matmuls(profile, compute, start)


def _fit_matmuls(profile: LocalProfile, compute: str, start: Efficiency) -> Efficiency:
    """The depth, waves and fraction of the peak with the least mean factor between predicted and measured matmuls."""
    matmuls = [matmul for matmul in profile.matmuls if matmul.compute == compute]
    rows, inner, outer = (np.array([getattr(m, name) for m in matmuls]) for name in ("rows", "inner", "outer"))
    measured_s = np.array([matmul.seconds for matmul in matmuls])
    software = SoftwareProfile(THIS_MACHINE, compute=compute, activation_bytes=4 if compute == "float32" else 2)
    roofline = Roofline(_device_with_measured_peaks(profile), start, software)

    def fit_fraction(depth: float, waves: float) -> tuple[float, Efficiency]:
        """The mean absolute logarithm of the factors, and the constants, with the best fraction of the peak."""
        efficiency = replace(start, matmul_depth=depth, matmul_waves=waves)
        predicted_s = replace(roofline, efficiency=efficiency).matmul_s(rows, outer, inner)
        fraction = float(1 / np.median(measured_s / predicted_s))
        efficiency = replace(efficiency, matmul=fraction, float8=fraction)
        predicted_s = replace(roofline, efficiency=efficiency).matmul_s(rows, outer, inner)
        return float(np.mean(np.abs(np.log(measured_s / predicted_s)))), efficiency

    fits = (fit_fraction(depth, waves) for depth in _DEPTHS for waves in _WAVES)
    return min(fits, key=lambda error_and_efficiency: error_and_efficiency[0])[1]
