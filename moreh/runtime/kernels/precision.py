"""Whether computing in bfloat16 pays on a device. A processor without bfloat16 units is slower with it."""

import contextlib
import statistics
import time
from contextlib import AbstractContextManager
from typing import Any

import torch

from moreh.log import logger

# A smaller gain is lost again to the casts between the two types.
MIN_SPEEDUP = 1.2
_MATRIX_SIZE = 512
_TIMED_MATMULS = 5


def choose_bfloat16(device: torch.device, *, asked: bool) -> bool:
    """Whether to compute in bfloat16 on a device: only if it was asked for, and is faster. Says so in the log."""
    if not asked or device.type == "meta":
        return False
    speedup = bfloat16_speedup(device)
    faster = speedup >= MIN_SPEEDUP
    logger.info(
        "mixed_precision : %s (bfloat16 matrix products are %.1f x as fast as float32 here)",
        "bfloat16" if faster else "off, float32",
        speedup,
    )
    return faster


def autocast_if(bfloat16: bool, device_type: str) -> AbstractContextManager[object]:
    """A context that computes in bfloat16, or one that changes nothing."""
    return torch.autocast(device_type, dtype=torch.bfloat16) if bfloat16 else contextlib.nullcontext()


def in_float32(outputs: Any) -> Any:
    """What a model returns, with tensors of bfloat16 converted: what the script computes of them is to be exact."""
    if isinstance(outputs, torch.Tensor):
        return outputs.float() if outputs.dtype == torch.bfloat16 else outputs
    if hasattr(outputs, "to_tuple"):
        # transformers' outputs; of those that are computed when somebody asks for them, what there is.
        for name, value in list(dict.items(outputs)):
            converted = in_float32(value)
            if converted is not value:
                outputs[name] = converted
        return outputs
    if type(outputs) is dict:
        return {name: in_float32(value) for name, value in outputs.items()}
    if type(outputs) in (tuple, list):
        return type(outputs)(in_float32(value) for value in outputs)
    return outputs


def inside_autocast() -> bool:
    """Whether the script has opened an autocast context, be it one that switches autocast off."""
    nesting = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return nesting > 0


def bfloat16_speedup(device: torch.device) -> float:
    """How many times as fast as float32 this machine multiplies bfloat16 matrices: the ratio of two median times.

    Takes some hundredths of a second.
    """
    return _matmul_seconds(torch.float32, device) / _matmul_seconds(torch.bfloat16, device)


def _matmul_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Median time of the product of two square matrices, in seconds. The first one, which sets things up, is not timed."""
    left = torch.ones(_MATRIX_SIZE, _MATRIX_SIZE, dtype=dtype, device=device)
    seconds = []
    for _ in range(_TIMED_MATMULS + 1):
        start = time.perf_counter()
        # Reading one element waits for the device.
        torch.mm(left, left)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
