"""The prior of the constants before any measurement is seen, and which devices are alike."""

from dataclasses import astuple

import numpy as np

from moreh.accelerator.devices import all_devices
from moreh.planner.hardware.efficiency import Efficiency
from moreh.planner.hardware.efficiency_distribution import CONSTANTS, to_unconstrained
from moreh.planner.plan.arrays import FloatArray

# What is usual on an A100 with any program, and by how much programs and devices differ from it: a standard deviation
# of the unconstrained constants. Both are judgment.
PRIOR = Efficiency(
    matmul=0.72,
    float8=0.5,
    matmul_depth=150,
    matmul_waves=0.6,
    attention=0.33,
    memory=0.8,
    kernel_s=4e-6,
    node=0.7,
    network=0.7,
    node_hop_s=2e-6,
    network_hop_s=6e-6,
    contention=0.3,
    skew=0.03,
    partial_node=0.5,
    elementwise=0.8,
    layer_host_s=8e-4,
    step_host_s=2e-2,
    slowdown=1.05,
)
WIDTH = Efficiency(
    matmul=0.5,
    float8=0.5,
    matmul_depth=0.7,
    matmul_waves=0.7,
    attention=0.5,
    memory=0.4,
    kernel_s=0.5,
    node=0.6,
    network=0.6,
    node_hop_s=0.7,
    network_hop_s=0.7,
    contention=1.0,
    skew=0.8,
    partial_node=1.0,
    elementwise=0.5,
    layer_host_s=0.6,
    step_host_s=1.0,
    slowdown=0.1,
)
# Power limits devices with more arithmetic sooner: the log-odds of `matmul` fall by this for each factor of e in peak
# FLOP/s, and those of `float8`. AMD's libraries reach less of the peak than NVIDIA's. All of it is judgment.
PEAK_SLOPE, PEAK_OF_PRIOR, FLOAT8_PEAK_OF_PRIOR = 0.3, 312e12, 1979e12
AMD_MATMUL = 0.55
# Classes of devices with a similar architecture.
GENERATIONS = {
    "A100 80GB": "Ampere",
    "A100 40GB": "Ampere",
    "H100": "Hopper",
    "H100 96GB": "Hopper",
    "H200": "Hopper",
    "CDNA2": "CDNA",
    "CDNA3": "CDNA",
}


def prior_mean(class_name: str) -> FloatArray:
    """Coordinates of a class of devices before any row is seen, [constants]."""
    devices = [device for device in all_devices().values() if device.efficiency_class == class_name]
    mean = to_unconstrained(PRIOR)
    matmul = CONSTANTS.index("matmul")
    if any(device.name.startswith("MI") for device in devices):
        mean[matmul] = np.log(AMD_MATMUL / (1 - AMD_MATMUL))
    elif devices:
        peak = max(device.bf16_flops_per_second or PEAK_OF_PRIOR for device in devices)
        mean[matmul] -= PEAK_SLOPE * np.log(peak / PEAK_OF_PRIOR)
    float8_peak = max((device.float8_flops_per_second or FLOAT8_PEAK_OF_PRIOR for device in devices), default=0.0)
    if float8_peak:
        mean[CONSTANTS.index("float8")] -= PEAK_SLOPE * np.log(float8_peak / FLOAT8_PEAK_OF_PRIOR)
    return mean


def width() -> FloatArray:
    """`WIDTH` as an array, [constants]."""
    return np.array(astuple(WIDTH))
