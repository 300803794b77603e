"""Torch's fused kernels in optimizers that the script makes: the same arithmetic in one pass over each parameter."""

from typing import Any

import torch
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

_FUSED = (torch.optim.Adam, torch.optim.AdamW)


def use_fused_kernels(optimizer: torch.optim.Optimizer) -> None:
    """Let an Adam or AdamW whose implementation the script leaves open use the fused one, in place."""
    if type(optimizer) not in _FUSED or not all(_is_open(group) for group in optimizer.param_groups):
        return
    for settings in (optimizer.defaults, *optimizer.param_groups):
        settings["fused"] = True


def _is_open(group: dict[str, Any]) -> bool:
    """Whether the script has chosen no implementation, and the fused one knows the parameters."""
    chosen = (
        group["foreach"] is not None or group["fused"] is not None or group["capturable"] or group["differentiable"]
    )
    kinds = _get_fused_kernels_supported_devices()
    return not chosen and all(p.is_floating_point() and p.device.type in kinds for p in group["params"])
