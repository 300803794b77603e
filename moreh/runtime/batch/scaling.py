"""Scales gradients by the gradient of the loss, in place and without a wait for the device."""

from collections.abc import Sequence

import torch


def scale_in_place(gradients: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply gradients by a factor, a scalar tensor. On a CPU a factor of 1 costs nothing.

    A GPU would have to compute everything before the factor until Python knows it, and then stand idle while the
    optimizer's kernels are launched. Multiplied by 1, gradients keep their bits.
    """
    if not gradients:
        return
    if factor.device.type == "cpu":
        scale = factor.item()
        if scale != 1.0:
            for gradient in gradients:
                gradient.mul_(scale)
        return
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device))
