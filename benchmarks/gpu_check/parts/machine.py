"""The machine: versions, the device, and the rate of bfloat16 matmuls that shares of it are given of."""

import importlib.util
import platform
import sys
import time
from importlib import metadata
from typing import Any

import torch

from gpu_check.settings import Result, Settings, Skipped

PACKAGES = ("torch", "transformers", "accelerate", "liger_kernel", "trl", "flash_attn", "triton", "pytest", "psutil")
REPETITIONS = 10


def run(case: str, settings: Settings) -> Result:
    """The case "versions", "device", or "bfloat16 matmul"."""
    if case == "versions":
        return Result(True, versions())
    if case == "device":
        return Result(True, device(settings))
    rate = matmul_rate(settings)
    (settings.scratch / "matmul_rate.txt").write_text(str(rate))
    return Result(True, {"TFLOP/s": rate / 1e12, "rows and columns": settings.matmul})


def versions() -> dict[str, Any]:
    """The versions of Python and of the packages that are installed."""
    found: dict[str, Any] = {"Python": sys.version.split()[0], "system": platform.platform()}
    for name in PACKAGES:
        if importlib.util.find_spec(name) is not None:
            try:
                found[name] = metadata.version(name.replace("_", "-"))
            except metadata.PackageNotFoundError:
                found[name] = "installed"
    return found


def device(settings: Settings) -> dict[str, Any]:
    """The driver's description of the device.

    Raises:
        Skipped: the dry mode has none.
    """
    if settings.dry:
        raise Skipped("the dry mode computes on the CPU")
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory GiB": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "CUDA": torch.version.cuda,
        "ROCm": torch.version.hip,
        "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
    }


def matmul_rate(settings: Settings) -> float:
    """The best rate of bfloat16 matmuls of square matrices, in FLOP/s."""
    size = settings.matmul
    a, b = (torch.randn(size, size, device=settings.device).to(torch.bfloat16) for _ in range(2))
    best_s = float("inf")
    for _ in range(REPETITIONS):
        synchronize(settings)
        start = time.perf_counter()
        a @ b
        synchronize(settings)
        best_s = min(best_s, time.perf_counter() - start)
    return 2 * size**3 / best_s


def synchronize(settings: Settings) -> None:
    """Wait until the device has computed everything."""
    if not settings.dry:
        torch.cuda.synchronize()
