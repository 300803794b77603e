"""A profile of a machine that does not exist: what would be measured on one with given constants."""

from moreh.planner.hardware.local_profile import LocalProfile, MeasuredCollective, MeasuredMatmul
from moreh.planner.hardware.measured_device import measured_device, measured_efficiency
from moreh.planner.hardware.roofline import Roofline
from moreh.planner.software_profile import SoftwareProfile

# Rows, inner and outer size of the measured matmuls.
MATMUL_SIZES = [
    (512, 64, 512),
    (512, 512, 512),
    (256, 2048, 256),
    (32, 256, 256),
    (128, 256, 256),
    (256, 256, 256),
    (512, 256, 1024),
]

SOFTWARE = {
    "float32": SoftwareProfile("float32", compute="float32", activation_bytes=4),
    "half": SoftwareProfile("half"),
}


def roofline_of(profile, compute):
    """The planner's time model of one worker of a profile."""
    return Roofline(measured_device(profile), measured_efficiency(profile, compute), SOFTWARE[compute])


def synthetic_profile(workers=1, depth=20.0, waves=0.5, latency_s=2e-4, rate=2e9, rates=(1e11, 3e11)):
    """A profile by the planner's formulas.

    `depth` and `waves` are those of matmuls, `rates` their peaks in float32 and half precision; `latency_s` and `rate`
    are those of one step of a ring.
    """
    matmuls = [
        MeasuredMatmul(
            compute,
            rows,
            inner,
            outer,
            seconds=2 * rows * inner * outer / peak * (1 + depth / inner) * (1 + waves * 32768 / (rows * outer)) + 5e-6,
        )
        for compute, peak in zip(("float32", "half"), rates, strict=True)
        for rows, inner, outer in MATMUL_SIZES
    ]
    share = (workers - 1) / workers
    collectives = [
        MeasuredCollective(name, size, rings * ((workers - 1) * latency_s + share * size / rate))
        for size in (2**12, 2**20, 2**24)
        for name, rings in (("all-reduce", 2), ("all-gather", 1))
        if workers > 1
    ]
    return LocalProfile(
        workers=workers,
        threads_per_worker=1,
        concurrent_workers=None,
        memory_mib=1024,
        compute_units=1,
        matmuls=tuple(matmuls),
        attention_float32_flops_per_second=5e10,
        attention_bf16_flops_per_second=6e10,
        memory_bytes_per_second=5e10,
        forward_operation_s=4e-6,
        autograd_operation_s=1e-5,
        collectives=tuple(collectives),
        contention=0.5,
        skew=0.1,
        confirmed=1.0,
    )
