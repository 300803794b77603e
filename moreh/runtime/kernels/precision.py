"""Mixed precision: whether bfloat16 is faster on a device, and the autocast context.

A CPU without bfloat16 units is slower in bfloat16 than in float32.
"""

import contextlib
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from moreh.log import logger

MIN_SPEEDUP = 1.2
"""The smallest speedup of matmuls for which bfloat16 is used: casts between the two dtypes eat up a smaller one."""
# Rows and columns of the matrices that are timed. On a GPU a smaller one takes less time than to start it and to wait
# for it, and both precisions would seem to be equally fast.
_MATRIX_SIZE, _GPU_MATRIX_SIZE = 512, 4096
_TIMED_MATMULS = 8
# Whether this process computes in bfloat16, by the type of the device: as chosen here, and as a checkpoint says.
_CHOSEN: dict[str, bool] = {}
_OF_CHECKPOINT: dict[str, bool] = {}


def choose_bfloat16(device: torch.device, *, requested: bool) -> bool:
    """True if bfloat16 is requested, and faster than float32 on this device. The choice is logged.

    A training resumed from a checkpoint computes as the training that wrote it, if on a device of the same type:
    timed again, the choice could come out differently.
    """
    if device.type == "meta":
        return False
    _CHOSEN[device.type] = requested and _choose(device)
    return _CHOSEN[device.type]


def chosen_precisions() -> dict[str, bool]:
    """True if this process computes in bfloat16, by the type of the device; for a checkpoint."""
    return dict(_CHOSEN)


def choose_as(precisions: Mapping[str, bool]) -> None:
    """Make the choices that `chosen_precisions` returned in another process. Call it before the first choice."""
    _OF_CHECKPOINT.clear()
    _OF_CHECKPOINT.update(precisions)
    for device_type, bfloat16 in _CHOSEN.items():
        if precisions.get(device_type, bfloat16) != bfloat16:
            logger.warning(
                "mixed_precision : %s, chosen before the checkpoint was read, which was trained in %s",
                *("bfloat16" if each else "float32" for each in (bfloat16, precisions[device_type])),
            )


def _choose(device: torch.device) -> bool:
    if device.type in _OF_CHECKPOINT:
        bfloat16 = _OF_CHECKPOINT[device.type]
        logger.info("mixed_precision : %s, as in the checkpoint", "bfloat16" if bfloat16 else "off, float32")
        return bfloat16
    speedup = bfloat16_speedup(device)
    faster = speedup >= MIN_SPEEDUP
    logger.info(
        "mixed_precision : %s (bfloat16 matmuls are %.1f x as fast as float32 here)",
        "bfloat16" if faster else "off, float32",
        speedup,
    )
    return faster


def autocast_if(bfloat16: bool, device_type: str) -> AbstractContextManager[object]:
    """Autocast to bfloat16, or a context that changes nothing."""
    return torch.autocast(device_type, dtype=torch.bfloat16) if bfloat16 else contextlib.nullcontext()


def in_float32(outputs: Any) -> Any:
    """A model's outputs with bfloat16 tensors cast to float32, so that the script computes with them in float32."""
    if isinstance(outputs, torch.Tensor):
        return outputs.float() if outputs.dtype == torch.bfloat16 else outputs
    if hasattr(outputs, "to_tuple"):
        # A ModelOutput of transformers. dict.items leaves out the outputs that are computed only on demand.
        for name, value in list(dict.items(outputs)):
            converted = in_float32(value)
            if converted is not value:
                outputs[name] = converted
        if hasattr(outputs, "change_later"):
            outputs.change_later(in_float32)
        return outputs
    if type(outputs) is dict:
        return {name: in_float32(value) for name, value in outputs.items()}
    if type(outputs) in (tuple, list):
        return type(outputs)(in_float32(value) for value in outputs)
    return outputs


def inside_autocast() -> bool:
    """True if the script is in an autocast context of its own, even one that switches autocast off."""
    nesting = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return nesting > 0


def bfloat16_speedup(device: torch.device) -> float:
    """The speed of bfloat16 matmuls relative to float32. Takes a fraction of a second.

    It is the ratio of the fastest matmuls, taken in turns: other programs can only slow a matmul down.
    """
    size = _MATRIX_SIZE if device.type == "cpu" else _GPU_MATRIX_SIZE
    matrices = [torch.ones(size, size, dtype=dtype, device=device) for dtype in (torch.float32, torch.bfloat16)]
    for matrix in matrices:
        _matmul_seconds(matrix)  # does the set-up
    turns = [[_matmul_seconds(matrix) for matrix in matrices] for _ in range(_TIMED_MATMULS)]
    float32_s, bfloat16_s = (min(seconds) for seconds in zip(*turns, strict=True))
    return float32_s / bfloat16_s


def _matmul_seconds(matrix: torch.Tensor) -> float:
    """Time of a matmul of a square matrix with itself, in seconds."""
    start = time.perf_counter()
    # Reading one element waits for the device.
    torch.mm(matrix, matrix)[0, 0].item()
    return time.perf_counter() - start
