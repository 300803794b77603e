"""torch's fused Adam kernels in the optimizers of the script: the same arithmetic in one pass over each parameter."""

from typing import Any

import torch
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

_FUSED_OPTIMIZERS = (torch.optim.Adam, torch.optim.AdamW)


def use_fused_kernels(optimizer: torch.optim.Optimizer) -> None:
    """Switch an Adam or AdamW to its fused implementation, in place, unless the script has chosen an implementation."""
    if type(optimizer) not in _FUSED_OPTIMIZERS or not all(_may_fuse(group) for group in optimizer.param_groups):
        return
    for settings in (optimizer.defaults, *optimizer.param_groups):
        settings["fused"] = True


def _may_fuse(group: dict[str, Any]) -> bool:
    """Whether the script leaves a group's implementation open, and the fused one supports its parameters."""
    chosen = (
        group["foreach"] is not None or group["fused"] is not None or group["capturable"] or group["differentiable"]
    )
    devices = _get_fused_kernels_supported_devices()
    return not chosen and all(p.is_floating_point() and p.device.type in devices for p in group["params"])
