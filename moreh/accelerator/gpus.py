"""The GPUs of this machine, as reported by torch and the driver.

Nothing here imports torch on a machine without a driver of GPUs, so that the command-line tools answer at once there.
"""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moreh.errors import OptionError

# One of these is there wherever torch can see a GPU: drivers of NVIDIA, of AMD, of GPUs in WSL, and of Jetson.
DRIVER_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/nvhost-gpu")

SHARE_VARIABLE = "MOREH_SHARE_GPUS"


@dataclass(frozen=True)
class Gpu:
    """One GPU that this process may use."""

    name: str
    """The driver's name, such as "NVIDIA A100-SXM4-40GB"."""
    memory_mib: int
    """Memory that the driver reports, in MiB."""
    compute_units: int
    """Streaming multiprocessors of NVIDIA, compute units of AMD."""


@dataclass(frozen=True)
class GpuUse:
    """The current use of a GPU by all processes, as its driver reports it."""

    name: str
    """The driver's name."""
    memory_used_mib: int
    """Memory in use, in MiB, rounded up."""
    memory_total_mib: int
    """Memory of the GPU, in MiB."""
    utilization_percent: int | None
    """The share of time with a kernel running, 0 to 100; None without pynvml or amdsmi."""
    temperature_c: int | None
    """Degrees Celsius; None without pynvml or amdsmi."""
    power_w: int | None
    """Watts; None without pynvml or amdsmi."""


def visible_gpus() -> tuple[Gpu, ...]:
    """The GPUs that torch sees, in its order; empty if there is none. CUDA_VISIBLE_DEVICES hides some."""
    if "torch" not in sys.modules and not _has_driver():
        return ()
    import torch

    # False where there are GPUs and their driver is too old for torch.
    if not torch.cuda.is_available():
        return ()
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        name = properties.name or getattr(properties, "gcnArchName", "") or "GPU without a name"
        gpus.append(Gpu(name, properties.total_memory // 2**20, properties.multi_processor_count))
    return tuple(gpus)


def shares_gpus() -> bool:
    """True if MOREH_SHARE_GPUS allows more workers than GPUs: for tests, since such workers are slower than one.

    Raises:
        OptionError: its value is neither 0 nor 1.
    """
    text = os.environ.get(SHARE_VARIABLE, "").strip() or "0"
    if text not in ("0", "1"):
        raise OptionError(
            f"{SHARE_VARIABLE}={text!r}: expected 1 (several workers may share a GPU, over gloo) or 0 (one worker per "
            "GPU); 0 if unset"
        )
    return text == "1"


def gpu_uses() -> tuple[GpuUse, ...]:
    """The use of each GPU that torch sees."""
    return tuple(_use_of(index, gpu.name) for index, gpu in enumerate(visible_gpus()))


def _use_of(index: int, name: str) -> GpuUse:
    import torch

    power_mw = _answer(torch.cuda.power_draw, index)
    used_bytes = _answer(torch.cuda.device_memory_used, index)
    # Second choice: it makes a context on the GPU, whose memory then counts as used.
    free_bytes, total_bytes = torch.cuda.mem_get_info(index) if used_bytes is None else (0, 0)
    if used_bytes is None:
        used_bytes = total_bytes - free_bytes
    else:
        total_bytes = torch.cuda.get_device_properties(index).total_memory
    return GpuUse(
        name=name,
        memory_used_mib=-(-used_bytes // 2**20),
        memory_total_mib=total_bytes // 2**20,
        utilization_percent=_answer(torch.cuda.utilization, index),
        temperature_c=_answer(torch.cuda.temperature, index),
        power_w=None if power_mw is None else round(power_mw / 1000),
    )


def _answer(question: Callable[[int], int], index: int) -> int | None:
    """A value that pynvml or amdsmi returns; None without these libraries, and where a GPU has no such sensor."""
    try:
        return question(index)
    except Exception:  # they have errors of their own, in packages that may not be installed
        return None


def _has_driver() -> bool:
    if sys.platform == "win32":
        return shutil.which("nvidia-smi") is not None
    return any(Path(file).exists() for file in DRIVER_FILES)
