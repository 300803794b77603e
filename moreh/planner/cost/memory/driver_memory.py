"""The memory that a driver's tool shows (`nvidia-smi`, `rocm-smi`), from the live bytes that a plan needs.

`DeviceMemory.total` counts live tensors: `torch.cuda.max_memory_allocated()`. The process holds more: blocks that the
allocator keeps (`max_memory_reserved()`), the context of the driver with its kernels, and buffers of NCCL. The three
constants are judgment from GPUs with 40 to 80 GB; no run of this project has measured them.
"""

import re
from dataclasses import dataclass

from moreh.accelerator.devices import Device
from moreh.planner.plan.plan import Plan
from moreh.planner.units import GIB

# Blocks that are free but kept, as a share of the live bytes. Blocks of 2 MiB and more are split only in part.
RESERVED_SHARE = 0.06
# The context of CUDA with the kernels of torch, and the workspaces of cuBLAS.
CONTEXT_BYTES = 0.6 * GIB
# Buffers of NCCL for each group of ranks that communicates.
GROUP_BYTES = 0.25 * GIB


@dataclass(frozen=True)
class DriverMemory:
    """Bytes of one device, as three tools name them."""

    allocated: float
    """Live tensors: `torch.cuda.max_memory_allocated()`."""
    reserved: float
    """Live memory and the blocks that the allocator keeps: `torch.cuda.max_memory_reserved()`."""
    in_use: float
    """Reserved memory, the driver's context and NCCL, as `nvidia-smi` or `rocm-smi` shows."""


def driver_tool(device: Device) -> str:
    """The tool of a device's driver that shows the memory of processes."""
    return "rocm-smi" if re.search(r"\bAMD\b|\bMI\d|\bRadeon\b|\bRX \d", device.name) else "nvidia-smi"


def driver_memory(plan: Plan, allocated: float) -> DriverMemory:
    """The memory that tools show for a plan whose fullest device has `allocated` live bytes."""
    reserved = allocated * (1 + RESERVED_SHARE)
    groups = sum(size > 1 for size in (plan.tensor, plan.pipeline, plan.data, plan.context, plan.expert, plan.replicas))
    return DriverMemory(allocated, reserved, reserved + CONTEXT_BYTES + groups * GROUP_BYTES)
