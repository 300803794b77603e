"""The device of messages between ranks: their own, or the CPU if workers share a GPU.

Workers that share a GPU talk over gloo, whose collectives take tensors of GPUs, and whose sends and receives do not.
"""

import torch

from moreh.accelerator.gpus import shares_gpus


def transfer_device(device: torch.device) -> torch.device:
    """The device of the messages of a rank that computes on `device`."""
    return torch.device("cpu") if shares_gpus() else device


def outgoing(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as it is sent: contiguous, where messages lie."""
    return tensor.contiguous().to(transfer_device(tensor.device))
